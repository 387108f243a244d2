"""The Triton kernels of ssd: in the interpreter where there is no GPU, compiled where there is one.

Rule for every value and gradient: the error against the float64 recurrence is at most twice that of the plain torch
form (`chunked.py`) in the same dtype (with a floor of a few roundings for quantities that torch gets exactly right).
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from benchmarks.pretend import multiprocessors
from mamba2 import Mamba2Config, Mamba2LM
from mamba2.ops import autotune, ssd
from mamba2.ops.ssd import IMPLEMENTATIONS
from mamba2.ops.ssd import op as ssd_op
from mamba2.ops.ssd.chunked import ssd_chunked
from tests.ops.kernel_checks import check_registration
from tests.ops.test_ssd import (
    MAMBA_SSM_CASES,
    NAMES,
    assert_close,
    documents,
    make_inputs,
    mamba_ssm_inputs,
    run,
)
from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def errors(actual: dict, expected: dict) -> dict[str, float]:
    return {
        name: ((actual[name].double() - value).norm() / value.norm().clamp(min=1e-12)).item()
        for name, value in expected.items()
    }


def check(monkeypatch, inputs: dict, **options) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", ssd_chunked)  # the plain form, not the fast one
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


def on_device(inputs: dict) -> dict:
    return {name: tensor.detach().to(DEVICE).requires_grad_() for name, tensor in inputs.items()}


# (b, l, h, p, g, n): nothing divides anything; lengths of one token, of more than one span of 128 and of 256 tokens;
# heads that share a group by 1, 3, 4 and 9; one to three tiles of channels; d_state in one tile and in two.
SHAPES = [
    (16, 1, 4, 16, 1, 16),
    (2, 17, 3, 32, 1, 16),
    (1, 70, 4, 48, 2, 142),
    (1, 130, 2, 64, 2, 128),
    (1, 257, 9, 16, 1, 24),
    (1, 33, 3, 80, 3, 256),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_with_everything(monkeypatch, shape, dtype):
    inputs = on_device(make_inputs(*shape, dtype=dtype, D_per_channel=True))
    check(monkeypatch, inputs, seq_idx=documents(*shape[:2]).to(DEVICE), dt_limit=(0.01, 1.0))


def test_values_and_gradients_in_float16(monkeypatch):
    check(monkeypatch, on_device(make_inputs(1, 40, 3, 16, 1, 20, dtype=torch.float16, optional=("D", "dt_bias"))))


@pytest.fixture
def pretend():
    """Of a device with so many multiprocessors; with 10 000 every sequence is cut, and every group shared out."""
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(multiprocessors(count))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 200, 2, 16, 1, 16), (1, 220, 4, 16, 1, 16)])
def test_many_segments(monkeypatch, pretend, shape):
    """Few programs: what each segment adds to the state first, then all segments at once, in both directions."""
    pretend(10_000)
    inputs = on_device(make_inputs(*shape, dtype=torch.float32))
    check(monkeypatch, inputs, seq_idx=documents(*shape[:2]).to(DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("case", MAMBA_SSM_CASES)
def test_equals_mamba_ssm(monkeypatch, case):
    """Values and all gradients against its Triton kernels, float32."""
    inputs, options = mamba_ssm_inputs(case)
    with mamba_ssm_environment():
        expected = run(mamba_ssm_scan(), on_device(inputs), **options)
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    assert_close(run(ssd, on_device(inputs), **options), expected, 1e-4)


def test_gates_and_steps_clamped_at_both_ends(monkeypatch):
    """Where the clamp is active the gradient of dt stops, at the very limits it does not."""
    inputs = on_device(make_inputs(1, 40, 2, 16, 1, 16, dtype=torch.float32, optional=("z",)))
    with torch.no_grad():
        inputs["dt"][0, 3:9] = -30.0
        inputs["dt"][0, 9:15] = 30.0
    check(monkeypatch, inputs, dt_limit=(0.1, 0.9))


@pytest.mark.parametrize("optional", [(), ("D", "dt_bias"), ("z",), ("initial_states",)])
def test_what_is_not_given_is_left_out(monkeypatch, optional):
    inputs = make_inputs(1, 37, 3, 16, 1, 16, dtype=torch.float32, optional=optional)
    check(monkeypatch, on_device(inputs))


@pytest.mark.parametrize("gradient_of", ["states", "y"])
def test_one_result_alone_can_carry_the_gradient(monkeypatch, gradient_of):
    inputs = make_inputs(1, 20, 2, 16, 1, 16, dtype=torch.float32, optional=("dt_bias",))
    gradients = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        moved = on_device(inputs)
        y, states = ssd(**moved, chunk_size=8, return_final_states=True)
        chosen = y if gradient_of == "y" else states
        gradients.append(torch.autograd.grad(chosen.square().sum(), list(moved.values()), allow_unused=True))
    for name, a, b in zip(moved, *gradients):
        a, b = (torch.zeros_like(moved[name]) if g is None else g for g in (a, b))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_one_segment_and_many_agree(monkeypatch, pretend):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 300, 2, 16, 1, 16, dtype=torch.float32)
    inputs = on_device(inputs)
    results = []
    for count in (1, 10_000):
        pretend(count)
        results.append(run(ssd, inputs, chunk_size=64, seq_idx=documents(1, 300).to(DEVICE)))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=2e-4, atol=2e-4, msg=name)


def test_repeated_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(2, 33, 4, 16, 2, 16, dtype=torch.bfloat16)
    inputs = on_device(inputs)
    first, second = (run(ssd, inputs, chunk_size=64) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("step", [1e-8, 50.0, 1e4])
def test_extreme_steps_stay_finite(monkeypatch, step):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 70, 2, 16, 1, 16, dtype=torch.float32, optional=())
    with torch.no_grad():
        inputs["dt"].fill_(step)
    inputs = on_device(inputs)
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
    inputs = on_device(inputs)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    expected, actual = run(ssd, inputs, chunk_size=8), run(compiled, inputs, chunk_size=8)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def everything(shape=(2, 70, 4, 24, 2, 20), dtype=torch.bfloat16) -> tuple[dict, dict]:
    inputs = on_device(make_inputs(*shape, dtype=dtype, D_per_channel=True))
    return inputs, {"chunk_size": 64, "seq_idx": documents(*shape[:2]).to(DEVICE), "dt_limit": (0.01, 1.0)}


def values_and_gradients(inputs: dict, options: dict, states: bool) -> dict[str, torch.Tensor]:
    """As `run`, or without a state before the sequence and without a gradient of the one after it."""
    if states:
        return run(ssd, inputs, **options)
    inputs = {name: tensor for name, tensor in inputs.items() if name != "initial_states"}
    y = ssd(**inputs, dt_softplus=True, **options)
    return {"y": y, **dict(zip(inputs, torch.autograd.grad(y.square().sum(), list(inputs.values()))))}


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("count", [1, 10_000])
def test_nothing_unwritten_is_read(monkeypatch, pretend, count, states):
    """Outputs and workspaces start as NaN (or as a document that there is not) and end as if they had not."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    pretend(count)
    inputs, options = everything((1, 150, 2, 24, 2, 20))
    expected = values_and_gradients(inputs, options, states)
    plain = torch.Tensor.new_empty
    poison = {True: float("nan"), False: 1 << 30}
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: (t := plain(*a, **k)).fill_(poison[t.is_floating_point()])
    )
    actual = values_and_gradients(inputs, options, states)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.skipif(DEVICE == "cuda", reason="addresses are recorded by the interpreter, which a GPU does not use")
