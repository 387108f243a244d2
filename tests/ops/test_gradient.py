"""Derivatives that are no plain gradient: right, or refused by a sentence; never zero in silence."""

import pytest
import torch
from torch.autograd import forward_ad

from mamba2.model import Mamba2LM
from mamba2.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    linear_cross_entropy,
    linear_token_losses,
    ssd,
    ssd_step,
)
from tests.ops.kernel_checks import normal
from tests.test_model import small_config

TARGETS = torch.tensor([0, 3, -100])


def normals(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [normal(*shape, seed=i).cpu().to(dtype) for i, shape in enumerate(shapes)]


def ssd_of(x, dt, A, B, C, D, dt_bias, initial):
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]])
    options = {"D": D, "dt_bias": dt_bias, "initial_states": initial, "seq_idx": seq_idx, "dt_softplus": True}
    return ssd(x, dt, -A.exp(), B, C, 2, **options, return_final_states=True)


def step_of(state, x, dt, A, B, C):
    state = state.clone()
    return ssd_step(state, x, dt, -A.exp(), B, C, dt_softplus=True), state


def conv_step_of(window, x, weight):
    window = window.clone()
    return causal_conv1d_step(window, x, weight), window


# Functions of tensors, and the shapes of these. The last three carry no gradient, but tangents.
OPS = {
    "ssd": (
        ssd_of,
        [(1, 5, 2, 2), (1, 5, 2), (2,), (1, 5, 1, 3), (1, 5, 1, 3), (2,), (2,), (1, 2, 2, 3)],
    ),
    "causal_conv1d": (
        lambda x, weight, bias: causal_conv1d(x, weight, bias, return_final_state=True, splits=(2, 3))[0],
        [(1, 5, 5), (5, 4), (5,)],
    ),
    "add_rms_norm": (lambda x, residual, w: add_rms_norm(x, residual, w, 1e-5), [(3, 4), (3, 4), (4,)]),
    "gated_rms_norm": (lambda x, z, w: gated_rms_norm(x, z, w, 1e-5, ngroups=2), [(3, 4), (3, 4), (4,)]),
    "linear_cross_entropy": (lambda h, w: linear_cross_entropy(h, w, TARGETS), [(3, 4), (5, 4)]),
    "linear_token_losses": (lambda h, w: linear_token_losses(h, w, TARGETS), [(3, 4), (5, 4)]),
    "ssd_step": (step_of, [(1, 2, 2, 3), (1, 2, 2), (1, 2), (2,), (1, 1, 3), (1, 1, 3)]),
    "causal_conv1d_step": (conv_step_of, [(1, 3, 5), (1, 5), (5, 4)]),
}
WITH_GRADIENT = list(OPS)[:5]


