"""SSD: the recurrence and the chunked form, against each other, float64 differences, and mamba-ssm's own kernels."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from mamba2.ops import fusion, ssd
from mamba2.ops.ssd import IMPLEMENTATIONS
from mamba2.ops.ssd.blocked import forward_op
from mamba2.ops.ssd.chunked import ssd_chunked
from tests.ops import kernel_checks as checks

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def make_inputs(b, l, h, p, g, n, dtype=torch.float64, optional=NAMES[5:], D_per_channel=False, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h),
        "A": -torch.rand(h, generator=generator, dtype=torch.float64).to(dtype) * 3 - 0.1,
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h, p) if D_per_channel else normal(h),
        "z": normal(b, l, h, p),
        "dt_bias": normal(h) - 1,
        "initial_states": normal(b, h, p, n),
    }
    return {name: inputs[name].requires_grad_() for name in NAMES if name in NAMES[:5] or name in optional}


def run(function: Callable, inputs: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Result, final states and all gradients."""
    return checks.run(partial(function, dt_softplus=True, return_final_states=True, **options), inputs)


def part(inputs: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """The inputs of some of the tokens."""
    return {name: t[:, start:stop] if name in ("x", "dt", "B", "C") else t for name, t in inputs.items()}


def documents(b: int, l: int) -> torch.Tensor:
    changes = torch.rand(b, l, generator=torch.Generator().manual_seed(l)) < 0.2
    return changes.cumsum(dim=1)


@pytest.mark.parametrize("form", [ssd_chunked, IMPLEMENTATIONS["torch"]])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", [(2, 17, 6, 4, 3, 5), (1, 1, 2, 3, 1, 2), (2, 37, 4, 8, 2, 142), (1, 33, 3, 5, 3, 1)])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_chunks_equal_the_recurrence_in_float64(monkeypatch, shape, chunk_size, with_documents, form):
    options = {"chunk_size": chunk_size, "dt_limit": (0.05, 1.5)}
    if with_documents:
        options["seq_idx"] = documents(*shape[:2])
    inputs = make_inputs(*shape, D_per_channel=True)
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", form)
    actual = run(ssd, inputs, **options)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    checks.assert_close(actual, run(ssd, inputs, **options), 1e-12)


@pytest.mark.parametrize("shape", [(2, 65, 4, 16, 2, 16), (1, 257, 3, 48, 1, 142)])
def test_chunks_in_float32_stay_close_to_the_float64_recurrence(monkeypatch, shape):
    inputs = make_inputs(*shape)
    with torch.no_grad():
        inputs["dt_bias"] -= 3.0  # steps of about 0.02, where models live
    actual = run(ssd, {name: tensor.float() for name, tensor in inputs.items()}, chunk_size=64)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    checks.assert_close(actual, run(ssd, inputs, chunk_size=64), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(monkeypatch, backend):
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    inputs = make_inputs(1, 5, 2, 2, 1, 3)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]])

    def function(*tensors):
        named = dict(zip(NAMES, tensors))
        return ssd(**named, chunk_size=2, seq_idx=seq_idx, dt_softplus=True, return_final_states=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


MAMBA_SSM_CASES = {
    "plain": {"optional": ("dt_bias",)},
    "everything, 3 groups": {"g": 3, "optional": NAMES[5:], "limit": (0.01, 0.5)},
    "D per channel": {"optional": ("D", "dt_bias"), "D_per_channel": True},
    "documents": {"optional": ("D", "dt_bias", "initial_states"), "seq_idx": True},
    "gate and documents": {"g": 3, "optional": ("D", "z", "dt_bias"), "seq_idx": True},
}


def mamba_ssm_inputs(case: str) -> tuple[dict, dict]:
    """Arguments of `run` for one of the cases, float32."""
    settings = dict(MAMBA_SSM_CASES[case])
    g, limit = settings.pop("g", 1), settings.pop("limit", (0.0, math.inf))
    length = 40
    seq_idx = documents(1, length).int() if settings.pop("seq_idx", False) else None
    inputs = make_inputs(1, length, 3, 16, g, 16, dtype=torch.float32, **settings)
    options = {"chunk_size": 16, "seq_idx": seq_idx, "dt_limit": limit}
    if seq_idx is not None:
        seq_idx -= seq_idx[:, :1].clone()  # there, an initial state belongs to document 0
    return inputs, options


def test_documents_equal_sequences_run_one_by_one():
    inputs = {k: v.detach() for k, v in make_inputs(1, 30, 2, 4, 1, 6, optional=("D", "dt_bias")).items()}
    seq_idx = torch.tensor([[4] * 3 + [7] * 1 + [4] * 18 + [5] * 8])
    together = ssd(**inputs, chunk_size=8, seq_idx=seq_idx)
    cuts = ((0, 3), (3, 4), (4, 22), (22, 30))
    parts = [ssd(**part(inputs, start, stop), chunk_size=8) for start, stop in cuts]
    torch.testing.assert_close(together, torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_documents_by_cu_seqlens_and_their_states_equal_those_run_one_by_one(monkeypatch, backend, dtype):
    """State and gradients with documents of less than a window, of exactly four, and of no token."""
    inputs = make_inputs(1, 105, 4, 8, 2, 6, optional=("D", "z", "dt_bias"))
    op = partial(ssd, chunk_size=16, dt_softplus=True, dt_limit=(0.05, 1.5), return_final_states=True)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    expected = checks.one_by_one(op, inputs, ("x", "dt", "B", "C", "z"))
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    checks.assert_close(checks.run(partial(op, cu_seqlens=checks.cu_seqlens(dtype)), inputs), expected, 1e-12)


def test_the_state_of_a_document_behind_many_tokens_is_as_exact_as_of_one_alone():
    """Sums over the whole row are far larger than those inside the last document."""
    inputs = {k: v.detach() for k, v in make_inputs(1, 4096, 1, 4, 1, 6, torch.float32, optional=()).items()}
    inputs["dt"] = inputs["dt"].abs() * 100
    inputs["dt"][:, 4000:] /= 10_000
    options = {"chunk_size": 64, "return_final_states": True}
    _, states = ssd(**inputs, **options, cu_seqlens=torch.tensor([0, 4000, 4096]))
    _, alone = ssd(**{k: v.double() for k, v in part(inputs, 4000, 4096).items()}, **options)
    torch.testing.assert_close(states[1].double(), alone[0], rtol=1e-5, atol=1e-5)


def test_the_final_state_of_one_half_starts_the_other():
    inputs = {k: v.detach() for k, v in make_inputs(2, 41, 2, 4, 1, 6, optional=("D",)).items()}
    options = {"chunk_size": 8, "return_final_states": True, "dt_softplus": True}
    whole, last = ssd(**inputs, **options)
    y1, state = ssd(**part(inputs, 0, 19), **options)
    y2, end = ssd(**part(inputs, 19, 41), **options, initial_states=state)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [1e-8, 50.0, 1e4])
def test_extreme_steps_stay_finite(step):
    """exp(cs_i - cs_j) above the diagonal overflows for large dt |A|; nothing of it may reach values or gradients."""
    inputs = make_inputs(1, 70, 2, 4, 1, 4, dtype=torch.float32, optional=())
    with torch.no_grad():
        inputs["dt"].fill_(step)
    seq_idx = documents(1, 70)
    y = ssd(**inputs, chunk_size=32, seq_idx=seq_idx)
    gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_any_strides_give_the_same():
    inputs = {k: v.detach() for k, v in make_inputs(2, 19, 4, 6, 2, 5).items()}
    expected = ssd(**inputs, chunk_size=8)
    strange = {k: checks.transposed(v) for k, v in inputs.items()}
    assert not strange["x"].is_contiguous()
    torch.testing.assert_close(ssd(**strange, chunk_size=8), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_x_and_the_state_is_wide(dtype):
    inputs = {k: v.detach().to(dtype) for k, v in make_inputs(1, 9, 2, 4, 1, 4).items()}
    y, state = ssd(**inputs, chunk_size=4, return_final_states=True)
    assert y.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


CU_SEQLENS = torch.tensor([0, 2, 5])
BAD = {
    "x must have shape": {"x": torch.zeros(2, 3, 4)},
    "B must have shape": {"B": torch.zeros(1, 4, 2, 5)},
    "heads of x cannot be divided": {"B": torch.zeros(1, 5, 3, 5), "C": torch.zeros(1, 5, 3, 5)},
    "dt must have shape": {"dt": torch.zeros(1, 5, 3)},
    "A must have shape": {"A": torch.zeros(1)},
    "C must have shape": {"C": torch.zeros(1, 5, 2, 4)},
    "D must have shape": {"D": torch.zeros(3)},
    "z must have shape": {"z": torch.zeros(1, 5, 4, 2)},
    "dt_bias must have shape": {"dt_bias": torch.zeros(5)},
    "initial_states must have shape": {"initial_states": torch.zeros(1, 4, 3, 4)},
    "seq_idx must have shape": {"seq_idx": torch.zeros(1, 4, dtype=torch.int64)},
    "seq_idx must be of an integer dtype": {"seq_idx": torch.zeros(1, 5)},
    "seq_idx does not go with cu_seqlens": {"cu_seqlens": CU_SEQLENS, "seq_idx": torch.zeros(1, 5, dtype=torch.int64)},
    "initial_states does not go with cu_seqlens": {"cu_seqlens": CU_SEQLENS, "initial_states": torch.zeros(1, 4, 3, 5)},
    "cu_seqlens must have shape": {"cu_seqlens": CU_SEQLENS[:1]},
    "cu_seqlens must be int32 or int64": {"cu_seqlens": CU_SEQLENS.double()},
    "cu_seqlens must be a tensor of int32 or int64, not list": {"cu_seqlens": [0, 5]},
    "cu_seqlens is on meta": {"cu_seqlens": CU_SEQLENS.to("meta")},
    "cu_seqlens must begin with 0.*; it goes from 1 to 5": {"cu_seqlens": CU_SEQLENS.clamp(min=1)},
    "end with 5, .*; it goes from 0 to 4": {"cu_seqlens": CU_SEQLENS.clamp(max=4)},
    "its smallest step is -1": {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
    "dt must be of a floating-point dtype": {"dt": torch.zeros(1, 5, 4, dtype=torch.int64)},
    "B must have the dtype of x": {"B": torch.zeros(1, 5, 2, 5).double()},
    "D is on meta": {"D": torch.zeros(4, device="meta")},
    "chunk_size must be a positive integer": {"chunk_size": 0},
    "dt_limit must be": {"dt_limit": (1.0, 0.5)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_argument_is_named(message):
    arguments = {"x": torch.zeros(1, 5, 4, 3), "dt": torch.zeros(1, 5, 4), "A": torch.zeros(4), "chunk_size": 4}
    arguments |= {"B": torch.zeros(1, 5, 2, 5), "C": torch.zeros(1, 5, 2, 5)}
    ssd(**arguments)
    with pytest.raises(ValueError, match=message):
        ssd(**(arguments | BAD[message]))


FAST_SHAPES = [(2, 70, 6, 4, 3, 5), (1, 1, 2, 3, 1, 2), (1, 129, 4, 8, 4, 142), (3, 33, 3, 5, 1, 1)]
FAST_CASES = {
    "plain": {"optional": ()},
    "everything": {"optional": NAMES[5:], "documents": True, "D_per_channel": True},
    "documents": {"optional": ("D", "dt_bias"), "documents": True},
    "initial states": {"optional": ("D", "initial_states")},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", FAST_SHAPES)
@pytest.mark.parametrize("case", FAST_CASES)
def test_the_fast_form_equals_the_recurrence(monkeypatch, case, shape, dtype):
    """Values and all gradients, in several blocks of chunks, the last of them partly padding."""
    monkeypatch.setattr(fusion, "CACHED_ELEMENTS", 3 * shape[2] * 16 * 16)
    settings = dict(FAST_CASES[case])
    options = {"chunk_size": 16, "dt_limit": (0.01, 1.5)}
    if settings.pop("documents", False):
        options["seq_idx"] = documents(*shape[:2])
    inputs = {name: t.to(dtype) for name, t in make_inputs(*shape, **settings).items()}
    actual = run(ssd, inputs, **options)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    expected = run(ssd, {name: t.double() for name, t in inputs.items()}, **options)
    checks.assert_close(actual, expected, {torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype])


def test_the_fast_form_repeats_its_bits():
    inputs = make_inputs(1, 200, 4, 8, 2, 16, dtype=torch.float32)
    first, second = (run(ssd, inputs, chunk_size=64) for _ in range(2))
    checks.assert_same_bits(first, second)


def test_the_registered_op_has_the_outputs_it_announces():
    inputs = make_inputs(1, 20, 4, 3, 2, 5, D_per_channel=True)
    x, dt, B, C, D, initial = (inputs[name] for name in ("x", "dt", "B", "C", "D", "initial_states"))
    logarithms = dt.detach().neg().requires_grad_()
    torch.library.opcheck(forward_op, (x, dt, logarithms, B, C, D, initial, documents(1, 20), 16))
