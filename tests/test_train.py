"""The loop: what it does before, between and after its steps, and that every option changes what it says."""

import contextlib
import itertools
import json
import os
import shutil
import sys
import tomllib
import types

import pytest
import torch
from torch._inductor import config

import train
from mamba2.checkpoint import read_model
from mamba2.data import Plan, open_source, prepare
from mamba2.model import SHAPES, Mamba2LM, num_parameters
from mamba2.ops import fusion
from mamba2.study.runs import read_history
from mamba2.tokenizer import get_tokenizer
from mamba2.training import RunFolder
from mamba2.training.plot import draw
from tests.runs import arguments, metrics, run_train


@pytest.fixture(scope="module")
def whole(study):
    """A run of 8 steps; what it printed is in whole.txt."""
    with open(study / "whole.txt", "w") as file, contextlib.redirect_stdout(file):
        run_train(*arguments(study, study / "whole"))
    return study / "whole"


def checkpoints(output):
    return list(RunFolder(output).checkpoints())


def losses(output):
    return [row["loss"] for row in metrics(output, "loss")]


def brief_losses(study, output, *options):
    """Those of five steps with nothing between them."""
    brief = ["--max-steps", 5, "--sample-tokens", 0, "--save-steps", 9]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Job, "evaluate", lambda job: 1.0)
        run_train(*arguments(study, output, *brief, *options))
    return losses(output)


@pytest.fixture(scope="module")
def brief(study):
    return brief_losses(study, study / "brief")


def flag_removed(command, flag):
    at = command.index(flag)
    return command[:at] + command[at + 2 :]


# ----------------------------------------------------------------------------------------------------- steps + 1


def test_the_model_is_looked_at_before_the_first_step_and_after_the_last(whole):
    assert [row["step"] for row in metrics(whole, "loss")] == list(range(1, 9))
    assert [row["step"] for row in metrics(whole, "validation_loss")] == [0, 4, 8]
    assert [row["step"] for row in metrics(whole, "sample")] == [0, 4, 8]
    assert [row["step"] for row in metrics(whole, "dt_median")] == [0, 1, 2, 4, 8]
    assert checkpoints(whole) == [0, 2, 4, 6, 8]
    config, tensors = read_model(whole.with_name("whole-final"), SHAPES)
    assert config == Mamba2LM.from_pretrained(whole / "latest").config
    assert torch.equal(tensors["lm_head.weight"], Mamba2LM.from_pretrained(whole / "latest").lm_head.weight)
    tokens, best = (metrics(whole, "tokens"), metrics(whole, "validation_loss"))
    card = whole.with_name("whole-final").joinpath("README.md").read_text()
    assert f"| training | 8 steps, {tokens[-1]['tokens']:,} tokens in windows of" in card
    assert f"| lowest held-out loss | {min(row['validation_loss'] for row in best):.4f} nats per token" in card


def test_dt_and_half_life_of_every_layer_are_logged_as_they_move(study, whole):
    rows = metrics(whole, "dt_median")
    start, end = rows[0], rows[-1]
    assert start["dt_min"] == start["dt_max"]  # `uniform`: one value in a layer
    model = Mamba2LM.from_pretrained(whole / "latest")
    for layer in range(2):
        dt = torch.nn.functional.softplus(model.dt_bias()[layer].double())
        assert end["dt_max"][layer] == pytest.approx(dt.max().item(), rel=1e-5)
        half_life = 0.693147 / (dt * model.A()[layer])
        assert end["half_life_median"][layer] == pytest.approx(half_life.quantile(0.5).item(), rel=1e-4)
    assert start["dt_max"] != end["dt_max"]


def test_the_plan_is_printed_before_the_first_step_and_a_line_for_each(study, whole):
    plan, steps = (study / "whole.txt").read_text().split("step 1 of 8")
    parameters = num_parameters(Mamba2LM.from_pretrained(study / "model").config)
    for part in (f"parameters   {parameters:,}", "4 windows of 32 = 128 tokens", "steps        8,", "FLOP", "memory "):
        assert part in plan
    for part in (f"torch {torch.__version__}", "triton", "revision", "half-life, tokens", "peak 0.0005"):
        assert part in plan
    for part in ("loss 5.", "gradient ", " tokens/s", "MFU ", " GB", " s left"):
        assert part in steps.splitlines()[0]


