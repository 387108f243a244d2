"""The Triton kernels of both norms: in the interpreter where there is no GPU, compiled where there is one."""

import pytest
import torch

from mamba2.ops import add_rms_norm, gated_rms_norm, norm
from mamba2.ops.kernel import sum_rows
from tests.ops import kernel_checks as checks

DTYPES = checks.HALF_PRECISIONS_AND_SINGLE
EPS = 1e-5
pytestmark = pytest.mark.usefixtures("triton_backend")


def make_add(*shape, dtype=torch.float32, stream=torch.float32):
    residual = None if stream is None else checks.normal(*shape, dtype=stream, seed=1)
    return {"x": checks.normal(*shape, dtype=dtype), "residual": residual, "weight": checks.normal(shape[-1], seed=2)}


def add(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def make_gated(*shape, dtype=torch.float32):
    x, z = (checks.normal(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    return {"x": x, "z": z, "weight": checks.normal(shape[-1], seed=2)}


def gated(ngroups=1):
    return lambda x, z, weight: gated_rms_norm(x, z, weight, EPS, ngroups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "stream"), [((1, 5), None), ((2, 17, 142), torch.float32), ((9, 257), torch.bfloat16), ((9, 24), None)]
)
def test_add_norm(monkeypatch, shape, stream, dtype):
    checks.check_accuracy(monkeypatch, add, make_add(*shape, dtype=dtype, stream=stream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", DTYPES)
def test_the_stream_is_that_of_torch_to_the_bit(monkeypatch, stream, dtype):
    inputs = make_add(9, 24, dtype=dtype, stream=stream)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        results.append(add(**inputs)[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_normalised_sum_comes_in_the_dtype_asked_for(monkeypatch, dtype):
    def function(x, residual, weight):
        return add_rms_norm(x, residual, weight, EPS, dtype=dtype if x.dtype == torch.bfloat16 else None)

    checks.check_accuracy(monkeypatch, function, make_add(17, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("gradient_of", [0, 1])
@pytest.mark.parametrize("stream", [None, torch.float32])
def test_one_result_alone_can_carry_the_gradient(monkeypatch, stream, gradient_of):
    checks.check_accuracy(monkeypatch, lambda **t: add(**t)[gradient_of], make_add(9, 24, stream=stream))


def test_a_stream_that_starts_is_not_copied():
    inputs = make_add(9, 24, stream=None)
    assert add(**inputs)[1] is inputs["x"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "ngroups"), [((1, 5), 1), ((2, 17, 144), 3), ((9, 24), 8), ((3, 257), 1)])
def test_gated_norm(monkeypatch, shape, ngroups, dtype):
    checks.check_accuracy(monkeypatch, gated(ngroups), make_gated(*shape, dtype=dtype))


@pytest.mark.parametrize("d", [2560, 5120, 5121])
def test_wide_rows_in_pieces(monkeypatch, d):
    checks.check_accuracy(monkeypatch, add, make_add(3, d, dtype=torch.bfloat16))
    checks.check_accuracy(monkeypatch, gated(), make_gated(3, d, dtype=torch.bfloat16))


@pytest.mark.parametrize("multiprocessors", [1, 10_000])
def test_few_and_many_rows_per_program_agree(monkeypatch, multiprocessors):
    """With one multiprocessor a program takes three and four tiles of rows, the last one fewer."""
    monkeypatch.setattr(norm, "multiprocessors", lambda device: multiprocessors)
    checks.check_accuracy(monkeypatch, add, make_add(19, 257))
    checks.check_accuracy(monkeypatch, gated(3), make_gated(67, 144))


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_sums_over_programs(rows):
    """One launch sums two workspaces, the columns of the first into two tensors; with 130 rows in two steps."""
    partial, other = checks.normal(rows, 11), checks.normal(2 * rows, 9, seed=1)
    first, second, third = (checks.normal(n, dtype=torch.bfloat16 if n == 8 else torch.float32) for n in (3, 8, 9))
    sum_rows(partial, first, second, other, third)
    expected = (*partial.sum(dim=0).split([3, 8]), other.sum(dim=0))
    for actual, wanted in zip((first, second, third), expected):
        torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=1e-2 if len(actual) == 8 else 1e-5, atol=1e-5)


def test_memory_that_nobody_wrote_is_not_read_and_none_is_written_twice(monkeypatch):
    checks.check_memory(monkeypatch, add, make_add(19, 257, dtype=torch.bfloat16))
    checks.check_memory(monkeypatch, add, make_add(1, 2560, stream=None))
    checks.check_memory(monkeypatch, gated(3), make_gated(2, 19, 144, dtype=torch.bfloat16))


def test_any_strides_give_the_same(monkeypatch):
    checks.check_strides(monkeypatch, add, make_add(2, 19, 20), ("x", "residual"))
    checks.check_strides(monkeypatch, gated(2), make_gated(2, 19, 20), ("x", "z"))


@pytest.mark.parametrize("dim", [0, 1])
def test_strides_past_the_range_of_int32(dim):
    for op, inputs, names in (
        (add, make_add(3, 5, dtype=torch.bfloat16, stream=torch.bfloat16), ("x", "residual")),
        (gated(), make_gated(3, 5, dtype=torch.bfloat16), ("x", "z")),
    ):
        expected = checks.run(op, inputs)
        apart = {name: checks.far_apart(inputs[name], dim) for name in names}
        checks.assert_same_bits(checks.run(op, {**inputs, **apart}), expected)


def test_expanded_gradients():
    inputs = [tensor.requires_grad_() for tensor in make_add(9, 24).values()]
    normed, stream = add_rms_norm(*inputs, EPS)
    actual = torch.autograd.grad(normed.sum() + stream.sum(), inputs)
    outputs = add_rms_norm(*inputs, EPS)
    expected = torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
    assert all(map(torch.equal, actual, expected))


def test_no_rows():
    for op, inputs in ((add, make_add(2, 0, 6)), (gated(2), make_gated(0, 6))):
        results = checks.run(op, inputs)
        assert results["output 0"].shape == inputs["x"].shape
        assert not results["dweight"].any()


def test_large_and_small_values_stay_finite():
    for scale in (1e-30, 1e4):
        inputs = {name: tensor * scale for name, tensor in make_gated(4, 20).items()}
        assert all(value.isfinite().all() for value in checks.run(gated(2), inputs).values())


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("takes x in float32, bfloat16", lambda: add_rms_norm(torch.zeros(2, 4).double(), None, torch.zeros(4), EPS)),
        ("takes weight in float32", lambda: add_rms_norm(torch.zeros(2, 4), None, torch.zeros(4).double(), EPS)),
        ("takes z in float32", lambda: gated_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4).int(), torch.zeros(4), EPS)),
    ],
)
def test_what_the_kernels_cannot_take_is_named(message, call):
    with torch.device(checks.DEVICE), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("stream", [None, torch.float32])
def test_registration_of_add_norm(stream):
    x, residual, weight = make_add(9, 24, dtype=torch.bfloat16, stream=stream).values()
    checks.check_registration(norm._add_forward_op, x.requires_grad_(), residual, weight, EPS, torch.float16)
    u = x.detach() if residual is None else residual
    dy = checks.normal(9, 24)
    checks.check_registration(norm._add_backward_op, dy, residual, u, weight, EPS, torch.bfloat16)


def test_registration_of_gated_norm():
    x, z, weight = make_gated(9, 24).values()
    checks.check_registration(norm._gated_backward_op, x, x, z, weight, EPS, 3)
    checks.check_registration(norm._gated_forward_op, x.requires_grad_(), z, weight, EPS, 3)