@pytest.mark.parametrize("count", [1, 10_000])
@pytest.mark.parametrize("states", [True, False])
def test_no_address_is_written_by_two_programs(monkeypatch, pretend, count, states):
    from benchmarks.interpreter import record

    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    pretend(count)
    inputs, options = everything((1, 150, 2, 24, 1, 20))
    with record(keep_stores=True) as launches:
        values_and_gradients(inputs, options, states)
    assert [launch.name for launch in launches if launch.shared_stores()] == []
    # Segments: two more in each direction; heads of a group shared out: sums of dB and of dC.
    assert len(launches) == (7 if count == 1 else 13)


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's operations are told apart from the interpreter's own")
def test_torch_runs_nothing_between_the_launches(monkeypatch):
    """Neither around the custom operations nor, calling what they wrap, inside: they allocate and launch."""
    from benchmarks.interpreter import torch_operations

    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = on_device(make_inputs(1, 40, 2, 24, 2, 20, torch.bfloat16, ("D", "dt_bias", "initial_states")))
    monkeypatch.setattr(ssd_op, "_forward", ssd_op._forward_op._init_fn)
    with torch.no_grad(), torch_operations() as outside:
        ssd(**inputs, chunk_size=64, dt_softplus=True)
    assert outside == []
    arguments = [inputs.get(name) for name in NAMES if name != "z"]
    flags = (True, 0.0, float("inf"))
    _, _, *kept = ssd_op._forward_op(*arguments, None, *flags, False)
    with torch_operations() as inside:
        ssd_op._backward_op._init_fn(inputs["x"].detach(), None, kept, [*arguments, None], *flags)
    assert inside == []
    with torch_operations() as something:
        inputs["x"].sum()
    assert len(something) == 1