def test_metrics_count_tokens_and_hold_the_rate(whole):
    rows = metrics(whole, "loss")
    assert rows[-1]["tokens"] == 8 * 128
    assert [row["learning_rate"] for row in rows[:2]] == [2.5e-4, 5e-4]  # two steps of warm-up
    raw = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(row["mfu"] > 0 and row["tokens_per_second"] > 0 for row in raw if "loss" in row)


def test_several_models_train_one_after_another(study, tmp_path):
    shutil.copytree(study / "model", tmp_path / "other")
    command = arguments(study, tmp_path / "out", "--model-path", study / "model", tmp_path / "other", "--max-steps", 2)
    run_train(*command)
    assert (tmp_path / "out" / "model-final").is_dir() and (tmp_path / "out" / "other-final").is_dir()
    assert losses(tmp_path / "out" / "model") == losses(tmp_path / "out" / "other")
    options = tomllib.loads((tmp_path / "out" / "other" / "train.toml").read_text())["train"]
    assert options["model_path"] == [str(tmp_path / "other")]


# -------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        "--learning-rate 1e-3",
        "--schedule linear",
        "--schedule wsd --decay-ratio 0.9",
        "--warmup-steps 4",
        "--warmup-from-zero",
        "--final-rate-ratio 0.5",
        "--weight-decay 5",
        "--betas 0.5 0.6",
        "--eps 1e-2",
        "--seed 7",
        "--no-reset",
        "--dtype bf16",
        "--batch-size 1",
        "--gradient-accumulation-steps 1",
        "--max-length 16",
    ],
)
def test_an_option_that_should_change_the_training_does(study, brief, tmp_path, options):
    assert brief_losses(study, tmp_path / "run", *options.split()) != brief


@pytest.mark.parametrize(
    ("beside", "option"), [("--eps 1e-3", "--clip 0.01"), ("--weight-decay 5", "--decay all_but_biases")]
)
def test_an_option_that_acts_only_beside_another_does(study, tmp_path, beside, option):
    """AdamW hardly sees the scale of gradients above eps, and what is decayed matters only with decay."""
    without = brief_losses(study, tmp_path / "without", *beside.split())
    assert brief_losses(study, tmp_path / "with", *beside.split(), *option.split()) != without


def test_decay_ratio_is_where_wsd_leaves_the_peak(run):
    output = run("--schedule", "wsd", "--decay-ratio", 0.25, "--warmup-ratio", 0.5)
    rates = [row["learning_rate"] for row in metrics(output, "loss")]
    assert rates == pytest.approx([2.5e-4, *[5e-4] * 6, 2.5e-4])


def test_warmup_ratio_is_a_share_of_the_steps(study, tmp_path):
    file = tmp_path / "p.toml"
    file.write_text("[train]\nwarmup_ratio = 0.45\n")
    run_train(*flag_removed(arguments(study, tmp_path / "run", "--preset", file), "--warmup-steps"))
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run", "loss")]
    assert rates[:4] == pytest.approx([1.25e-4, 2.5e-4, 3.75e-4, 5e-4]) and rates[4] == pytest.approx(5e-4)


def test_epochs_count_passes_over_the_data(study, tmp_path):
    run_train(*flag_removed(arguments(study, tmp_path / "run", "--epochs", 0.25, "--keep", 1), "--max-steps"))
    tokens = sum(len(file.read_bytes()) + 1 for file in (study / "data" / "train").iterdir())
    assert metrics(tmp_path / "run", "loss")[-1]["tokens"] == pytest.approx(tokens / 4, abs=16)


@pytest.mark.parametrize(("every", "lean"), [("all", False), ("2", False), ("2", True)])
def test_recomputation_changes_nothing_but_what_is_kept(study, brief, tmp_path, every, lean, monkeypatch):
    seen = []
    original = train.Job.step
    monkeypatch.setattr(train.Job, "step", lambda job, i: seen.append(job.model.backbone) or original(job, i))
    options = ["--checkpoint-every", every, *["--keep-products-only"] * lean]
    assert brief_losses(study, tmp_path / "run", *options) == brief
    assert seen[0].checkpoint_every == {"all": 1, "2": 2}[every]
    recomputed = [layer.keep_products_only for layer in seen[0].layers]
    assert recomputed == [lean and i % 2 == 1 for i in range(len(recomputed))]