def scalar(name: str, dtype: torch.dtype = torch.float64):
    """A function of all tensors of an op, curved even where the op is not; its inputs, and a direction."""
    op, shapes = OPS[name]

    def function(*tensors):
        outputs = op(*tensors)
        return sum(y.sin().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return function, normals(*shapes, dtype=dtype), normals(*reversed(shapes), dtype=dtype)[::-1]


def moved(inputs, direction, by):
    return [x + by * v for x, v in zip(inputs, direction)]


def slope(function, inputs, direction, by=1e-5) -> float:
    """The derivative along a direction by central differences."""
    return ((function(*moved(inputs, direction, by)) - function(*moved(inputs, direction, -by))) / (2 * by)).item()


def along(gradients, direction) -> torch.Tensor:
    return sum((g * v).sum() for g, v in zip(gradients, direction))


@pytest.mark.parametrize("name", OPS)
def test_tangents_are_those_of_finite_differences(name):
    function, inputs, direction = scalar(name)
    expected = pytest.approx(slope(function, inputs, direction), rel=1e-6)
    assert torch.func.jvp(function, tuple(inputs), tuple(direction))[1].item() == expected
    with forward_ad.dual_level():
        # also where a gradient is recorded at the same time
        duals = [forward_ad.make_dual(x.requires_grad_(), v) for x, v in zip(inputs, direction)]
        assert forward_ad.unpack_dual(function(*duals)).tangent.item() == expected


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_second_derivatives_of_torch_func_are_those_of_finite_differences(name):
    function, inputs, direction = scalar(name)
    gradient = torch.func.grad(function, tuple(range(len(inputs))))
    expected = pytest.approx(slope(lambda *t: along(gradient(*t), direction), inputs, direction), rel=1e-6)
    assert along(torch.func.jvp(gradient, tuple(inputs), tuple(direction))[1], direction).item() == expected
    assert along(torch.func.grad(lambda t: along(gradient(*t), direction))(inputs), direction).item() == expected


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_of_every_sample_are_those_one_by_one(name):
    function, inputs, direction = scalar(name)
    rows = [torch.stack([x, y]) for x, y in zip(inputs, direction)]
    gradients = torch.func.vmap(torch.func.grad(function, tuple(range(len(inputs)))))(*rows)
    for row, tensors in enumerate((inputs, direction)):
        tensors = [tensor.requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(function(*tensors), tensors)
        for actual, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual[row], gradient)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", list(OPS)[:7])
def test_a_backend_that_was_asked_for_refuses_transforms(monkeypatch, name, backend):
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    function, inputs, direction = scalar(name, torch.float32)
    for transformed in (
        lambda: torch.func.jvp(function, tuple(inputs), tuple(direction)),
        lambda: torch.func.grad(function)(*inputs),
        lambda: torch.func.vmap(function)(*(x[None] for x in inputs)),
    ):
        with pytest.raises(ValueError, match=f"'{backend}' has no forward-mode .* MAMBA2_BACKEND=reference"):
            transformed()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_a_fast_form_refuses_to_be_differentiated_twice(monkeypatch, name, backend):
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    function, inputs, direction = scalar(name, torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    plain = torch.autograd.grad(function(*inputs), inputs)
    recorded = function(*inputs)
    gradients = torch.autograd.grad(recorded, inputs, create_graph=True)
    for gradient, value in zip(gradients, plain):
        assert torch.equal(gradient, value)  # asking for a graph is no error, and changes no value
    for x in inputs:
        with pytest.raises(ValueError, match=r"no second derivatives, which .*jvp uses, too; MAMBA2_BACKEND=reference"):
            torch.autograd.grad(along(gradients, direction), x, retain_graph=True, allow_unused=True)
    with pytest.raises(ValueError, match="no batched gradients"):
        torch.autograd.grad(recorded, inputs, torch.ones(2), is_grads_batched=True, retain_graph=True)
    with pytest.raises(ValueError, match="no batched gradients"):
        torch.func.vmap(lambda v: torch.autograd.grad(recorded, inputs, v, retain_graph=True))(torch.ones(2))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="no tangents of gradients"):
        torch.autograd.grad(recorded, inputs, forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0)))


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_the_model_has_tangents_and_second_derivatives(monkeypatch, checkpoint_every):
    model = Mamba2LM(small_config(num_hidden_layers=2), seed=1).double()
    model.backbone.checkpoint_every = checkpoint_every
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = {name: normal(*p.shape, seed=3).cpu().double() for name, p in start.items()}

    def loss(values):
        return torch.func.functional_call(model, values, (ids[:, :-1], ids[:, 1:]))

    def loss_and_slope(step):
        """At the start moved along the direction: the loss, and its gradient's share of the direction."""
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + step * direction[name])
        value = model(ids[:, :-1], ids[:, 1:])
        gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        return value, along(gradients, direction.values())

    tangent = torch.func.jvp(loss, (start,), (direction,))[1].item()
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    (above, slope_above), (below, slope_below) = loss_and_slope(1e-6), loss_and_slope(-1e-6)
    assert tangent == pytest.approx((above - below).item() / 2e-6, rel=1e-6)
    curvature = torch.autograd.grad(loss_and_slope(0.0)[1], list(model.parameters()))
    expected = pytest.approx((slope_above - slope_below).item() / 2e-6, rel=1e-5)
    assert along(curvature, direction.values()).item() == expected


@pytest.mark.parametrize("option", ["checkpoint_every", "keep_products_only"])
def test_derivatives_that_recomputing_does_not_have_are_refused_by_name(option):
    model = Mamba2LM(small_config(num_hidden_layers=2), seed=1)
    weights = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    ids = torch.arange(16).view(2, 8)
    plain = torch.autograd.grad(model(ids, ids), list(model.parameters()))
    for part in (model.backbone, *model.backbone.layers):
        setattr(part, option, 1)  # those that have it

    def loss(values):
        return torch.func.functional_call(model, values, (ids, ids))

    with pytest.raises(ValueError, match=r"a gradient by torch\.func does not go with keep_products_only or"):
        torch.func.grad(loss)(weights)
    moved = {name: p.requires_grad_() for name, p in weights.items()}
    with pytest.raises(ValueError, match="functional_call does not go with keep_products_only or checkpoint_every"):
        loss(moved).backward()
    if option == "keep_products_only":
        with pytest.raises(ValueError, match="create_graph=True does not go with keep_products_only"):
            torch.autograd.grad(model(ids, ids), list(model.parameters()), create_graph=True)
    else:
        gradients = torch.autograd.grad(model(ids, ids), list(model.parameters()), create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain))
        with pytest.raises(ValueError, match="the fast forms have no second derivatives"):
            gradients[0].sum().backward()
    model.eval()
    assert torch.func.grad(loss)(weights).keys() == weights.keys()


def test_a_compiled_function_sees_the_transforms_around_an_op():
    torch.compiler.reset()
    function, inputs, direction = scalar("causal_conv1d")
    compiled = torch.compile(
        lambda *t: torch.func.jvp(function, t, tuple(direction))[1], fullgraph=True, backend="aot_eager"
    )
    assert compiled(*inputs).item() == pytest.approx(slope(function, inputs, direction), rel=1e-6)