def test_strides_past_two_to_the_31(monkeypatch):
    """Tokens so far apart that an offset inside one chunk needs 64 bits. The memory between them is never touched."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs, _ = everything((1, 20, 1, 16, 1, 16))
    options = {"chunk_size": 64}
    expected = run(ssd, inputs, **options)
    for name in ("x", "B"):
        near = inputs[name]
        far = torch.empty_strided(near.shape, (2**31, 2**27, 16, 1), dtype=near.dtype, device=DEVICE)
        inputs[name] = far.copy_(near.detach()).requires_grad_()
    actual = run(ssd, inputs, **options)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_documents_equal_sequences_run_one_by_one(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 200, 2, 16, 1, 16, dtype=torch.float32, optional=("D", "dt_bias"))
    inputs = {name: tensor.detach().to(DEVICE) for name, tensor in inputs.items()}
    cuts = [0, 3, 4, 40, 41, 129, 200]  # several in one chunk, one token alone, one across the end of a span
    seq_idx = torch.cat(
        [torch.full((1, b - a), 7 * (i % 2)) for i, (a, b) in enumerate(itertools.pairwise(cuts))], dim=1
    )
    together = ssd(**inputs, chunk_size=8, seq_idx=seq_idx.to(DEVICE), dt_softplus=True)
    for start, stop in itertools.pairwise(cuts):
        part = {k: v[:, start:stop] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        alone = ssd(**part, chunk_size=8, dt_softplus=True)
        torch.testing.assert_close(together[:, start:stop], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [19, 128])
def test_the_final_state_of_one_half_starts_the_other(monkeypatch, cut):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(1, 150, 2, 16, 1, 16, dtype=torch.float32, optional=("D",))
    inputs = {name: tensor.detach().to(DEVICE) for name, tensor in inputs.items()}
    options = {"chunk_size": 8, "return_final_states": True, "dt_softplus": True}
    whole, last = ssd(**inputs, **options)
    first = {k: v[:, :cut] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    second = {k: v[:, cut:] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    y1, state = ssd(**first, **options)
    y2, end = ssd(**second, **options, initial_states=state)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="what a GPU does with float32 is not recorded; the interpreter's is")
@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_follow_torchs_setting(monkeypatch, setting, expected):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.detach() for t in make_inputs(1, 5, 2, 16, 1, 16, dtype=dtype, optional=()).values()]
        plan = ssd_op._Plan(*ssd_op._sizes(inputs[0], inputs[3], None))
        assert plan.precision == (expected if dtype == torch.float32 else "ieee")


def test_operations_are_registered_as_torch_compile_needs_them():
    inputs = on_device(make_inputs(1, 20, 2, 16, 1, 16, torch.bfloat16, ("D", "dt_bias", "initial_states")))
    arguments = [*inputs.values(), documents(1, 20).to(DEVICE)]
    check_registration(ssd_op._forward_op, *arguments, True, 0.0, 1.0, True)
    _, _, *kept = (t.detach() for t in ssd_op._forward_op(*arguments, True, 0.0, 1.0, True))
    tensors = [t.detach() for t in arguments]
    check_registration(ssd_op._backward_op, tensors[0], None, kept, tensors, True, 0.0, 1.0)


def test_activation_checkpointing_gives_the_same_bits(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs, options = everything((1, 40, 2, 16, 1, 16))

    def checkpointed(**arguments):
        return checkpoint(ssd, **arguments, use_reentrant=False)

    expected, actual = run(ssd, inputs, **options), run(checkpointed, inputs, **options)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_a_sharded_model_runs_through_the_kernels(monkeypatch):
    """fully_shard on a mesh of one: parameters arrive as DTensors and must have become tensors before the kernels."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    config = Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=2,
        head_dim=16,
        state_size=16,
        n_groups=1,
        expand=2,
    )
    ids = torch.arange(20, device=DEVICE).view(1, 20) % 32
    losses = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            model = Mamba2LM(config).to(DEVICE)
            if sharded:
                for layer in model.backbone.layers:
                    fully_shard(layer, mesh=init_device_mesh(DEVICE, (1,)))
                fully_shard(model, mesh=init_device_mesh(DEVICE, (1,)))
            loss = model(ids, ids)
            loss.backward()
            gradient = model.backbone.layers[0].mixer.dt_bias.grad
            losses.append((loss.detach(), gradient.full_tensor() if sharded else gradient))
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(*losses))