def test_the_gpus_to_use_are_told_to_cuda(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run("--dry-run", "--cuda-visible-devices", "2,3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize("what", ["fused", "blocks", "model"])
def test_compiling_without_a_compiler_ends_in_one_sentence(run, tmp_path, what):
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=r"needs a C\+\+ compiler"),
    ):
        run("--compile", what, "--max-steps", 2, "--schedule", "constant")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# Windows that all have a boundary of documents: one form of each graph. Fused, one form of each function is compiled,
# and the others run as they are written.
ONE_FORM = ["--max-length", 64, "--max-steps", 2, "--schedule", "constant"]


@pytest.fixture(scope="module")
def one_form(study):
    return brief_losses(study, study / "one-form", *ONE_FORM)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fused", "blocks", "model"])
def test_compiled_training_is_the_same_training(study, one_form, tmp_path, what, monkeypatch):
    seen = []
    original = train.Job.step
    monkeypatch.setattr(
        train.Job, "step", lambda job, i: seen.append((job.model, fusion.is_fused())) or original(job, i)
    )
    monkeypatch.setattr(fusion, "SHAPES", 1)
    monkeypatch.setattr(fusion, "_fused", False)
    torch.compiler.reset()
    compiled = brief_losses(study, tmp_path / "run", *ONE_FORM, "--compile", what)
    assert compiled == pytest.approx(one_form, rel=1e-5)
    model, fused = seen[-1]
    assert fused == (what == "fused")
    assert (model._compiled_call_impl is None) == (what != "model")
    assert (model.backbone.layers[0]._compiled_call_impl is None) == (what != "blocks")
    assert not any("_orig_mod" in key for key in read_model(tmp_path / "run-final", SHAPES)[1])


def test_schedules_of_evaluation_samples_dt_and_saves(run):
    options = ["--eval-steps", 3, "--sample-steps", 5, "--dt-steps", 3, "--save-steps", 7, "--no-keep-best"]
    output = run(*options)
    steps = {"validation_loss": [0, 3, 6, 8], "sample": [0, 5, 8], "dt_min": [0, 1, 2, 3, 4, 6, 8]}
    assert {key: [row["step"] for row in metrics(output, key)] for key in steps} == steps
    assert checkpoints(output) == [0, 7, 8]
    output = run("--sample-tokens", 0, "--no-save-final", into="b")
    assert metrics(output, "sample") == [] and not output.with_name("b-final").exists()


def test_eval_windows_is_how_many_are_evaluated(run, whole, monkeypatch):
    counts = []
    monkeypatch.setattr("mamba2.training.job.mean_loss", lambda *args, **_: counts.append(args[2]) or 1.0)
    run("--eval-windows", 3)
    assert counts == [3, 3, 3]


# ------------------------------------------------------------------------------------------------------ what is kept


def evaluations(monkeypatch, *values: float) -> None:
    """Let the evaluations come out as these."""
    remaining = list(values)
    monkeypatch.setattr(train.Job, "evaluate", lambda job: remaining.pop(0))


def test_the_last_the_best_and_the_early_ones_are_kept(run, monkeypatch):
    losses = (5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0)
    every = ["--eval-steps", 1, "--save-steps", 1, "--keep", 2]
    evaluations(monkeypatch, *losses)
    best = run(*every, into="best")
    assert checkpoints(best) == [2, 7, 8]
    assert os.readlink(best / "best") == "checkpoint-2" and os.readlink(best / "latest") == "checkpoint-8"
    evaluations(monkeypatch, *losses)
    assert checkpoints(run(*every, "--no-keep-best", into="last")) == [7, 8]
    evaluations(monkeypatch, *losses)
    assert checkpoints(run(*every, "--keep-early", "--save-steps", 5, into="early")) == [0, 1, 2, 4, 5, 8]


def test_a_best_evaluation_is_saved_between_the_saves(run, monkeypatch):
    evaluations(monkeypatch, 5.0, 4.0, 4.5, 4.6, 4.7)
    assert checkpoints(run("--eval-steps", 2, "--save-steps", 8)) == [0, 2, 8]


# -------------------------------------------------------------------------------------------------------- early ends


