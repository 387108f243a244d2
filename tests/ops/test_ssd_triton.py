"""The Triton kernels of ssd: in the interpreter where there is no GPU, compiled where there is one.

Rule for every value and gradient: the error against the float64 recurrence is at most twice that of the plain torch
form (`chunked.py`) in the same dtype (with a floor of a few roundings for quantities that torch gets exactly right).
"""

import itertools
import json
from collections.abc import Callable

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
from tests.ops import kernel_checks as checks
from tests.ops.test_ssd import MAMBA_SSM_CASES, NAMES, documents, make_inputs, mamba_ssm_inputs, part, run
from tests.oracles import mamba_ssm_environment, mamba_ssm_scan

DEVICE = checks.DEVICE
pytestmark = pytest.mark.usefixtures("triton_backend")


def make(*shape: int, dtype: torch.dtype = torch.float32, **settings) -> dict[str, torch.Tensor]:
    """As `make_inputs`, on the device; float32 unless said otherwise."""
    return {name: t.detach().to(DEVICE) for name, t in make_inputs(*shape, dtype=dtype, **settings).items()}


def op(**options) -> Callable:
    return lambda **inputs: ssd(
        **inputs, **{"chunk_size": 64, "dt_softplus": True, "return_final_states": True, **options}
    )


def check(monkeypatch, inputs: dict, **options) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "torch", ssd_chunked)  # the plain form, not the fast one
    checks.check_accuracy(monkeypatch, op(**options), inputs, exact="reference")


def everything(shape=(1, 20, 1, 16, 1, 16)) -> tuple[dict, dict]:
    """Inputs in bfloat16 and options, none left out."""
    seq_idx = documents(*shape[:2]).to(DEVICE)
    return make(*shape, dtype=torch.bfloat16, D_per_channel=True), {"seq_idx": seq_idx, "dt_limit": (0.01, 1.0)}


