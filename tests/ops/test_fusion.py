"""The compiled form of the arithmetic between products gives what it gives as written."""

import itertools

import pytest
import torch

from mamba2.ops import fusion
from mamba2.ops.fusion import fusable, fuse, is_fused
from tests.ops import kernel_checks as checks
from tests.ops.test_gradient import OPS, normals


@pytest.fixture
def fused():
    fuse()
    yield
    fuse(False)


def values_and_gradients(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    op, shapes = OPS[name]
    inputs = dict(zip("abcdefgh", normals(*shapes, dtype=dtype)))
    return checks.run(lambda **tensors: op(*tensors.values()), inputs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(("gated_rms_norm", "linear_cross_entropy"), (torch.float32, torch.bfloat16)),
        *(pytest.param(name, torch.bfloat16, marks=pytest.mark.slow) for name in ("causal_conv1d", "ssd")),
    ],
)
def test_the_fused_form_equals_the_one_as_written(name: str, dtype: torch.dtype, request):
    """The two that take longest to compile are in float32 in tests/test_train.py, in a compiled training."""
    expected = values_and_gradients(name, dtype)
    request.getfixturevalue("fused")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for key, actual in values_and_gradients(name, dtype).items():
        bound = tolerance * expected[key].abs().max().item()
        torch.testing.assert_close(actual, expected[key], rtol=tolerance, atol=bound, msg=key)


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
