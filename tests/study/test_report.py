"""The report says what the numbers say, names what it leaves out, refuses what cannot be compared, and is one file."""

import json
import math
import re

import numpy as np
import pytest
import torch

from mamba2.cli import json_ready
from mamba2.evaluation.diagnostics import diagnose
from mamba2.initializers import INITIALIZERS
from mamba2.model import Mamba2LM
from mamba2.study import figures
from mamba2.study.report import write_report
from mamba2.study.runs import Evaluated, History, check_comparable, read_history
from mamba2.study.statistics import compare
from tests.test_model import small_config

SOURCES = {"metrics": "trained/*/metrics.jsonl", "evaluations": "evaluations/*.json"}
NAMES = ("log_uniform", "constant", "uniform")


def result(nats: float) -> dict:
    values = {
        "nats_per_token": nats,
        "perplexity": math.exp(nats),
        "bits_per_byte": nats / 0.69,
        "word_perplexity": 9e9,
    }
    dataset = {"label": "text, test", "name": "text", "config": None, "split": "test", "revision": "1"}
    sums = {"interval_95": [nats - 0.1, nats + 0.1], "clusters": 4}
    return {"protocol": "stateful", "dataset": dataset, "context": 8, **values, **sums}


@pytest.fixture(scope="module")
def diagnostics():
    ids = torch.randint(0, 61, (2, 129), generator=torch.Generator().manual_seed(1))
    return {
        name: json_ready(diagnose(Mamba2LM(small_config(), seed=2, initialization=name).eval(), ids, 8, 2))
        for name in NAMES
    }


def make_run(diagnostics, name: str, loss: float, steps: int = 100, diverged=None, tokenizer="bytes") -> Evaluated:
    at = np.arange(0, steps + 1, 10)
    losses = loss + 2 * np.exp(-at / 10.0) * (at < steps - 45)
    drift = (np.array([0.0, 0.05]), np.array([0.0, 0.01]))
    history = History(None, at, at * 64.0, losses, 0.1, drift, {"steps": steps, "tokens": steps * 64}, diverged)
    task = {"source": "synthetic:mqar", "split": "test", "accuracy": 0.5, "distances": [2, 4], "counts": [10, 10]}
    record = {"results": [result(loss)], "recall": [{**task, "right": [6, 4]}], "diagnostics": diagnostics[name]}
    return Evaluated(history, {**record, "settings": {"tokenizer": tokenizer, "parameters": 1000, "data": ["text"]}})


def make_runs(diagnostics, seeds=(1, 2, 3), effect=-0.1):
    shift = {"log_uniform": 0.0, "constant": effect, "uniform": 0.02}
    return {
        (name, seed): make_run(diagnostics, name, 3 + seed * 0.1 + shift[name] + 0.001 * seed * len(name))
        for name in NAMES
        for seed in seeds
    }


