"""Resuming: to the bit, from the last whole checkpoint, and only what is the same run."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from mamba2.checkpoint.training_state import STATE, DamagedCheckpoint, read_state
from mamba2.training import OPTIMIZERS, RunFolder
from tests.runs import arguments, contents, interrupt_after, metrics, run_train

MOMENTS = "optimizer/moments.safetensors"


@pytest.fixture(scope="module")
def whole(study):
    """A run of 8 steps that nothing interrupted."""
    run_train(*arguments(study, study / "whole"))
    return study / "whole"


@pytest.fixture(scope="module")
def kept(study):
    """The same with two checkpoints kept."""
    run_train(*arguments(study, study / "kept", "--keep", 2))
    return study / "kept"


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that run without its final model, where `run` goes on."""
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


def assert_same_files(one: Path, two: Path) -> None:
    """As `contents` has them; names those that differ."""
    one, two = contents(one), contents(two)
    assert [name for name in {**one, **two} if one.get(name) != two.get(name)] == []


# ------------------------------------------------------------------------------------------------------ to the bit


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_run_in_two_parts_is_the_run_in_one_in_every_bit(run, kept, tmp_path, monkeypatch, steps):
    """Stopped in the middle of step 1, 3 or 4 of 8: at the checkpoint of another step, and of its own."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        interrupt_after(patch, steps)
        run("--keep", 2)
    assert exit.value.code == 128 + signal.SIGTERM
    assert os.readlink(tmp_path / "run" / "latest") == f"checkpoint-{steps}"
    assert len(contents(kept)) > 15
    assert_same_files(run("--keep", 2), kept)


def stop_and_resume(run, tmp_path, monkeypatch, flag: str, value: str, default: str) -> Path:
    """The last checkpoint of a run that was stopped in step 3 and went on: equal to the whole run, refused without the
    flag."""
    options = flag, value, "--keep", 2
    run(*options, into="whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(patch, 3)
        run(*options)
    with pytest.raises(ValueError, match=f"{flag} was '{value}' and is '{default}'"):
        run()
    assert_same_files(run(*options), tmp_path / "whole")
    return tmp_path / "run" / "latest"


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_every_optimizer_resumes_to_the_bit(run, tmp_path, monkeypatch, optimizer):
    """AdamW does in the tests above. Something is kept of each parameter, and another optimizer is refused."""
    latest = stop_and_resume(run, tmp_path, monkeypatch, "--optimizer", optimizer, "adamw")
    stored, weights = load_file(latest / MOMENTS), load_file(latest / "model.safetensors")
    assert {name.partition(".")[2] for name in stored} == set(weights)


@pytest.mark.parametrize("kind", ["passed", "noise", "continued"])
def test_initial_states_resume_to_the_bit(run, tmp_path, monkeypatch, kind):
    latest = stop_and_resume(run, tmp_path, monkeypatch, "--initial-state", kind, "zero")
    assert (latest / "states.safetensors").is_file()


def test_every_signal_stops_with_a_checkpoint_and_its_own_code(study, tmp_path, monkeypatch):
    for number in (signal.SIGINT, signal.SIGUSR1):
        output, before = tmp_path / str(number), signal.getsignal(number)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
            interrupt_after(patch, 3, number)
            run_train(*arguments(study, output))
        assert exit.value.code == 128 + number
        assert read_state(output / "checkpoint-3")["counters"]["step"] == 3
        assert signal.getsignal(number) is before


def test_a_second_sigint_stops_at_once(run, monkeypatch):
    def step(job, index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(train.Job, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run()


def test_a_signal_in_the_middle_of_a_save_lets_it_finish(run, whole, tmp_path, monkeypatch):
    original = train.Job.write_checkpoint

    def write(job, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        original(job, folder)
        assert folder.name.startswith(".checkpoint-")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Job, "write_checkpoint", write)
        run()
    assert list(RunFolder(tmp_path / "run").checkpoints()) == [0, 1]
    run()
    assert contents(tmp_path / "run")["-final/model.safetensors"] == contents(whole)["-final/model.safetensors"]


def test_metrics_after_the_checkpoint_are_dropped_and_no_step_counts_twice(run, whole, finished):
    for step in (6, 8):
        shutil.rmtree(finished / f"checkpoint-{step}")
    with open(finished / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run()
    assert metrics(finished) == metrics(whole)
    assert [row["step"] for row in metrics(finished, "loss")] == list(range(1, 9))


def test_seconds_go_on_from_where_they_were(run, finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "seconds": 1000.0 + row["seconds"]} if "seconds" in row else row for row in rows]
    (finished / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(finished / "checkpoint-8")
    run()
    seconds = [json.loads(line).get("seconds") for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert 1000 < [s for s in seconds if s][-1] < 2000


# ---------------------------------------------------------------------------------------------- which checkpoint


def test_resume_none_refuses_and_overwrite_begins_anew(study, whole, finished, capsys):
    command = arguments(study, finished, "--resume", "none")
    with pytest.raises(FileExistsError, match="--resume auto goes on from the last"):
        run_train(*command)
    (finished / "checkpoint-100").mkdir()
    run_train(*command, "--overwrite")
    assert "resumed" not in capsys.readouterr().out
    assert_same_files(finished, whole)
    run_train(*command)
    assert "is not trained again" in capsys.readouterr().out


def test_resume_from_a_path_goes_on_from_there(run, study, whole, finished, tmp_path, capsys):
    run("--resume", finished / "checkpoint-6", into="branch")
    assert "step 6 of 8" in capsys.readouterr().out
    assert contents(tmp_path / "branch")["-final/model.safetensors"] == contents(whole)["-final/model.safetensors"]
    assert [row["step"] for row in metrics(tmp_path / "branch", "loss")] == [7, 8]
    earlier = arguments(study, finished, "--resume", finished / "checkpoint-4")
    with pytest.raises(FileExistsError, match=r"later checkpoints \(\[6, 8\]\)"):
        run_train(*earlier)
    run_train(*earlier, "--overwrite")
    assert metrics(finished) == metrics(whole)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run("--resume", tmp_path / "absent", into="other")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", truncate, "model.safetensors has"),
        (MOMENTS, flip_a_bit, f"the contents of {MOMENTS} have changed"),
        ("config.json", Path.unlink, "config.json is missing"),
        (STATE, truncate, STATE),
        (STATE, Path.unlink, f"holds no {STATE}"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(
    run, whole, finished, capsys, name, damage, message
):
    if damage is truncate and name == STATE:
        (finished / "checkpoint-8" / STATE).write_text("{")
    else:
        damage(finished / "checkpoint-8" / name)
    with pytest.raises(DamagedCheckpoint, match=message):
        run("--resume", finished / "checkpoint-8")
    run()
    output = capsys.readouterr().out
    assert "warning: " in output and message in output and "step 6 of 8" in output
    assert (finished / "damaged-checkpoint-8").is_dir()
    shutil.rmtree(finished / "damaged-checkpoint-8")
    assert_same_files(finished, whole)


def test_when_no_checkpoint_is_whole_the_run_does_not_begin_anew_by_itself(run, finished):
    for folder in finished.glob("checkpoint-*"):
        truncate(folder / "model.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole"):
        run()
    assert len(list(finished.glob("checkpoint-*"))) == 5


# ------------------------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "1e-3"], "--learning-rate was 0.0005 and is 0.001"),
        (["--weight-decay", "0.1"], "--weight-decay was"),
        (["--decay", "all_but_biases"], "--decay was"),
        (["--betas", "0.9", "0.95"], "--betas was"),
        (["--eps", "1e-7"], "--eps was"),
        (["--clip", "2"], "--clip was"),
        (["--seed", "1"], "--seed was 2163 and is 1"),
        (["--max-length", "16"], "--max-length was 32 and is 16"),
        (["--no-reset"], "--no-reset was False and is True"),
        (["--dtype", "bf16"], "--dtype was 'float32' and is 'bfloat16'"),
        (["--batch-size", "3"], "windows per step was 4 and is 6"),
        (["--eval-windows", "4"], "--eval-windows was"),
        (["--max-steps", "20"], "steps was 8 and is 20"),
        (["--schedule", "linear"], "kind was cosine and is linear"),
        (["--warmup-steps", "3"], "warmup_steps was 2 and is 3"),
    ],
)
def test_an_option_that_makes_it_another_run_is_refused_by_name(run, finished, options, message):
    before = contents_of_names(finished)
    with pytest.raises(ValueError, match="belongs to another run") as error:
        run(*options)
    assert message in str(error.value)
    assert contents_of_names(finished) == before


def contents_of_names(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_changed_data_tokenizer_or_model_are_refused_by_name(run, study, finished, tmp_path):
    copy = shutil.copytree(study / "data", tmp_path / "data")
    shutil.copytree(study / "model", tmp_path / "model")
    same = ["--dataset-path", copy, "--model-path", tmp_path / "model"]
    shutil.rmtree(finished / "checkpoint-8")
    run(*same)  # the same contents elsewhere are the same
    shutil.rmtree(finished.with_name("run-final"))
    for changed, name in (("train/5.txt", "training"), ("validation/65.txt", "validation")):
        file = copy / changed
        text = file.read_text()
        file.write_text(text.replace("small", "SMALL"))
        with pytest.raises(ValueError, match=rf"{name} data \(sha256\) was"):
            run(*same)
        file.write_text(text)
    flip_a_bit(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights in --model-path \(sha256\) was"):
        run(*same)
    record = tmp_path / "model" / "mamba2_tokenizer.json"
    shutil.copyfile(study / "model" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    record.write_text('{"name": "gpt2"}')
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        run(*same)


def test_what_does_not_change_the_rates_so_far_may_change(run, tmp_path, capsys):
    constant = ["--schedule", "constant", "--max-steps", 4]
    run(*constant, "--no-save-final")
    longer = ["--schedule", "constant", "--max-steps", 6, "--batch-size", 1, "--gradient-accumulation-steps", 4]
    run(*longer, "--save-steps", 3)
    assert "step 4 of 6" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path / "run", "loss")] == list(range(1, 7))
    run(*longer, into="straight")
    losses = [[row["loss"] for row in metrics(tmp_path / name, "loss")] for name in ("run", "straight")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --------------------------------------------------------------------------------------------- disks and locks


def test_a_full_disk_ends_the_run_in_a_sentence_and_costs_no_checkpoint(study, whole, tmp_path, monkeypatch):
    """The limit on a file's size stands for the disk: the optimizer's file is the first that does not fit."""
    output, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    original = train.Job.write_checkpoint

    def write(job, folder):
        if "checkpoint-4" in folder.name:
            size = (output / "checkpoint-2" / MOMENTS).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
        original(job, folder)

    try:
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"cannot write .*{MOMENTS}"):
            patch.setattr(train.Job, "write_checkpoint", write)
            run_train(*arguments(study, output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in output.iterdir() if "tmp" in path.name] == []
    assert list(RunFolder(output).checkpoints()) == [0, 2]
    run_train(*arguments(study, output))
    assert_same_files(output, whole)


def test_a_folder_that_cannot_be_written_is_found_before_training(study, monkeypatch):
    monkeypatch.setattr(train.Job, "step", lambda *_: pytest.fail("trained"))
    with pytest.raises(OSError, match="/proc/run"):
        run_train(*arguments(study, Path("/proc/run")))


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    with pytest.raises(OSError, match="another run is training in"):
        run()
    folder.unlock()


def test_what_a_killed_run_left_half_written_goes(run, whole, tmp_path):
    for name in ("run/.checkpoint-2.77.tmp/x", "run/.latest.77.tmp/x", ".run-final.77.tmp/x"):
        (tmp_path / name).mkdir(parents=True)
    run()
    assert_same_files(tmp_path / "run", whole)
    assert not list(tmp_path.rglob("*.tmp"))