def test_autotuning_measures_once_and_remembers(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = on_device(make_inputs(1, 20, 2, 16, 1, 16, dtype=torch.float32, optional=("D",)))
    expected = run(ssd, inputs, chunk_size=8)
    monkeypatch.setenv("MAMBA2_AUTOTUNE", "1")
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path))
    measured = []
    plain = autotune._seconds
    monkeypatch.setattr(autotune, "_seconds", lambda *a: measured.append(a[0]) or plain(*a))
    for _ in range(2):
        actual = run(ssd, inputs, chunk_size=8)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    assert len(measured) == 4 + 2 * 5  # walk, states and gradient, each with its neighbours, in the first run only
    kept = json.loads((tmp_path / "autotune.json").read_text())
    assert sorted(key.split(",")[0] for key in kept) == ["ssd gradient", "ssd states", "ssd walk"]
    (tmp_path / "autotune.json").write_text("{")
    with pytest.raises(ValueError, match=r"autotune.json is not the JSON .* delete it"):
        ssd(**inputs, chunk_size=8)


@pytest.mark.parametrize("choice", range(5))
def test_every_launch_that_autotuning_tries_gives_the_same(monkeypatch, choice):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = on_device(make_inputs(1, 20, 2, 32, 1, 16, dtype=torch.float32, optional=("D",)))
    expected = run(ssd, inputs, chunk_size=8)
    monkeypatch.setenv("MAMBA2_AUTOTUNE", "1")
    monkeypatch.setattr(ssd_op, "fastest", lambda key, candidates, start: candidates[min(choice, len(candidates) - 1)])
    actual = run(ssd, inputs, chunk_size=8)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_segments_are_as_many_as_shorten_the_longest_chain(monkeypatch):
    """Of walks that fill a device one, of few so many that all run at once; never more than there are chunks."""
    assert ssd_op.choose_segments(1, 12, 264) == 1  # two more launches would take longer
    monkeypatch.setattr(ssd_op, "FEW_CHUNKS", 0)
    assert ssd_op.choose_segments(1000, 128, 264) == 1
    assert ssd_op.choose_segments(80, 128, 264) == 3
    assert ssd_op.choose_segments(128, 64, 264) == 1  # a second walk would read more than it shortens
    assert ssd_op.choose_segments(1, 5, 264) == 5
    for walks, chunks in itertools.product((1, 24, 80, 160, 264), (1, 2, 7, 32, 1024)):
        segments = ssd_op.choose_segments(walks, chunks, 264)
        assert 1 <= segments <= chunks
        length = -(-chunks // segments)
        assert (segments - 1) * length < chunks  # none is empty


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["study", "second"])
def test_every_kernel_compiles_for_every_target(shape):
    """No spills, no more shared memory than the device has, products by matrix instructions; in a process of its own,
    since kernels decorated for the interpreter cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--resources", shape]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
