"""Several processes are one: the same losses, gradients and files, whatever the number of processes and the split."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba2.checkpoint.training_state import export_optimizer, read_state
from mamba2.cli import run
from mamba2.data import Tokens, Windows
from mamba2.distributed import World, full, parallelize
from mamba2.model import Mamba2LM
from mamba2.training import Job, RunFolder
from mamba2.training.step import accumulate_gradients, mean_loss
from tests import runs
from tests.distributed_runs import spawn, train
from tests.runs import contents, make_study, metrics, run_train
from tests.test_model import small_config
from train import main

PARALLEL = ("ddp", "fsdp")


def arguments(study: Path, output: Path, *options: object) -> list[str]:
    return runs.arguments(study, output, "--max-steps", 5, *options)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def whole(study):
    """The run of one process."""
    run_train(*arguments(study, study / "whole"))
    return study / "whole"


def losses(output: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in metrics(output, "loss")]


@pytest.fixture(scope="module")
def stopped(study):
    """Runs of two processes that were stopped in the middle of step 3 of 5, by a signal to the second one."""

    def stop(parallel: str):
        output = study / f"{parallel}-stopped"
        if not output.exists():
            command = arguments(study, output, "--parallel", parallel)
            assert spawn(train, 2, command, study / "cache", 3, 1) == [128 + signal.SIGTERM] * 2
        return output

    return stop


# ---------------------------------------------------------------------------------------------- losses, gradients


def step_windows() -> Windows:
    """Five full windows and one of three tokens: no number of processes divides their tokens evenly."""
    ids = (np.arange(16 * 5 + 4) * 7 % 61).astype(np.uint16)
    return Windows(Tokens(ids, np.array([0, 20, 21, 70]), eot_id=0, largest=60), length=16)


def write_gradients(file: Path, parallel: str, tied: bool) -> None:
    """Gradients, loss and evaluation of this process's world."""
    world = World.join()
    model = Mamba2LM(small_config(tie_word_embeddings=tied), seed=1).train()
    model.backbone.checkpoint_every = 2
    model.backbone.layers[1].keep_products_only = True
    windows = step_windows()
    wrapped = parallelize(model, world, parallel, torch.float32)
    loss, tokens = accumulate_gradients(wrapped, windows, list(range(6)), 1, torch.float32, world)
    assert tokens == 83
    evaluation = mean_loss(model, windows, 5, 2, torch.float32, world)
    tensors = {name: full(p.grad) for name, p in model.named_parameters()}
    if world.is_main:
        save_file({**tensors, "loss": torch.tensor(loss), "evaluation": torch.tensor(evaluation)}, file)
    world.leave()


@pytest.mark.parametrize(("parallel", "size", "tied"), [("ddp", 2, False), ("fsdp", 2, True), ("fsdp", 3, False)])
def test_loss_and_gradient_are_those_of_one_process(tmp_path, parallel, size, tied):
    write_gradients(tmp_path / "one", parallel, tied)
    assert spawn(write_gradients, size, tmp_path / "several", parallel, tied) == [0] * size
    expected, actual = load_file(tmp_path / "one"), load_file(tmp_path / "several")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        assert error < 1e-5, f"{name}: {error}"


def check_dtypes() -> None:
    """Of each parameter in the middle of a sharded block, and of its gradient."""
    world, seen = World.join(), {}
    model = Mamba2LM(small_config()).train()
    wrapped = parallelize(model, world, "fsdp", torch.bfloat16)
    mixer = model.backbone.layers[1].mixer
    mixer.out_proj.register_forward_pre_hook(
        lambda *_: seen.update({name: str(p.dtype) for name, p in mixer.named_parameters()})
    )
    accumulate_gradients(wrapped, step_windows(), list(range(6)), 2, torch.bfloat16, world)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    low = {name for name, dtype in seen.items() if dtype == "torch.bfloat16"}
    assert low == {"in_proj.weight", "out_proj.weight"}, seen
    assert {"dt_bias", "A_log", "D", "norm.weight"} <= seen.keys()
    world.leave()


def test_fsdp_gathers_projections_in_bfloat16_and_leaves_dt_A_and_norms_in_float32():
    assert spawn(check_dtypes, 2) == [0, 0]


def count_syncs() -> None:
    world, calls = World.join(), []
    model = Mamba2LM(small_config())
    wrapped = parallelize(model, world, "ddp", torch.float32)

    def hook(_, bucket):
        calls.append(1)
        # Waited for here: what is chained to it would need Python's lock in a thread of gloo's, when the group ends.
        torch.distributed.all_reduce(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    accumulate_gradients(wrapped, step_windows(), list(range(6)), 1, torch.float32, world)
    assert len(calls) == 1, f"{len(calls)} for 3 micro-batches of a model that is one bucket"
    world.leave()


def test_gradients_are_summed_after_the_last_micro_batch_only():
    assert spawn(count_syncs, 2) == [0, 0]


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_as_one_and_resume_to_the_bit(study, whole, stopped, tmp_path, parallel):
    """Stopped in the middle of step 3 by a signal to the second process, and gone on."""
    straight = study / f"{parallel}-straight"
    options = ["--parallel", parallel, "--keep", "2"]
    assert spawn(train, 2, arguments(study, straight, *options), study / "cache") == [0, 0]
    assert losses(straight) == pytest.approx(losses(whole), rel=1e-5)
    final = load_file(straight.with_name(straight.name + "-final") / "model.safetensors")
    for name, tensor in load_file(whole.with_name("whole-final") / "model.safetensors").items():
        torch.testing.assert_close(final[name], tensor, rtol=1e-4, atol=1e-5)

    output = shutil.copytree(stopped(parallel), tmp_path / "run", symlinks=True)
    assert read_state(output / "latest")["counters"]["step"] == 3
    assert spawn(train, 2, arguments(study, output, *options), study / "cache") == [0, 0]
    one, two = contents(straight), contents(output)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert not list(tmp_path.rglob("*.tmp")) and not list(study.glob(".*.tmp"))


def test_muon_of_shards_is_muon_of_whole_matrices_and_its_checkpoints_go_on_in_one_process(study, tmp_path):
    options = ("--optimizer", "muon", "--max-steps", 4)
    run_train(*arguments(study, tmp_path / "whole", *options))
    run = arguments(study, tmp_path / "run", *options)
    assert spawn(train, 2, [*run, "--parallel", "fsdp"], study / "cache", 2, 1) == [128 + signal.SIGTERM] * 2
    run_train(*run)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "size"),
    [("ddp", None, 1), ("ddp", "ddp", 3), ("ddp", "fsdp", 3), ("fsdp", None, 1), ("fsdp", "fsdp", 3)],
)
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_three(
    study, whole, stopped, tmp_path, before, after, size
):
    """The same next batch, and the same run; None is one process that torchrun did not start."""
    output = shutil.copytree(stopped(before), tmp_path / "run", symlinks=True)
    if after is None:
        run_train(*arguments(study, output))
    else:
        assert spawn(train, size, arguments(study, output, "--parallel", after), study / "cache") == [0] * size
    assert losses(output, "tokens") == losses(whole, "tokens")
    assert losses(output) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(output, "gradient_norm") == pytest.approx(losses(whole, "gradient_norm"), rel=1e-4)


