"""The Triton kernels of the convolution: in the interpreter where there is no GPU, compiled where there is one."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mamba2.ops import causal_conv1d, conv1d
from tests.ops import kernel_checks as checks

DTYPES = checks.HALF_PRECISIONS_AND_SINGLE
pytestmark = pytest.mark.usefixtures("triton_backend")


def make_inputs(b, l, d, width, dtype=torch.float32, optional=("bias", "initial_state")):
    inputs = {
        "x": checks.normal(b, l, d, dtype=dtype),
        "weight": checks.normal(d, width, seed=1),
        "bias": checks.normal(d, seed=2),
        "initial_state": checks.normal(b, width - 1, d, dtype=dtype, seed=3),
    }
    return {k: v if k in ("x", "weight", *optional) else None for k, v in inputs.items()}


def documents(b: int, l: int) -> torch.Tensor:
    """Boundaries two, one, five, ... tokens apart, some across the edges of tiles, and a value that comes back."""
    lengths = itertools.cycle([2, 1, 5, 9, 3, 17])
    ids = [i % 2 for i in range(b * l) for _ in range(next(lengths))][: b * l]
    return torch.tensor(ids, dtype=torch.int32, device=checks.DEVICE).view(b, l)


def op(seq_idx=None, activation=True, splits=None):
    """y, or its pieces, and the final state."""

    def function(**inputs):
        y, final = causal_conv1d(
            **inputs, seq_idx=seq_idx, activation=activation, return_final_state=True, splits=splits
        )
        return (*y, final) if splits else (y, final)

    return function


@pytest.mark.parametrize("width", range(1, 9))
def test_every_width(monkeypatch, width):
    """A document begins in the window that the second program, from token 32 on, finds before it."""
    checks.check_accuracy(monkeypatch, op(documents(1, 99)[:, 64:]), make_inputs(1, 35, 20, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 17, 142), (1, 9, 257)])
def test_values_and_gradients(monkeypatch, shape, dtype):
    checks.check_accuracy(monkeypatch, op(documents(*shape[:2])), make_inputs(*shape, 4, dtype))


@pytest.mark.parametrize(
    ("shape", "width", "dtype", "multiprocessors"),
    [
        ((2, 67, 142), 4, torch.bfloat16, 10_000),
        ((1, 67, 300), 3, torch.float32, 10_000),
        ((1, 67, 5), 8, torch.float16, 10_000),
        ((1, 67, 5), 1, torch.float32, 10_000),
        ((8, 67, 3), 2, torch.float32, 1),
    ],
)
def test_values_and_gradients_across_programs(monkeypatch, shape, width, dtype, multiprocessors):
    """With very many multiprocessors a program takes 32 tokens, with one 64 of the last shape's. A document begins
    shortly before token 64."""
    monkeypatch.setattr(conv1d, "multiprocessors", lambda device: multiprocessors)
    checks.check_accuracy(monkeypatch, op(documents(shape[0], 99)[:, 32:]), make_inputs(*shape, width, dtype))


@pytest.mark.parametrize("optional", [(), ("bias",), ("initial_state",)])
@pytest.mark.parametrize("activation", [False, True])
def test_what_is_not_given_is_left_out(monkeypatch, optional, activation):
    checks.check_accuracy(monkeypatch, op(activation=activation), make_inputs(1, 37, 20, 4, optional=optional))


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_sequences_shorter_than_the_window(monkeypatch, length):
    for seq_idx in (None, documents(1, length)):
        checks.check_accuracy(monkeypatch, op(seq_idx), make_inputs(1, length, 6, 8))


def test_documents_by_cu_seqlens_equal_those_run_one_by_one(monkeypatch):
    inputs = make_inputs(1, 105, 6, 4, optional=("bias",))
    inputs.pop("initial_state")
    whole = partial(causal_conv1d, return_final_state=True, cu_seqlens=checks.cu_seqlens(torch.int32))
    actual = checks.run(whole, inputs)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    checks.assert_close(actual, checks.one_by_one(op(), inputs, ("x",)), 1e-6)


@pytest.mark.parametrize("splits", [(1, 19), (64, 40, 38), (257, 3, 4)])
def test_pieces_of_the_result(monkeypatch, splits):
    inputs, seq_idx = make_inputs(1, 9, sum(splits), 4, torch.bfloat16), documents(1, 9)
    checks.check_accuracy(monkeypatch, op(seq_idx, splits=splits), inputs)
    checks.check_memory(monkeypatch, op(seq_idx, splits=splits), inputs)
    whole, pieces = checks.run(op(seq_idx), inputs), checks.run(op(seq_idx, splits=splits), inputs)
    joined = torch.cat([pieces[f"output {i}"] for i in range(len(splits))], dim=-1)
    assert torch.equal(joined, whole["output 0"])


def test_gradients_of_pieces_are_not_joined():
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    x, weight = checks.normal(1, 9, 20).requires_grad_(), checks.normal(20, 4).requires_grad_()
    with Watch():
        pieces = causal_conv1d(x, weight, splits=(8, 6, 6))
        torch.autograd.backward(pieces, [piece.detach() for piece in pieces])
    assert "mamba2::causal_conv1d_backward" in called and "aten::cat" not in called


@pytest.mark.parametrize(("splits", "gradient_of"), [(None, 0), (None, 1), ((3, 2, 1), 1)])
def test_one_result_alone_can_carry_the_gradient(monkeypatch, splits, gradient_of):
    function = op(documents(1, 9), splits=splits)
    checks.check_accuracy(monkeypatch, lambda **t: function(**t)[gradient_of], make_inputs(1, 9, 6, 4))


@pytest.mark.parametrize("width", [1, 4])
def test_memory_that_nobody_wrote_is_not_read_and_none_is_written_twice(monkeypatch, width):
    inputs = make_inputs(2, 35, 20, width, torch.bfloat16 if width == 4 else torch.float32)
    checks.check_memory(monkeypatch, op(documents(2, 35)), inputs)


def test_any_strides_give_the_same(monkeypatch):
    seq_idx, inputs = documents(2, 19), make_inputs(2, 19, 20, 4)
    checks.check_strides(monkeypatch, op(seq_idx), inputs, ("x", "weight", "initial_state"))
    apart = torch.stack([seq_idx, seq_idx + 5], dim=-1)[..., 0]
    checks.assert_same_bits(checks.run(op(apart), inputs), checks.run(op(seq_idx), inputs))


def test_an_expanded_gradient():
    x, weight = checks.normal(2, 9, 6).requires_grad_(), checks.normal(6, 4)
    (actual,) = torch.autograd.grad(causal_conv1d(x, weight).sum(), x)
    y = causal_conv1d(x, weight)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_past_the_range_of_int32(dim):
    inputs = make_inputs(2, 5, 3, 4, torch.bfloat16)
    apart = {**inputs, "x": checks.far_apart(inputs["x"], dim)}
    checks.assert_same_bits(checks.run(op(), apart), checks.run(op(), inputs))


def test_a_document_does_not_see_what_is_broken_in_another():
    """Infinities and NaN before a boundary stay there, in values and gradients."""
    seq_idx = torch.tensor([[0] * 4 + [1] * 6], device=checks.DEVICE)
    inputs = make_inputs(1, 10, 6, 4, optional=())
    healthy = checks.run(op(seq_idx), inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, 2] = float("nan")
    broken = checks.run(op(seq_idx), inputs)
    assert broken["output 0"][:, 2:4].isnan().any()
    for name in ("output 0", "dx"):
        assert torch.equal(broken[name][:, 4:], healthy[name][:, 4:])


@pytest.mark.parametrize(
    ("message", "x", "weight"),
    [
        (
            "takes x in float32, bfloat16 or float16, not torch.float64",
            torch.zeros(1, 3, 4).double(),
            torch.zeros(4, 2),
        ),
        ("takes weight in float32", torch.zeros(1, 3, 4), torch.zeros(4, 2).double()),
        ("weight of width 1 to 8, not 9", torch.zeros(1, 3, 4), torch.zeros(4, 9)),
    ],
)
def test_what_the_kernels_cannot_take_is_named(message, x, weight):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x.to(checks.DEVICE), weight.to(checks.DEVICE))


def test_registration():
    tensors = [t.requires_grad_() for t in make_inputs(1, 9, 6, 4).values()]
    x, weight, bias, initial = tensors
    seq_idx = documents(1, 9)
    checks.check_registration(conv1d._forward_op, x, weight, bias, seq_idx, initial, True, (2, 4))
    checks.check_registration(conv1d._forward_op, x, weight, None, None, None, False, (6,))
    x, weight, bias, initial = (tensor.detach() for tensor in tensors)
    dys = [checks.normal(1, 9, width) for width in (2, 4)]
    checks.check_registration(conv1d._backward_op, dys, x, weight, bias, seq_idx, initial, True)