@pytest.mark.parametrize(
    ("dtype", "shape", "count", "merged"),
    [
        (torch.float32, (2, 1, 4, 16, 1, 16), 20, 1),  # one token; of three programs that share 4 heads one has none
        (torch.bfloat16, (5, 1, 3, 16, 1, 16), 1, 1),
        (torch.float32, (1, 37, 3, 40, 1, 40), 10, 5),  # 3 heads in two parts; 3 tiles of channels, two of d_state
        (torch.float32, (1, 259, 1, 16, 1, 24), 1, 1),  # a boundary at the 256 tokens of a program of the decays
        (torch.bfloat16, (1, 70, 2, 48, 2, 142), 1, 1),  # chunks of 32, an odd number of them
        (torch.bfloat16, (1, 150, 2, 80, 1, 128), 1, 16),  # chunks of 64
        (torch.bfloat16, (1, 33, 3, 16, 3, 256), 1, 4),  # the widest state
        (torch.float32, (1, 70, 2, 16, 1, 16), 3, 10),  # segments of 2, 2 and 1 chunks
        (torch.bfloat16, (2, 130, 2, 16, 1, 20), 10_000, 16),  # one chunk a segment, one head a program
    ],
)
def test_values_and_gradients_with_everything(monkeypatch, dtype, shape, count, merged):
    """Nothing divides anything. `count` is the multiprocessors that the launcher is told of: of one it cuts neither
    sequences into segments nor groups into parts, of very many all of them. Chunks of float32 are of 16 tokens, those
    of bfloat16 of 64 or 32; where documents are `merged`, states flow through whole chunks. A covering set: in the full
    product of shapes, dtypes and counts nothing else is walked."""
    inputs = make(*shape, dtype=dtype, D_per_channel=dtype == torch.bfloat16)
    seq_idx = (documents(*shape[:2]) // merged).to(DEVICE)
    with multiprocessors(count):
        check(monkeypatch, inputs, seq_idx=seq_idx, dt_limit=(0.01, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_in_one_document(monkeypatch, dtype):
    """Chunks of 64 with two tiles of d_state, which documents do not have."""
    check(monkeypatch, make(1, 70, 3, 16, 1, 40, dtype=dtype, optional=("D", "dt_bias")))


@pytest.mark.parametrize("count", [1, 64])
def test_values_and_gradients_of_transposed_products(monkeypatch, count):
    """What an A100 runs: tiles of 64 channels forward, two of 32 backward. As one segment, and as several."""
    monkeypatch.setattr(ssd_op, "target_of", lambda _: "sm_80")
    seq_idx = (documents(1, 420) // 16).to(DEVICE)
    inputs = make(1, 420, 2, 64, 1, 20, dtype=torch.bfloat16)
    with multiprocessors(count):
        plan = ssd_op._plan(*ssd_op._sizes(inputs["x"], inputs["B"], seq_idx))
        assert plan.table("walk").transposed and (plan.segments > 1) == (count == 64)
        check(monkeypatch, inputs, seq_idx=seq_idx)


@pytest.mark.slow
@pytest.mark.parametrize("case", MAMBA_SSM_CASES)
def test_equals_mamba_ssm(monkeypatch, case):
    """Values and all gradients of each backend against its Triton kernels, float32."""
    inputs, options = mamba_ssm_inputs(case)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    if options["seq_idx"] is not None:
        options["seq_idx"] = options["seq_idx"].to(DEVICE)
    with mamba_ssm_environment():
        expected = run(mamba_ssm_scan(), inputs, **options)
    for backend in IMPLEMENTATIONS:
        monkeypatch.setenv("MAMBA2_BACKEND", backend)
        checks.assert_close(run(ssd, inputs, **options), expected, 1e-4)


def test_gates_and_steps_clamped_at_both_ends(monkeypatch):
    """Where the clamp is active the gradient of dt stops, at the very limits it does not."""
    inputs = make(1, 20, 2, 16, 1, 16, optional=("z",))
    inputs["dt"][0, 3:9] = -30.0
    inputs["dt"][0, 9:15] = 30.0
    check(monkeypatch, inputs, dt_limit=(0.1, 0.9))


@pytest.mark.parametrize("optional", [(), ("D", "dt_bias"), ("z",), ("initial_states",)])
def test_what_is_not_given_is_left_out(monkeypatch, optional):
    check(monkeypatch, make(1, 37, 3, 16, 1, 16, optional=optional))


@pytest.mark.parametrize("gradient_of", [0, 1])
def test_one_result_alone_can_carry_the_gradient(monkeypatch, gradient_of):
    inputs = make(1, 20, 2, 16, 1, 16, optional=("dt_bias",))
    checks.check_accuracy(monkeypatch, lambda **tensors: op()(**tensors)[gradient_of], inputs)


@pytest.mark.parametrize("step", [1e-8, 50.0, 1e4])
def test_extreme_steps_stay_finite(step):
    inputs = make(1, 37, 2, 16, 1, 16, optional=())
    inputs["dt"].fill_(step)
    assert all(value.isfinite().all() for value in checks.run(op(dt_softplus=False), inputs).values())


def test_any_strides_give_the_same(monkeypatch):
    inputs = make(2, 17, 3, 16, 3, 16, optional=("D", "dt_bias", "initial_states"))
    checks.check_strides(monkeypatch, op(), inputs, ("x", "dt", "B", "C", "initial_states"))


def test_float64_is_refused():
    with pytest.raises(ValueError, match="or float16, not torch"):
        ssd(**make(1, 3, 2, 16, 1, 16, dtype=torch.float64), chunk_size=8)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("count", [1, 10_000])
def test_memory_that_nobody_wrote_is_not_read_and_none_is_written_twice(monkeypatch, count, states):
    """With segments and without; with states before and after the sequence and without."""
    inputs, options = everything((1, 150, 2, 24, 1, 20))
    if not states:
        del inputs["initial_states"]
    with multiprocessors(count):
        launches = checks.check_memory(monkeypatch, op(**options, return_final_states=states), inputs)
    # Segments: two more in each direction; heads of a group shared out: sums of dB and of dC.
    assert launches in (None, 7 if count == 1 else 13)


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's operations are told apart from the interpreter's own")
def test_torch_runs_nothing_between_the_launches(monkeypatch):
    """Neither around the custom operations nor, calling what they wrap, inside: they allocate and launch."""
    from benchmarks.interpreter import torch_operations

    inputs = make(1, 20, 2, 24, 2, 20, dtype=torch.bfloat16, optional=("D", "dt_bias", "initial_states"))
    monkeypatch.setattr(ssd_op, "_forward", ssd_op._forward_op._init_fn)
    with torch.no_grad(), torch_operations() as outside:
        ssd(**inputs, chunk_size=64, dt_softplus=True)
    assert outside == []
    arguments = [inputs.get(name) for name in NAMES if name != "z"]
    flags = (True, 0.0, float("inf"))
    _, _, *kept = ssd_op._forward_op(*arguments, None, *flags, False)
    with torch_operations() as inside:
        ssd_op._backward_op._init_fn(inputs["x"], None, kept, [*arguments, None], *flags)
    assert inside == []
    with torch_operations() as something:
        inputs["x"].sum()
    assert len(something) == 1


def test_strides_past_two_to_the_31():
    """Tokens so far apart that an offset inside one chunk needs 64 bits."""
    inputs, _ = everything()
    apart = {name: checks.far_apart(inputs[name], 1) for name in ("x", "B")}
    checks.assert_same_bits(checks.run(op(), {**inputs, **apart}), checks.run(op(), inputs))


def test_documents_equal_sequences_run_one_by_one():
    inputs = make(1, 50, 2, 16, 1, 16, optional=("D", "dt_bias"))
    cuts = [0, 3, 4, 21, 22, 33, 50]  # several in one chunk, one token alone, one across the end of a span
    lengths = torch.tensor(cuts).diff()
    seq_idx = (7 * (torch.arange(6) % 2)).repeat_interleave(lengths)[None].to(DEVICE)
    together = ssd(**inputs, chunk_size=8, seq_idx=seq_idx, dt_softplus=True)
    for start, stop in itertools.pairwise(cuts):
        alone = ssd(**part(inputs, start, stop), chunk_size=8, dt_softplus=True)
        torch.testing.assert_close(together[:, start:stop], alone, rtol=1e-5, atol=1e-5)


def test_documents_by_cu_seqlens_and_their_states_equal_the_recurrence_one_by_one(monkeypatch):
    inputs = make(1, 105, 2, 16, 1, 16, optional=("D", "dt_bias"))
    actual = checks.run(op(cu_seqlens=checks.cu_seqlens(torch.int32)), inputs)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    checks.assert_close(actual, checks.one_by_one(op(), exact, ("x", "dt", "B", "C")), 1e-5)


@pytest.mark.slow
def test_states_of_documents_equal_mamba_ssm():
    inputs = make(1, 105, 2, 16, 1, 16, optional=("D", "dt_bias"))
    cu_seqlens = checks.cu_seqlens(torch.int32).unique()  # no empty document there
    seq_idx = torch.arange(4, dtype=torch.int32, device=DEVICE).repeat_interleave(cu_seqlens.diff())[None]
    options = {"chunk_size": 16, "dt_softplus": True, "cu_seqlens": cu_seqlens}
    theirs = mamba_ssm_scan()(**inputs, **options, seq_idx=seq_idx, return_varlen_states=True)
    for ours, expected in zip(ssd(**inputs, **options, return_final_states=True), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [19, 32])
def test_the_final_state_of_one_half_starts_the_other(cut):
    inputs = make(1, 50, 2, 16, 1, 16, optional=("D",))
    whole, last = op()(**inputs)
    y1, state = op()(**part(inputs, 0, cut))
    y2, end = op()(**part(inputs, cut, 50), initial_states=state)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="what a GPU does with float32 is not recorded; the interpreter's is")
@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_follow_torchs_setting(monkeypatch, setting, expected):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(1, 5, 2, 16, 1, 16, dtype=dtype)
        plan = ssd_op._Plan(*ssd_op._sizes(inputs["x"], inputs["B"], None))
        assert plan.precision == (expected if dtype == torch.float32 else "ieee")


def test_operations_are_registered_as_torch_compile_needs_them():
    inputs = make(1, 20, 2, 16, 1, 16, dtype=torch.bfloat16, optional=("D", "dt_bias", "initial_states"))
    tensors = [*inputs.values(), documents(1, 20).to(DEVICE)]
    _, _, *kept = ssd_op._forward_op(*tensors, True, 0.0, 1.0, True)
    checks.check_registration(ssd_op._backward_op, tensors[0], None, kept, tensors, True, 0.0, 1.0)
    leaves = [tensor.requires_grad_() for tensor in tensors[:-1]]
    checks.check_registration(ssd_op._forward_op, *leaves, tensors[-1], True, 0.0, 1.0, True)


def test_activation_checkpointing_gives_the_same_bits():
    inputs, options = everything()

    def checkpointed(**arguments):
        return checkpoint(op(**options), **arguments, use_reentrant=False)

    checks.assert_same_bits(checks.run(checkpointed, inputs), checks.run(op(**options), inputs))


def test_a_sharded_model_runs_through_the_kernels():
    """fully_shard on a mesh of one: parameters arrive as DTensors and must have become tensors before the kernels."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "state_size": 16}
    config = Mamba2Config(vocab_size=32, n_groups=1, expand=2, **sizes)
    ids = torch.arange(20, device=DEVICE).view(1, 20) % 32
    losses = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            model = Mamba2LM(config).to(DEVICE)
            for module in (*model.backbone.layers, model) if sharded else ():
                fully_shard(module, mesh=init_device_mesh(DEVICE, (1,)))
            loss = model(ids, ids)
            loss.backward()
            gradient = model.backbone.layers[0].mixer.dt_bias.grad
            losses.append((loss.detach(), gradient.full_tensor() if sharded else gradient))
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(*losses))


def test_autotuning_measures_once_and_remembers(monkeypatch, tmp_path):
    inputs = make(1, 5, 1, 16, 1, 16, optional=("D",))
    expected = checks.run(op(), inputs)
    monkeypatch.setenv("MAMBA2_AUTOTUNE", "1")
    monkeypatch.setenv("MAMBA2_CACHE", str(tmp_path))
    measured = []
    plain = autotune._seconds
    monkeypatch.setattr(autotune, "_seconds", lambda *a: measured.append(a[0]) or plain(*a))
    for _ in range(2):
        checks.assert_close(checks.run(op(), inputs), expected, 1e-5)
    # walk, reverse, states and gradient, each with its neighbours, in the first run only
    assert len(measured) == 2 * 4 + 2 * 5
    kept = json.loads((tmp_path / "autotune.json").read_text())
    assert sorted(key.split(",")[0] for key in kept) == ["ssd gradient", "ssd reverse", "ssd states", "ssd walk"]
    (tmp_path / "autotune.json").write_text("{")
    with pytest.raises(ValueError, match=r"autotune.json is not the JSON .* delete it"):
        ssd(**inputs, chunk_size=8)


@pytest.mark.parametrize("choice", range(5))
def test_every_launch_that_autotuning_tries_gives_the_same(monkeypatch, choice):
    inputs = make(1, 20, 1, 32, 1, 16, optional=("D",))
    expected = checks.run(op(), inputs)
    monkeypatch.setenv("MAMBA2_AUTOTUNE", "1")
    monkeypatch.setattr(ssd_op, "fastest", lambda key, candidates, start: candidates[min(choice, len(candidates) - 1)])
    checks.assert_close(checks.run(op(), inputs), expected, 1e-5)


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


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs these kernels, but one program after the other")
@pytest.mark.parametrize("shape", [(16, 1024, 24, 32, 8, 142), (1, 16384, 24, 64, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_sequences_agree_with_torch_and_with_themselves(monkeypatch, shape, dtype):
    """Enough programs for one segment, and one long sequence for many; side by side."""
    inputs = make(*shape, dtype=dtype, optional=("D", "dt_bias"))
    first, second = (checks.run(op(), inputs) for _ in range(2))
    checks.assert_same_bits(first, second)
    monkeypatch.setenv("MAMBA2_BACKEND", "torch")
    expected = checks.run(op(), {name: tensor.double() for name, tensor in inputs.items()})
    checks.assert_close(first, expected, {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype])
