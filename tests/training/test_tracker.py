"""TensorBoard and wandb get what metrics.jsonl holds, while a run trains and afterwards.

What the files say is read by TensorBoard's own reader and by wandb's.
"""

import json
import struct
import sys
import tomllib
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from wandb.proto.wandb_internal_pb2 import Record

from mamba2.training import log
from mamba2.training.metrics import scalars
from tests.runs import arguments, contents, interrupt_after, metrics, run_train

TENSORBOARD = ("--log", "tensorboard")


def events(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """By tag, the steps and values that TensorBoard shows of a run."""
    reader = EventAccumulator(str(folder / "tensorboard"), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
    shown = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    for tag in reader.Tags()["tensors"]:
        texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in reader.Tensors(tag)]
        shown[tag.removesuffix("/text_summary")] = texts
    return shown


def expected(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """The same from metrics.jsonl, in float32, and texts as TensorBoard's Markdown of code."""
    shown: dict[str, list[tuple[int, object]]] = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        step = row.pop("step")
        for name, value in row.items():
            for i, one in enumerate(value if isinstance(value, list) else [value]):
                tag = f"{name}/layer {i}" if isinstance(value, list) else name
                text = isinstance(one, str) and "\n".join("    " + line for line in one.split("\n"))
                shown.setdefault(tag, []).append((step, text or pytest.approx(one, rel=1e-7)))
    return shown


def wandb_records(file: Path) -> list[Record]:
    """What a .wandb file holds: after 7 bytes, LevelDB's log format, blocks of 32 KiB with whole or split records."""
    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no room for a header: the block is padded
            at += -at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def log_to(monkeypatch, *command: object) -> None:
    monkeypatch.setattr(sys, "argv", ["log", *map(str, command)])
    log.main()


@pytest.fixture(scope="module")
def whole(study):
    """A run that TensorBoard was given while it trained."""
    run_train(*arguments(study, study / "whole", *TENSORBOARD))
    return study / "whole"


def test_tensorboard_gets_every_number_and_sample_with_its_step_and_the_options(whole):
    shown = events(whole)
    [(_, options)] = shown.pop("options")
    assert "    learning_rate = 0.0005\n" in options and f'    output_dir = "{whole}"\n' in options
    assert shown == expected(whole)
    assert {"loss", "validation_loss", "sample", "half_life_max/layer 1", "tokens_per_second"} <= shown.keys()


def test_what_was_not_finite_is_left_out():
    row = {"step": 3, "loss": None, "tokens": 0, "sample": None, "dt_min": [None, 0.5]}
    assert scalars(row) == {"tokens": 0, "dt_min/layer 1": 0.5}


def test_without_log_nothing_is_written_and_with_it_everything_else_is_the_same(run, whole):
    other = contents(run())
    assert not any(name.startswith("/tensorboard") for name in other)
    same = {name: value for name, value in contents(whole).items() if not name.startswith("/tensorboard")}
    for files, to in ((same, ["tensorboard"]), (other, [])):
        files["/train.toml"] = tomllib.loads("\n".join(files["/train.toml"]))["train"]
        assert files["/train.toml"].pop("log") == to
    assert same == other


def test_a_resumed_run_shows_no_step_twice_and_overwrite_begins_anew(run, tmp_path, monkeypatch):
    """It is stopped after step 5, and goes on from 4 as a killed one would: 5 was logged and is taken again."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(SystemExit):
            run(*TENSORBOARD)
    folder = tmp_path / "run"
    assert [step for step, _ in events(folder)["loss"]] == [1, 2, 3, 4, 5]
    before = folder / "checkpoint-4"
    run(*TENSORBOARD, "--resume", before, "--overwrite")
    shown = events(folder)
    assert [step for step, _ in shown.pop("options")] == [1, 5]
    assert shown == expected(folder) and len(list((folder / "tensorboard").iterdir())) == 2
    run(*TENSORBOARD, "--max-steps", 2, "--overwrite")
    assert len(list((folder / "tensorboard").iterdir())) == 1 and [step for step, _ in events(folder)["loss"]] == [1, 2]


def test_tensorboard_that_fails_in_the_middle_is_said_once_and_costs_nothing(run, whole, monkeypatch, capsys):
    write = SummaryWriter.add_scalar

    def fails(self, tag, value, step):
        if step == 3:
            raise OSError("disk full")
        write(self, tag, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    folder = run(*TENSORBOARD)
    assert capsys.readouterr().out.count("warning: tensorboard no longer takes values (disk full)") == 1
    assert metrics(folder) == metrics(whole) and [step for step, _ in events(folder)["loss"]] == [1, 2]


def test_log_wandb_is_offline_without_a_key_and_goes_with_tensorboard(run, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = run("--max-steps", 1, "--log", "tensorboard", "wandb")
    assert list(folder.glob("wandb/offline-run-*/*.wandb")) and events(folder)
    with pytest.raises(SystemExit):
        run("--log", "wandb", "--wandb", "disabled", into="other")


def test_tensorboard_afterwards_is_the_same_as_while_training_for_several_runs(whole, tmp_path, monkeypatch, capsys):
    folders = [tmp_path / "whole", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        for name in ("metrics.jsonl", "train.toml"):
            (folder / name).write_bytes((whole / name).read_bytes())
    log_to(monkeypatch, *folders, "--to", "tensorboard")
    assert events(folders[0]) == events(folders[1]) == events(whole)
    assert capsys.readouterr().out == "".join(f"wrote {folder / 'tensorboard'}\n" for folder in folders)


def test_wandb_afterwards_gets_the_rows_and_the_options(whole, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = tmp_path / "a run"
    folder.mkdir()
    for name in ("metrics.jsonl", "train.toml"):
        (folder / name).write_bytes((whole / name).read_bytes())
    log_to(monkeypatch, folder, "--to", "wandb")
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    shown: dict[str, list[tuple[int, object]]] = {}
    for record in wandb_records(file):
        if record.HasField("run"):
            run = record.run
        for item in record.history.item:
            name, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
            if not name.startswith("_"):
                shown.setdefault(name, []).append((record.history.step.num, value))
    assert (run.project, run.display_name) == ("mamba2", "a run")
    options = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert options["learning_rate"] == 5e-4 and options["max_steps"] == 8
    samples = [(row["step"], row["sample"]) for row in metrics(whole, "sample")]
    assert shown.pop("sample") == samples
    assert shown == {tag: values for tag, values in expected(whole).items() if tag != "sample"}


def test_what_is_no_run_or_was_written_is_refused_by_name_before_any_is_written(whole, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in .*: name the --output-dir of a run"):
        log_to(monkeypatch, whole, tmp_path, "--to", "wandb")
    assert not (whole / "wandb").exists()
    with pytest.raises(FileExistsError, match="whole/tensorboard is there already; remove it to write it anew"):
        log_to(monkeypatch, whole, "--to", "tensorboard")


def test_an_error_afterwards_ends_the_command(whole, tmp_path, monkeypatch):
    for name in ("metrics.jsonl", "train.toml"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OSError, match="tensorboard does not start"):
        log_to(monkeypatch, tmp_path, "--to", "tensorboard")
