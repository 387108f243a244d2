"""The Triton kernels of ssd: in the interpreter where there is no GPU, compiled where there is one.

Rule for every value and gradient: the error against the float64 recurrence is at most twice that of the plain torch
backend in the same dtype (with a floor of a few roundings for quantities that torch gets exactly right).
"""

import pytest
import torch

from mamba2.ops import ssd
from tests.ops.test_ssd import NAMES, documents, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def errors(actual: dict, expected: dict) -> dict[str, float]:
    return {
        name: ((actual[name].double() - value).norm() / value.norm().clamp(min=1e-12)).item()
        for name, value in expected.items()
    }


def check(monkeypatch, inputs: dict, **options) -> None:
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    results = {}
    for backend, tensors in (("reference", wide), ("torch", inputs), ("triton", inputs)):
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        results[backend] = run(ssd, tensors, chunk_size=64, **options)
    theirs = errors(results["torch"], results["reference"])
    ours = errors(results["triton"], results["reference"])
    floor = FLOOR[inputs["x"].dtype]
    worse = {name: (ours[name], theirs[name]) for name in ours if not ours[name] <= max(2 * theirs[name], floor)}
    assert not worse


SHAPES = [(16, 1, 4, 16, 1, 16), (2, 17, 3, 32, 1, 16), (1, 70, 4, 48, 2, 142), (1, 130, 2, 64, 2, 128)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_with_everything(monkeypatch, shape, dtype):
    inputs = make_inputs(*shape, dtype=dtype, D_per_channel=True)
    inputs = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
    check(monkeypatch, inputs, seq_idx=documents(*shape[:2]).to(DEVICE), dt_limit=(0.01, 1.0))


@pytest.mark.parametrize("optional", [(), ("D", "dt_bias"), ("z",), ("initial_states",)])
def test_what_is_not_given_is_left_out(monkeypatch, optional):
    inputs = make_inputs(1, 37, 3, 16, 1, 16, dtype=torch.float32, optional=optional)
    check(monkeypatch, {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()})


@pytest.mark.parametrize("gradient_of", ["states", "y"])
def test_one_result_alone_can_carry_the_gradient(monkeypatch, gradient_of):
    inputs = make_inputs(1, 20, 2, 16, 1, 16, dtype=torch.float32, optional=("dt_bias",))
    gradients = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        moved = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
        y, states = ssd(**moved, chunk_size=8, return_final_states=True)
        chosen = y if gradient_of == "y" else states
        gradients.append(torch.autograd.grad(chosen.square().sum(), list(moved.values()), allow_unused=True))
    for name, a, b in zip(moved, *gradients):
        a, b = (torch.zeros_like(moved[name]) if g is None else g for g in (a, b))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_sequential_and_chunk_parallel_forms_agree(monkeypatch):
    from mamba2.ops.ssd import triton_op

    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 300, 2, 16, 1, 16, dtype=torch.float32)
    inputs = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
    results = []
    for count in (1, 10_000):
        monkeypatch.setattr(triton_op, "multiprocessors", lambda device, count=count: count)
        results.append(run(ssd, inputs, chunk_size=64, seq_idx=documents(1, 300).to(DEVICE)))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=2e-4, atol=2e-4, msg=name)


def test_repeated_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(2, 33, 4, 16, 2, 16, dtype=torch.bfloat16)
    inputs = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
    first, second = (run(ssd, inputs, chunk_size=64) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("step", [1e-8, 50.0, 1e4])
def test_extreme_steps_stay_finite(monkeypatch, step):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 70, 2, 16, 1, 16, dtype=torch.float32, optional=())
    with torch.no_grad():
        inputs["dt"].fill_(step)
    inputs = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
    y = ssd(**inputs, chunk_size=32)
    gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_any_strides_give_the_same(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = {k: v.detach().to(DEVICE) for k, v in make_inputs(2, 19, 4, 16, 2, 16, dtype=torch.float32).items()}
    strange = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in inputs.items()}
    torch.testing.assert_close(ssd(**strange, chunk_size=8), ssd(**inputs, chunk_size=8), rtol=0, atol=0)


def test_float64_is_refused(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(1, 3, 2, 16, 1, 16).items() if name in NAMES}
    with pytest.raises(ValueError, match="or float16, not torch"):
        ssd(**inputs, chunk_size=8)


def test_no_graph_break(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 20, 2, 16, 1, 16, dtype=torch.float32)
    inputs = {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    expected, actual = run(ssd, inputs, chunk_size=8), run(compiled, inputs, chunk_size=8)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])
