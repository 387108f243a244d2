"""The compiled form of the arithmetic between products gives what it gives as written."""

import itertools

import pytest
import torch

from mamba2.ops import causal_conv1d, fusion, gated_rms_norm, linear_cross_entropy, ssd
from mamba2.ops.fusion import fusable, fuse, is_fused


@pytest.fixture
def fused():
    fuse()
    yield
    fuse(False)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def documents(length: int) -> torch.Tensor:
    return (torch.arange(length) // 19)[None].expand(2, -1)


def run_conv(dtype: torch.dtype):
    x, window, weight, bias = (*tensors((2, 70, 24), (2, 3, 24), dtype=dtype), *tensors((24, 4), (24,)))
    y, final = causal_conv1d(x, weight, bias, documents(70), window, return_final_state=True)
    return (y, final), (x, window, weight, bias)


def run_gated_norm(dtype: torch.dtype):
    x, z, weight = (*tensors((2, 9, 24), (2, 9, 24), dtype=dtype), *tensors((24,)))
    return (gated_rms_norm(x, z, weight, 1e-5, ngroups=3),), (x, z, weight)


def run_loss(dtype: torch.dtype):
    hidden, weight = (*tensors((2, 9, 24), dtype=dtype), *tensors((101, 24)))
    targets = torch.arange(18).view(2, 9)
    targets[0, 3] = -100
    return (linear_cross_entropy(hidden, weight, targets),), (hidden, weight)


def run_ssd(dtype: torch.dtype):
    x, B, C = tensors((2, 70, 4, 8), (2, 70, 2, 12), (2, 70, 2, 12), dtype=dtype)
    dt, D, initial = tensors((2, 70, 4), (4,), (2, 4, 8, 12))
    A = torch.tensor([-1.0, -2.0, -8.0, -40.0], requires_grad=True)
    options = {"D": D, "initial_states": initial, "seq_idx": documents(70), "dt_softplus": True}
    y, final = ssd(x, dt, A, B, C, 16, **options, return_final_states=True)
    return (y, final), (x, dt, A, B, C, D, initial)


RUNS = {"conv": run_conv, "gated norm": run_gated_norm, "loss": run_loss, "ssd": run_ssd}


def values_and_gradients(run, dtype: torch.dtype) -> list[torch.Tensor]:
    outputs, inputs = run(dtype)
    seeds = [torch.linspace(-1.0, 1.0, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, seeds)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("conv", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("ssd", torch.bfloat16, marks=pytest.mark.slow),
        *itertools.product(("gated norm", "loss"), (torch.float32, torch.bfloat16)),
    ],
)
def test_the_fused_form_equals_the_one_as_written(name: str, dtype: torch.dtype, request):
    """Convolution and ssd take longest to compile; in float32 they are in tests/test_train.py, a compiled training."""
    expected = values_and_gradients(RUNS[name], dtype)
    request.getfixturevalue("fused")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, wanted in zip(values_and_gradients(RUNS[name], dtype), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_functions_run_compiled_only_between_fuse_and_its_end_and_without_gradients():
    seen = []

    @fusable
    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return 2 * x

    x = torch.ones(3, requires_grad=True)
    fuse()
    assert is_fused()
    assert double(x).requires_grad and seen == [False]
    with torch.no_grad():
        double(x)
        fuse(False)
        double(x)
    assert seen == [False, True, False]


@pytest.fixture
def compiled(fused, monkeypatch) -> list[tuple]:
    """Arguments of what would be compiled, which takes no others."""
    examples = []

    def describe(args: tuple) -> list:
        return [(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args]

    def compile_like(function, *example):
        examples.append(example)

        def form(*args):
            assert describe(args) == describe(example)
            return function(*args)

        return form

    monkeypatch.setattr(fusion, "compile_like", compile_like)
    return examples


@torch.no_grad()
def test_every_layout_dtype_and_constant_has_its_own_form(compiled):
    """Nothing is checked when a form is called: the wrong one would read the wrong memory."""

    @fusable
    def affine(x: torch.Tensor, shift: torch.Tensor | None, factor: int, y: torch.Tensor) -> torch.Tensor:
        y.copy_(factor * x if shift is None else factor * x + shift)
        return y.sum(dim=0)

    square = torch.arange(36.0).view(6, 6)
    ones, turned = torch.ones(6), torch.empty(6, 6).t()
    calls = [
        (square, None, 2, torch.empty(6, 6)),
        (square, None, 3, torch.empty(6, 6)),
        (square, ones, 2, torch.empty(6, 6)),
        (square, None, 2, turned),
        (square.t(), None, 2, torch.empty(6, 6)),
        (square.double(), None, 2, torch.empty(6, 6)),
        (square[:, ::2], ones[:3], 2, torch.empty(6, 3)),
        (square[1:], None, 2, torch.empty(5, 6)),
    ]
    for x, shift, factor, y in calls + calls:
        wanted = (factor * x + (0 if shift is None else shift)).to(y.dtype)
        assert torch.equal(affine(x, shift, factor, y), wanted.sum(dim=0)) and torch.equal(y, wanted)
    assert len(compiled) == len(calls)


@torch.no_grad()
def test_after_so_many_forms_others_run_as_written(compiled, monkeypatch):
    monkeypatch.setattr(fusion, "SHAPES", 2)
    double = fusable(lambda x: 2 * x)
    for length in (1, 2, 3, 1, 2, 3):
        assert torch.equal(double(torch.ones(length)), torch.full((length,), 2.0))
    assert [len(x) for (x,) in compiled] == [1, 2]