def test_patience_stops_after_evaluations_that_are_not_the_best(run, tmp_path, monkeypatch, capsys):
    evaluations(monkeypatch, 5.0, 4.0, 4.5, 4.6)
    output = run("--eval-steps", 1, "--patience", 2, "--save-steps", 8)
    assert "stopped at step 3 of 8" in capsys.readouterr().out
    (tmp_path / "run-final").rename(tmp_path / "away")
    run("--eval-steps", 1, "--patience", 2, "--save-steps", 8)
    assert (tmp_path / "run-final").is_dir()
    assert checkpoints(output) == [0, 1, 3] and len(metrics(output, "loss")) == 3


def test_patience_without_a_validation_split_is_refused(run, study):
    data = ["--dataset-path", study / "data" / "train"]
    with pytest.raises(ValueError, match="--patience 2 needs evaluations"):
        run(*data, "--patience", 2)


def test_steps_without_a_finite_gradient_are_skipped_counted_and_bounded(run, tmp_path, monkeypatch, capsys):
    poisoned = {3, 4}
    original = train.Job.step

    def step(job, index):
        if index in poisoned:
            hook = job.model.backbone.norm_f.weight.register_hook(lambda gradient: gradient * float("nan"))
            result = original(job, index)
            hook.remove()
            return result
        return original(job, index)

    monkeypatch.setattr(train.Job, "step", step)
    run("--keep", 9, "--save-steps", 1, "--max-skipped", 3)
    rows = metrics(tmp_path / "run", "loss")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [row["gradient_norm"] is None for row in rows] == [i in (3, 4) for i in range(8)]
    weights = [read_model(tmp_path / "run" / f"checkpoint-{i}", SHAPES)[1]["lm_head.weight"] for i in range(9)]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [i in (3, 4) for i in range(8)]
    assert "step 4: no finite gradient" in capsys.readouterr().out
    poisoned.add(5)
    with pytest.raises(ValueError, match="3 steps in a row had no finite gradient"):
        run("--max-skipped", 3, into="other")


@pytest.mark.parametrize("data", [[], ["--dataset-path", "data/train"]], ids=["validated", "not validated"])
def test_a_loss_that_is_not_finite_at_the_end_of_a_short_run_is_no_result(run, study, tmp_path, data):
    data = [study / part if "/" in part else part for part in data]
    options = ("--learning-rate", 1e6, "--max-steps", 5, "--eval-steps", 2, *data)
    for _ in range(2):  # nor when the same command goes on
        with pytest.raises(ValueError, match="the loss is nan at the end, step 5 of 5; lower --learning-rate"):
            run(*options)
    assert not (tmp_path / "run-final").exists()


def test_weights_that_are_not_finite_are_not_trained(run, study, tmp_path):
    model = Mamba2LM.from_pretrained(arguments(study, tmp_path)[1])
    model.lm_head.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"lm_head\.weight holds NaN or infinity in float32; nothing can be computed"):
        run("--model-path", tmp_path / "model", "--max-steps", 1)


def test_a_dry_run_makes_one_step_and_writes_nothing(run, study, whole, tmp_path, capsys, monkeypatch):
    indices = []
    original = train.Job.step
    monkeypatch.setattr(train.Job, "step", lambda job, index: indices.append(index) or original(job, index))
    before = sorted(study.rglob("*"))
    run("--dry-run")
    run_train(*arguments(study, whole, "--dry-run"))
    output = capsys.readouterr().out
    assert indices == [0, 0] and "parameters" in output and "half-life" in output and "loss 5." in output
    assert not list(tmp_path.iterdir()) and sorted(study.rglob("*")) == before


def test_the_plan_says_which_files_are_trained_on(run, tmp_path, capsys):
    for name in ("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(name * 75)
    run("--dry-run", "--dataset-path", tmp_path / "data")
    output = capsys.readouterr().out
    assert (
        f"data         {tmp_path / 'data'}: 1,051 tokens, 1 documents\n             1,051 tokens, 1 documents held"
        in output
    )
    assert "train        split train: 1 file, 1,050 bytes (wiki.train.txt)" in output
    assert "held out     split validation: 1 file, 1,050 bytes (wiki.valid.txt)" in output
    assert "left out     split test: 1 file, 975 bytes (wiki.test.txt)" in output


def test_the_plan_says_where_an_earlier_version_did_not_record_the_files(study, tmp_path, capsys):
    prepare(tmp_path / "tokens", Plan({"train": open_source(study / "data", "train")}, get_tokenizer("bytes")))
    command = arguments(study, tmp_path / "run", "--dry-run", "--dataset-path", tmp_path / "tokens")
    run_train(*command)
    assert "does not say of which files" not in capsys.readouterr().out
    sidecar = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    del sidecar["splits"]["train"]["source"]
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(sidecar))
    run_train(*command)
    assert "tokens.json does not say of which files" in capsys.readouterr().out


