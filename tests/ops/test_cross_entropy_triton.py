"""The Triton kernel of the loss: in the interpreter where there is no GPU, compiled where there is one."""

import pytest
import torch

from mamba2.ops import cross_entropy, linear_cross_entropy, linear_token_losses
from mamba2.ops.cross_entropy import loss_op, token_losses_op, torch_softmax, triton_softmax
from tests.ops import kernel_checks as checks

DTYPES = checks.HALF_PRECISIONS_AND_SINGLE
pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """17 tokens a chunk, so that every test has several and the last is not whole."""
    monkeypatch.setattr(cross_entropy, "_chunks", lambda h, _: [slice(i, i + 17) for i in range(0, len(h), 17)])


def make_inputs(t, d, v, dtype=torch.float32):
    return {"hidden": checks.normal(2, t, d, dtype=dtype), "weight": checks.normal(v, d, seed=1)}


def make_targets(t: int, v: int) -> torch.Tensor:
    targets = torch.randint(0, v, (2, t), generator=torch.Generator().manual_seed(5))
    targets[0, 0], targets[1, -1] = 0, v - 1
    targets[1, t // 3 : t // 2] = -100
    return targets.to(checks.DEVICE)


def op(targets, factor=1.0):
    return lambda hidden, weight: factor * linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [3, 142, 257, 5000])
def test_loss_and_gradients(monkeypatch, v, dtype):
    checks.check_accuracy(monkeypatch, op(make_targets(12, v), 1 / 1023), make_inputs(12, 8, v, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [16, 257])
def test_token_losses(monkeypatch, v, dtype):
    inputs, targets = make_inputs(12, 8, v, dtype), make_targets(12, v)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        results.append(linear_token_losses(**inputs, targets=targets))
    assert results[1].shape == targets.shape and not results[1][targets == -100].any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ()])
def test_gradients_that_nobody_needs_are_not_made(needed):
    inputs, targets = make_inputs(12, 8, 142), make_targets(12, 142)
    expected = checks.run(op(targets), inputs)
    inputs = {name: tensor.requires_grad_(name in needed) for name, tensor in inputs.items()}
    loss = op(targets)(**inputs)
    assert torch.equal(loss, expected["output 0"]) and loss.requires_grad == bool(needed)
    if needed:
        (gradient,) = torch.autograd.grad(loss, inputs[needed[0]], checks.normal(seed=7))
        assert torch.equal(gradient, expected[f"d{needed[0]}"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_overwrites_logits_with_their_gradient(dtype):
    logits, targets = checks.normal(24, 257, dtype=dtype) * 4, make_targets(12, 257).flatten()
    expected, gradient = torch_softmax(logits.double(), targets, -100, True)
    losses, overwritten = triton_softmax(logits, targets, -100, True)
    assert overwritten is logits and losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    torch.testing.assert_close(logits.double(), gradient, rtol=rtol, atol=1e-6)
    assert not logits[targets == -100].any()


def test_large_logits(monkeypatch):
    targets = make_targets(12, 142)
    for scale in (0.0, 300.0, 1e4):
        inputs = {name: tensor * scale**0.5 for name, tensor in make_inputs(12, 8, 142).items()}
        checks.check_accuracy(monkeypatch, op(targets), inputs)


def test_memory_that_nobody_wrote_is_not_read_and_none_is_written_twice(monkeypatch):
    for v in (142, 257):
        checks.check_memory(monkeypatch, op(make_targets(12, v), 0.1), make_inputs(12, 8, v))


def test_any_strides_give_the_same(monkeypatch):
    targets = make_targets(12, 142)
    inputs = make_inputs(12, 8, 142)
    expected = checks.run(op(targets), inputs)
    for layout in (checks.sliced, checks.transposed):  # torch's products may round otherwise for other strides
        actual = checks.run(op(targets), {**inputs, "hidden": layout(inputs["hidden"])})
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)
    apart = torch.stack([targets, targets], dim=-1)[..., 0]
    checks.assert_same_bits(*(checks.run(op(t), inputs) for t in (apart, targets)))


def test_rows_past_the_range_of_int32():
    logits, targets = checks.normal(3, 16, dtype=torch.bfloat16), torch.tensor([3, 0, 15], device=checks.DEVICE)
    apart = checks.far_apart(logits, 0)
    losses = [triton_softmax(tensor, targets, -100, True)[0] for tensor in (apart, logits)]
    assert torch.equal(*losses) and torch.equal(apart, logits)


@pytest.mark.parametrize("target", [-1, 142])
def test_a_target_outside_the_vocabulary_shows(target):
    inputs, targets = make_inputs(12, 8, 142), make_targets(12, 142)
    targets[1, 2] = target
    losses = linear_token_losses(**inputs, targets=targets)
    assert losses[1, 2].isnan() and losses.isnan().sum() == 1
    results = checks.run(op(targets), inputs)
    assert results["output 0"].isnan() and results["dhidden"][1, 2].isnan().all()
    assert results["dhidden"].isnan().sum() == 8


def test_no_tokens(monkeypatch):
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        results = checks.run(op(torch.zeros(2, 0, dtype=torch.int64, device=checks.DEVICE)), make_inputs(0, 8, 142))
        assert results["output 0"] == 0 and not results["dweight"].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_registration(backend):
    hidden, weight = make_inputs(12, 8, 142, torch.bfloat16).values()
    hidden, targets = hidden.flatten(0, 1), make_targets(12, 142).flatten()
    checks.check_registration(token_losses_op, hidden, weight, targets, -100, backend)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    for needed in ((True, True), (False, True), (True, False)):
        checks.check_registration(loss_op, hidden, weight, targets, -100, *needed, backend)


def test_what_the_kernel_cannot_take_is_named():
    inputs = {name: tensor.double() for name, tensor in make_inputs(12, 8, 142).items()}
    with pytest.raises(ValueError, match="takes hidden in float32, bfloat16 or float16, not"):
        linear_cross_entropy(**inputs, targets=make_targets(12, 142))