@pytest.fixture(scope="module")
def written(diagnostics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = make_runs(diagnostics)
    write_report(folder, runs, "log_uniform", SOURCES)
    return folder, runs


def test_the_page_needs_nothing_beside_it(written):
    text = (written[0] / "report.html").read_text()
    assert "://" not in text and "<script" not in text and "@import" not in text and "url(" not in text
    sources = re.findall(r'src="([^"]{30})', text)
    assert len(sources) == len(list((written[0] / "figures").glob("*.png"))) == 10
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_it_begins_with_the_answer_and_says_where_figures_are_from(written):
    markdown = (written[0] / "report.md").read_text()
    head, body = markdown.split("## The comparison")
    assert "held-out nats per token (the mean of the last 5 evaluations)" in head
    assert "3 seeds cannot show a difference by the exact test: p ≥ 0.25 whatever the data" in head
    assert "better than" not in markdown
    for name, source in re.findall(r"!\[([\w-]+)\]\((figures/[\w-]+\.png)\)", body):
        assert (written[0] / source).read_bytes().startswith(b"\x89PNG"), name
    captions = re.findall(r"!\[[\w-]+\]\([^)]+\)\n\n(.+)", body)
    assert len(captions) == 10 and all("From " in caption and len(caption) > 60 for caption in captions)


def test_numbers_are_those_of_the_statistics(written):
    folder, runs = written
    values = {name: {s: runs[name, s].history.endpoint for s in (1, 2, 3)} for name in NAMES}
    assert values["constant"][1] == pytest.approx(3 + 0.1 - 0.1 + 0.008)  # the early, higher losses do not count
    expected = {c.name: c for c in compare(values, "log_uniform")}
    statistics = json.loads((folder / "statistics.json").read_text())
    for c in statistics["comparisons"]:
        assert c["interval"]["mean"] == pytest.approx(expected[c["name"]].interval.mean)
        assert c["p_holm"] == expected[c["name"]].p_holm == 0.5
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == [f"seed-{seed}-{name}" for name, seed in runs]
    assert lines[0]["nats"] == pytest.approx(runs["log_uniform", 1].history.losses) and lines[0]["tokens"][1] == 640
    assert f"{expected['constant'].interval.mean:+.4f}" in (folder / "report.md").read_text()


def test_enough_seeds_show_a_difference_and_one_shows_none(diagnostics, tmp_path):
    write_report(tmp_path / "many", make_runs(diagnostics, range(1, 9)), "log_uniform", SOURCES)
    assert "better than log_uniform (sign flip, Holm: p = 0.016)" in (tmp_path / "many/report.md").read_text()
    write_report(tmp_path / "one", make_runs(diagnostics, [1]), "log_uniform", SOURCES)
    one = (tmp_path / "one/report.md").read_text()
    assert "One seed only: no p-value" in one and "better than" not in one and "p =" not in one
    assert json.loads((tmp_path / "one/statistics.json").read_text())["comparisons"] == []


def test_a_diverged_run_is_named_and_not_averaged(diagnostics, tmp_path):
    runs = make_runs(diagnostics, (1, 2, 3))
    runs["constant", 2] = make_run(diagnostics, "constant", 77.7, 40, diverged="the loss is not finite at step 40")
    write_report(tmp_path, runs, "log_uniform", SOURCES)
    text = (tmp_path / "report.md").read_text()
    assert "Left out, because they diverged: seed-2-constant: the loss is not finite at step 40" in text
    assert "77.7" not in text
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert next(c for c in statistics["comparisons"] if c["name"] == "constant")["seeds"] == [1, 3]
    for seed in (1, 2, 3):
        runs["log_uniform", seed] = make_run(diagnostics, "log_uniform", 3.0, diverged="it ends too high")
    with pytest.raises(
        ValueError, match=r"no run of the baseline log_uniform is left to compare with; .*it ends too high"
    ):
        write_report(tmp_path, runs, "log_uniform", SOURCES)


def test_runs_that_differ_are_refused_by_name(diagnostics, tmp_path):
    runs = make_runs(diagnostics)
    runs["constant", 3] = make_run(diagnostics, "constant", 3.0, steps=90)
    message = "seed-1-log_uniform and seed-3-constant cannot be compared: steps is 100 in the one and 90 in the other"
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "new", runs, "log_uniform", SOURCES)
    runs["constant", 3] = make_run(diagnostics, "constant", 3.0, tokenizer="gpt2")
    with pytest.raises(ValueError, match="tokenizer is 'bytes' in the one and 'gpt2' in the other"):
        write_report(tmp_path / "new", runs, "log_uniform", SOURCES)
    assert not (tmp_path / "new").exists()
    check_comparable({"a": {"x": 1}, "b": {"x": 1}})
    check_comparable({"a": {"--dt-lr": 1.0}, "b+dt_lr=0": {}, "c": {"--dt-lr": 1.0}})
    with pytest.raises(
        ValueError, match=r"b\+dt_lr=0 and c cannot be compared: --x is None in the one and 1 in the other"
    ):
        check_comparable({"b+dt_lr=0": {}, "c": {"--x": 1}})
    with pytest.raises(
        ValueError, match=r"a and c cannot be compared: --dt-lr is 1\.0 in the one and 2\.0 in the other"
    ):
        check_comparable({"b+dt_lr=0": {}, "a": {"--dt-lr": 1.0}, "c": {"--dt-lr": 2.0}})