def test_running_out_of_memory_says_what_takes_less(run, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("mamba2.training.job.accumulate_gradients", fails)
    advice = r"--checkpoint-every 1 .*, or --batch-size 1 --gradient-accumulation-steps 4"
    with pytest.raises(MemoryError, match=advice):
        run()
    with pytest.raises(MemoryError, match="a shorter --max-length"):
        run("--batch-size", 1, "--gradient-accumulation-steps", 4)


# -------------------------------------------------------------------------------------------------------------- wandb


class FakeRun:
    def __init__(self, fail_at: int | None, id: str | None):
        self.rows, self.fail_at, self.id, self.finished = [], fail_at, id or "new", False

    def log(self, row, step):
        if len(self.rows) == self.fail_at:
            raise RuntimeError("connection lost")
        self.rows.append((step, row))

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, fail_at: int | None = None) -> list[tuple[FakeRun, dict]]:
    started = []

    def init(**options):
        started.append((FakeRun(fail_at, options["id"]), options))
        return started[-1][0]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    return started


def test_wandb_gets_every_row_and_a_resumed_run_goes_on_in_its_own(run, whole, tmp_path, monkeypatch):
    started = fake_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "")
    options = ["--wandb", "offline", "--wandb-project", "p", "--wandb-token", "secret"]
    run(*options)
    first, how = started[0]
    assert how["mode"] == "offline" and how["project"] == "p" and how["name"] == "run" and how["id"] is None
    assert "secret" not in str(how) and "secret" not in (tmp_path / "run" / "train.toml").read_text()
    assert first.finished and len(first.rows) == len(metrics(whole))
    assert any("dt_median/layer 1" in row for _, row in first.rows)
    (tmp_path / "run-final").rename(tmp_path / "away")
    run(*options)
    assert started[1][1]["id"] == "new"


def test_wandb_that_fails_in_the_middle_is_said_once_and_costs_nothing(run, whole, tmp_path, monkeypatch, capsys):
    started = fake_wandb(monkeypatch, fail_at=3)
    run("--wandb", "online")
    assert capsys.readouterr().out.count("warning: wandb no longer takes values (connection lost)") == 1
    assert len(started[0][0].rows) == 3
    assert metrics(tmp_path / "run") == metrics(whole)


def test_wandb_is_off_without_a_key_and_on_with_one(run, monkeypatch):
    started = fake_wandb(monkeypatch)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run("--max-steps", 1, into="a")
    assert started == []
    monkeypatch.setenv("WANDB_API_KEY", "x")
    run("--max-steps", 1, into="b")
    assert started[0][1]["mode"] == "online"
    run("--max-steps", 1, "--wandb", "disabled", into="c")
    assert len(started) == 1


@pytest.mark.slow
def test_the_real_wandb_offline_and_unreachable(run, whole, tmp_path, monkeypatch, capsys):
    run("--wandb", "offline", into="offline")
    assert list((tmp_path / "offline" / "wandb").glob("offline-run-*/*.wandb"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("mamba2.training.metrics.WANDB_SECONDS", 2.0)
    run("--wandb", "online")
    assert "warning: wandb does not start" in capsys.readouterr().out
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_run_that_blows_up_records_null_and_ends_with_its_own_sentence(run, tmp_path, capsys):
    options = ("--learning-rate", 1e6, "--max-steps", 40, "--eval-steps", 3, "--sample-steps", 3, "--dt-steps", 1)
    with pytest.raises(ValueError, match="10 steps in a row had no finite gradient; lower --learning-rate"):
        run(*options)
    rows = metrics(tmp_path / "run")  # of JSON, which has no word for NaN
    for key in ("loss", "validation_loss", "gradient_norm", "sample"):
        values = [row[key] for row in rows if key in row]
        assert values[0] is not None and values[-1] is None, key
    assert "null" in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "no text: the model's logits are not finite" in capsys.readouterr().out
    draw(rows, "", tmp_path / "metrics.png")
    assert read_history(tmp_path / "run").diverged