def test_shards_are_safetensors_and_the_model_is_one_file(stopped):
    folder = stopped("fsdp") / "checkpoint-2"
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    shards = {name for name in files if name.startswith("optimizer/") and name.endswith(".safetensors")}
    others = {"model.safetensors", "config.json", "mamba2_tokenizer.json", "rng.safetensors", "trainer_state.json"}
    others |= {"README.md"}
    assert len(shards) == 2 and files == shards | others
    assert shards < read_state(folder)["files"].keys()
    assert set(load_file(folder / "rng.safetensors")) == {"cpu.0", "cpu.1"}
    Mamba2LM.from_pretrained(folder)


def test_the_moments_of_shards_are_exported_to_one_file(stopped, tmp_path):
    """They are what AdamW has in the run of copies, up to the order in which gradients are summed."""
    exported = tmp_path / "moments.safetensors"
    count = export_optimizer(stopped("fsdp") / "checkpoint-2", exported)
    expected = load_file(stopped("ddp") / "checkpoint-2" / "optimizer" / "moments.safetensors")
    moments = load_file(exported)
    assert moments.keys() == expected.keys() and len(moments) == count
    for name, tensor in expected.items():
        torch.testing.assert_close(moments[name], tensor, rtol=1e-4, atol=1e-7)
    with pytest.raises(FileExistsError, match=r"moments.safetensors exists already"):
        export_optimizer(stopped("fsdp") / "checkpoint-2", exported)
    with pytest.raises(ValueError, match="checkpoint-0 holds no moments"):
        export_optimizer(stopped("fsdp") / "checkpoint-0", tmp_path / "none.safetensors")


def test_an_error_of_the_first_process_ends_all(study, tmp_path):
    (tmp_path / "run").write_text("in the way")
    assert spawn(train, 2, arguments(study, tmp_path / "run"), study / "cache") == [1, 1]


def train_until_the_disk_is_full(command: list[str], cache: Path, errors: Path) -> None:
    """train.py by `command`; the limit on a file's size stands for a full disk, at rank 1's share of checkpoint-4."""
    sys.stderr = open(errors.with_suffix(f".{os.environ['RANK']}"), "w")  # noqa: SIM115 (until the process ends)
    original = Job.write_checkpoint

    def write(job: Job, folder: Path) -> None:
        if "checkpoint-4" in folder.name and job.world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        original(job, folder)

    Job.write_checkpoint = write
    sys.argv = ["train.py", *command]
    os.environ["MAMBA2_CACHE"] = str(cache)
    run(main)


def test_a_full_disk_ends_all_processes_in_a_sentence_and_costs_no_checkpoint(study, tmp_path):
    output, errors = tmp_path / "run", tmp_path / "errors"
    command = arguments(study, output, "--parallel", "fsdp")
    assert spawn(train_until_the_disk_is_full, 2, command, study / "cache", errors) == [1, 1]
    for rank in range(2):
        text = errors.with_suffix(f".{rank}").read_text()
        assert re.fullmatch(r"error: cannot write .*optimizer: process 1: .*File too large\n", text), text
    assert not list(tmp_path.rglob("*.tmp"))
    checkpoints = RunFolder(output).checkpoints()
    assert list(checkpoints) == [0, 2] and all(map(read_state, checkpoints.values()))


def test_fsdp_needs_torchrun_and_does_not_compile_whole(monkeypatch, capsys, tmp_path, study):
    for options, message in (
        ((), "torchrun --nproc-per-node"),
        (("--compile", "model"), "--compile model does not go"),
    ):
        with pytest.raises(SystemExit):
            run_train(*arguments(study, tmp_path / "run", "--parallel", "fsdp", *options))
        assert message in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.slow
def test_torchrun_starts_it_and_passes_signals_on(study, whole, tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(root / "train.py"), *arguments(study, tmp_path / "run", "--max-steps", 500, "--keep", 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.time() + 60
        while not (tmp_path / "run" / "checkpoint-10").exists() and time.time() < deadline:
            time.sleep(0.05)
        process.terminate()
        output = process.communicate(timeout=60)[0].decode()
    assert "stopped by SIGTERM at step" in output, output
    step = read_state(tmp_path / "run" / "latest")["counters"]["step"]
    assert f"at step {step} of 500" in output