def test_the_registered_order_is_counted(diagnostics, tmp_path):
    runs = {}
    for seed, losses in ((1, (3.0, 3.1, 3.2)), (2, (3.2, 3.1, 3.0))):
        for name, loss in zip(("linear_decay_reverse", "uniform", "linear_decay"), losses):
            runs[name, seed] = make_run({name: diagnostics["constant"]}, name, loss)
    sources = SOURCES | {"study": "s.toml, sha256 abc"}
    write_report(
        tmp_path, runs, "uniform", sources, "Said  before.", ("linear_decay_reverse", "uniform", "linear_decay")
    )
    text = (tmp_path / "report.md").read_text()
    assert "Registered in s.toml, sha256 abc: Said before." in text
    assert "registered in the same file, linear_decay_reverse ≤ uniform ≤ linear_decay in loss" in text
    assert "holds in 1 of 2 seeds" in text
    assert "by chance alone it would in one of 6" in text
    write_report(tmp_path, runs, "uniform", SOURCES)
    assert "hypothesis" not in (tmp_path / "report.md").read_text()


def test_what_a_name_states_of_training_is_no_setting(tmp_path):
    toml = "[train]\ndt_lr = 0.0\nA_lr = 1.0\n"
    run = read_history(write_run(tmp_path / "seed-1-log_uniform+dt_lr=0", ROWS, toml))
    assert run.settings["--A-lr"] == 1.0 and "--dt-lr" not in run.settings


def write_run(folder, rows, toml="", identity=None):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if toml:
        (folder / "train.toml").write_text(toml)
    if identity:
        (folder / "checkpoint-2").mkdir()
        (folder / "checkpoint-2/trainer_state.json").write_text(json.dumps({"identity": identity}))
    return folder


ROWS = [
    {"step": 0, "validation_loss": 5.0},
    {"step": 0, "dt_median": [0.01, 0.02]},
    {"step": 1, "loss": 4.5, "learning_rate": 0.1, "tokens": 100},
    {"step": 1, "validation_loss": 4.0},
    {"step": 2, "loss": 3.5, "learning_rate": 0.2, "tokens": 200},
    {"step": 2, "validation_loss": 3.0},
    {"step": 2, "dt_median": [0.01, 0.03]},
]


def test_a_history_is_read_from_what_training_left(tmp_path):
    toml = '[train]\ndataset_path = "a"\nmodel_path = ["x"]\nlearning_rate = 0.1\n'
    h = read_history(write_run(tmp_path / "run", ROWS, toml, {"training data (sha256)": "abc", "seed": 1}))
    assert h.steps.tolist() == [0, 1, 2] and h.tokens.tolist() == [0, 100, 200] and h.endpoint == 3.5
    assert h.area == pytest.approx((4.5 + 3.5) / 2) and h.tokens_to(3.5) == 150 and h.tokens_to(5.0) == 0
    assert math.isnan(h.tokens_to(1.0)) and h.sum_of_rates == pytest.approx(0.3) and h.diverged is None
    moved = math.log(math.expm1(0.03)) - math.log(math.expm1(0.02))
    assert h.dt_drift[0] == pytest.approx([0, 0.3]) and h.dt_drift[1] == pytest.approx([0, moved / 2])
    expected = {
        "steps": 2,
        "tokens": 200,
        "--dataset-path": "a",
        "--learning-rate": 0.1,
        "training data (sha256)": "abc",
    }
    assert h.settings == expected


@pytest.mark.parametrize(
    "rows, message",
    [
        ([*ROWS, {"step": 3, "loss": None, "tokens": 300}], "the loss is not finite at step 3"),
        ([*ROWS, {"step": 2, "validation_loss": None}], "the last held-out loss is not finite"),
        ([*ROWS, {"step": 2, "validation_loss": 6.0}], "it ends at 6.000 nats, above the 5.000 it began with"),
    ],
)
def test_divergence_is_recognised(tmp_path, rows, message):
    assert read_history(write_run(tmp_path / "run", rows)).diverged == message


def test_missing_and_damaged_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: the report needs what train.py wrote"):
        read_history(tmp_path / "absent")
    folder = write_run(tmp_path / "run", ROWS)
    with pytest.raises(ValueError, match="has no training step"):
        read_history(write_run(tmp_path / "empty", ROWS[:2]))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_history(folder)


def test_every_initialisation_has_a_colour_of_its_own():
    assert len({figures.color(name) for name in INITIALIZERS["dt_bias"]}) == len(INITIALIZERS["dt_bias"])
