"""The three scripts as people run them: the replaced pipeline's command lines, and what happens with bad input."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch

import init
from mamba2.config import Mamba2Config
from mamba2.model import Mamba2LM
from mamba2.study import study_runs
from tests.test_model import small_config

ROOT = Path(__file__).parent.parent
TEXTS = [f"This is line {i} of a small corpus, and {i * i} is its square.\n" for i in range(60)]


def run_script(folder: Path, command: str, code: int = 0, apart: bool = False) -> subprocess.CompletedProcess:
    """A script with these arguments, the folder as its own: in this process, which has imported what takes seconds, or
    `apart`, in one that is started as people do."""
    environment = {"MAMBA2_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    arguments = command.split()
    script = str(ROOT / arguments[0])
    with mock.patch.dict(os.environ, environment):
        if apart:
            whole = [sys.executable, script, *arguments[1:]]
            result = subprocess.run(whole, cwd=folder, capture_output=True, text=True)
        else:
            result = _run_here(folder, script, arguments)
    assert result.returncode == code, result.stdout + result.stderr
    if code:
        assert "Traceback" not in result.stderr
    return result


def _run_here(folder: Path, script: str, arguments: list[str]) -> subprocess.CompletedProcess:
    streams, code = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)], 0
    digits = sys.get_int_max_str_digits()  # which a script changes for its process
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", arguments),
        mock.patch("mamba2.training.job.peak_flops", lambda device, dtype: 1e12),  # measuring it takes longest
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.set_int_max_str_digits(digits)
    texts = [stream.buffer.getvalue().decode() for stream in streams]
    return subprocess.CompletedProcess(arguments, code, *texts)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a small config, a data set of ids, a data set laid out as the hub's, and the finished commands."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "config").mkdir()
    small_config(vocab_size=257).save(folder / "config")
    rows = datasets.Dataset.from_dict({"input_ids": [list(text.encode()) for text in TEXTS]})
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(folder / "data")
    hub = folder / "wikitext" / "wikitext-2-raw-v1"
    hub.mkdir(parents=True)
    lines = [" = Title = \n", "", *TEXTS[:6], " = Other = \n", *TEXTS[6:9]]
    datasets.Dataset.from_dict({"text": lines}).to_parquet(hub / "test-00000-of-00001.parquet")

    run_script(folder, "init.py --config-path config --seeds 42 43", apart=True)
    outputs = {}
    for seed in (42, 43):
        for name in ("uniform", "linear_decay", "linear_decay_reverse"):
            model = f"seed-{seed}-{name}"
            command = f"train.py --model-path mamba2-40m/{model} --dataset-path data --output-dir out/{model}"
            outputs[model] = run_script(folder, command, apart=not outputs)
    outputs["eval"] = run_script(folder, "eval.py --model-base-path out --seeds 42 43", apart=True)
    return folder, outputs


@pytest.mark.slow
def test_the_original_command_lines_run_as_written(study):
    folder, outputs = study
    results = json.loads((folder / "perplexity_results.json").read_text())
    assert set(results) == {"uniform", "linear_decay", "linear_decay_reverse"}
    for name, entry in results.items():
        assert len(entry["mean"]) == len(entry["all_perplexities"]) == 2
        assert entry["model_paths"] == [f"out/seed-{seed}-{name}-final" for seed in (42, 43)]
        assert len(entry["all_perplexities"][0]) == 2  # articles
        for path in entry["model_paths"]:
            trained = Mamba2LM.from_pretrained(folder / path)
            start = Mamba2LM.from_pretrained(folder / path.replace("out/", "mamba2-40m/").removesuffix("-final"))
            assert trained.config.dt_bias_init == start.config.dt_bias_init
            assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert "seed 42" in outputs["eval"].stdout and "linear_decay_reverse" in outputs["eval"].stdout
    assert "half-life" in outputs["seed-42-uniform"].stdout


@pytest.mark.slow
def test_metrics_hold_every_step_and_a_finished_model_is_not_trained_again(study):
    folder, _ = study
    metrics = folder / "out/seed-42-uniform/metrics.jsonl"
    before = metrics.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]  # 986 windows a step, and an epoch has fewer
    assert {row["step"] for row in rows if "validation_loss" in row} == {0, 1}
    command = "train.py --model-path mamba2-40m/seed-42-uniform --dataset-path data --output-dir out/seed-42-uniform"
    result = run_script(folder, command)
    assert "is not trained again" in result.stdout
    assert metrics.read_text() == before


@pytest.mark.slow
def test_checkpoints_are_written_pruned_and_evaluated(study):
    folder, _ = study
    train = "train.py --model-path mamba2-40m/seed-42-uniform mamba2-40m/seed-42-linear_decay --dataset-path data"
    train += " --output-dir steps"
    options = "--batch-size 2 --gradient-accumulation-steps 2 --max-length 32 --max-steps 12 --save-steps 2"
    run_script(folder, f"{train} {options} --no-save-final --dtype fp32 --num-epochs 3")
    kept = sorted(path.name for path in (folder / "steps/seed-42-uniform").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-12", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert not list(folder.glob("steps/*-final"))
    evaluate = "eval.py --model-base-path steps --initializations uniform linear_decay --output-file c.json"
    run_script(folder, f"{evaluate} --checkpoint 10 --protocol windows --context 16")
    assert "checkpoint-10" in json.loads((folder / "c.json").read_text())["uniform"]["model_paths"][0]
    run_script(folder, f"{evaluate} --protocol hf_evaluate --sample-tokens 5 --batch-size 4")
    results = json.loads((folder / "c.json").read_text())
    assert "checkpoint-12" in results["uniform"]["model_paths"][0]
    assert len(results["uniform"]["all_perplexities"][0]) == 11  # lines of at least two tokens
    assert "belongs to another run: --max-length was 32" in run_script(folder, train, code=1).stderr


@pytest.mark.slow
def test_a_repeated_run_gives_the_same_bits(study):
    folder, _ = study
    command = "train.py --model-path mamba2-40m/seed-42-uniform --dataset-path data --batch-size 2 --max-steps 4"
    command += " --gradient-accumulation-steps 1 --max-length 128 --sample-tokens 0"
    for name in ("a", "b"):
        run_script(folder, f"{command} --output-dir {name}", apart=name == "b")
    a, b = (Mamba2LM.from_pretrained(folder / f"{name}-final").state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_models_with_different_tokenizers_are_not_compared(study):
    folder, _ = study
    small_config(vocab_size=50300).save(folder / "wide.json")
    for config, name in (("config", "uniform"), ("wide.json", "linear_decay")):
        run_script(folder, f"init.py --config-path {config} --initializations {name} --seeds 42 --output-path mixed")
    command = "eval.py --model-base-path mixed --initializations uniform linear_decay"
    assert "their perplexities cannot be compared" in run_script(folder, command, code=1).stderr


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(50288, "gpt-neox-20b"), (50276, "gpt2"), (50257, "gpt2"), (50256, "bytes"), (257, "bytes"), (256, None)],
)
def test_without_a_name_the_largest_tokenizer_that_fits_is_taken(vocab_size, name):
    tokenizer = init.choose_tokenizer(None, vocab_size)
    assert (tokenizer and tokenizer.name) == name


BAD = {
    "init.py --config-path absent": "no config at absent",
    "init.py --config-path config --initializations unifrom": "choose from uniform, linear_decay",
    "init.py --config-path config --t-min 0.2": "t_min is 0.2 and t_max is 0.1",
    "init.py --config-path config --tokenizer gpt2": "has 50257 ids and the config's vocab_size is 257",
    "train.py --output-dir o --model-path absent": "no model folder at absent",
    "train.py --output-dir o --model-path mamba2-40m/seed-42-uniform --dataset-path /absent": "no data at",
    "train.py --output-dir o --model-path config": "no model.safetensors in config",
    "eval.py --model-base-path absent": "no folder at absent",
    "eval.py --model-base-path out --seeds 7": "no model of seed 7, uniform: looked for out/seed-7-uniform-final",
    "eval.py --model-base-path out --dataset-split other": "has no split 'other'; it has test",
}


@pytest.mark.slow
def test_bad_input_is_one_sentence_and_writes_nothing(study):
    folder, _ = study
    before = sorted(path for path in folder.rglob("*") if "cache" not in path.parts)
    for command, message in BAD.items():
        result = run_script(folder, command, code=1, apart=command == "init.py --config-path absent")
        assert result.stderr.startswith("error: ") and message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
    assert sorted(path for path in folder.rglob("*") if "cache" not in path.parts) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py --output-dir o", "--model-path is required"),
        ("eval.py --preset huge", "choose 1.3b, 130m"),
        (
            "eval.py --model-base-path . --initializations uniform --baseline ones",
            "--baseline ones is not among --initializations uniform",
        ),
        (
            "eval.py --model-base-path . --initializations uniform --report --checkpoint 3",
            "--report is of whole runs",
        ),
    ],
)
def test_a_missing_flag_and_an_unknown_preset_are_named(tmp_path, command, message):
    assert message in run_script(tmp_path, command, code=2).stderr


def test_the_initialisations_can_be_listed(tmp_path):
    assert "log_uniform" in run_script(tmp_path, "init.py --list").stdout


def test_parameters_and_factors_are_set_recorded_and_never_changed_in_silence(tmp_path):
    small_config(num_hidden_layers=2).save(tmp_path / "config.json")
    base = "init.py --config-path config.json --output-path o --initializations halflife+A=ones "
    run_script(tmp_path, base + "--set half_life_max=0.5L --length 256")
    folder = tmp_path / "o/seed-42-halflife+A=ones"
    config = Mamba2Config.from_json(folder)
    assert config.dt_bias_init["half_life_max"] == 128.0 and config.factors_init["A"]["name"] == "ones"
    assert config.initialization == "halflife+A=ones"
    before = (folder / "model.safetensors").read_bytes()
    assert "is there already and stays" in run_script(tmp_path, base + "--set half_life_max=128").stdout
    for more, message in {
        "": "with half_life_max = 128, and not 1024 as wanted now: choose another --output-path",
        "--set value=1": "--set value: none of halflife+A=ones reads it",
        "--set t_min=1": "--set t_min: use --t-min",
        "--set half_life_max=0.5L": "how long L is, --length says",
        "--length 256": "--length 256 is for shares such as --set half_life_max=0.5L and for initialisations that",
        "--dataset-path stdlib": "--dataset-path stdlib is for autocorrelation to be measured in, and nothing reads it",
        "--initializations uniform+A=two": "unknown factor 'A=two'",
    }.items():
        assert message in run_script(tmp_path, base + more, code=1).stderr
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_base_width_of_muP_is_recorded_shown_and_never_changed_in_silence(tmp_path):
    small_config(num_hidden_layers=2, vocab_size=257).save(tmp_path / "config.json")
    (tmp_path / "train.txt").write_text("abcdefgh" * 100)
    base = "init.py --config-path config.json --output-path o --initializations uniform --mup-base-width "
    assert "needs weight_init mamba_ssm" in run_script(tmp_path, base + "16", code=1).stderr
    base = base.replace("init.py", "init.py --weight-init mamba_ssm")
    run_script(tmp_path, base + "16")
    assert Mamba2Config.from_json(tmp_path / "o/seed-42-uniform").mup_base_width == 16
    assert "with mup_base_width = 16, and not 8 as wanted now" in run_script(tmp_path, base + "8", code=1).stderr
    train = "train.py --model-path o/seed-42-uniform --output-dir t --dataset-path train.txt --max-length 16 --dry-run"
    assert "in_proj, out_proj and lm_head divided by 2" in run_script(tmp_path, train).stdout


def test_dt_from_the_length_and_the_data(tmp_path):
    small_config(num_hidden_layers=2, vocab_size=257).save(tmp_path / "config.json")
    (tmp_path / "train.txt").write_text("abcdefgh" * 100)
    base = "init.py --config-path config.json --output-path o --initializations "
    result = run_script(tmp_path, base + "inverse_length autocorrelation --length 32 --dataset-path train.txt")
    # Every eighth token is the same: the matrix has four 1 in each row, and the largest eigenvalue 4.
    assert "eigenvalue   4 of the autocorrelation in windows of 32 of train.txt" in result.stdout
    config = Mamba2Config.from_json(tmp_path / "o/seed-42-autocorrelation")
    assert config.dt_bias_init["eigenvalue"] == pytest.approx(4) and config.dt_bias_init["length"] == 32
    for command, message in {
        "inverse_length": "inverse_length reads the length of the windows to train on: give --length",
        "autocorrelation --length 32": "autocorrelation is measured in data: give --dataset-path",
    }.items():
        assert message in run_script(tmp_path, base + command, code=1).stderr
    assert "stays" in run_script(tmp_path, base + "inverse_length --length 32").stdout
    assert "length = 32, and not 64" in run_script(tmp_path, base + "inverse_length --length 64", code=1).stderr


def test_a_preview_shows_memory_and_signals_and_writes_no_model(tmp_path):
    small_config(num_hidden_layers=2).save(tmp_path / "config.json")
    command = "init.py --config-path config.json --preview --initializations constant halflife"
    result = run_script(tmp_path, f"{command} --output-path a --t-max 0.001")
    # A = 1..8, dt = 0.001: half-lives of 693 down to 87 tokens, five of them above 128.
    assert "heads by half-life in tokens: 100% > 1, 100% > 16, 62% > 128, 0% > 1024" in result.stdout
    assert "gradient norm" in result.stdout and "state / skip D x, rms" in result.stdout
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["preview.png"]
    assert (tmp_path / "a/preview.png").read_bytes().startswith(b"\x89PNG")


STUDY = """
[study]
seeds = [1, 2]
initializations = ["log_uniform", "linear_decay"]
baseline = "log_uniform"
output = "grid"
[init]
config_path = "config"
[train]
dataset_path = "text"
batch_size = 4
gradient_accumulation_steps = 1
max_length = 32
max_steps = 6
eval_steps = 3
sample_tokens = 8
eval_windows = 4
[eval]
dataset_name = ["text"]
dataset_split = ["test"]
context = 32
batch_size = 4
"""


@pytest.mark.slow
def test_a_study_goes_from_models_to_its_report_and_is_not_done_twice(study):
    folder, _ = study
    rows = [{"text": text * 10} for text in TEXTS]
    (folder / "text").mkdir()
    for split, part in (("train", rows), ("test", rows[:3])):
        (folder / f"text/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "text.toml").write_text(STUDY)
    run_script(folder, "init.py --study text.toml")
    assert "is there already" in run_script(folder, "init.py --study text.toml").stdout
    runs = study_runs(folder / "text.toml")
    assert run_script(folder, "train.py --study text.toml").stdout.count("dt after training") == len(runs)
    assert run_script(folder, "train.py --study text.toml").stdout.count("is not trained again") == len(runs)
    assert all((folder / run.final).is_dir() for run in runs)
    first = run_script(folder, "eval.py --study text.toml --report")
    assert "wrote grid/report/report.html" in first.stdout
    page = (folder / "grid/report/report.md").read_text()
    assert "2 seeds cannot show a difference by the exact test: p ≥ 0.5 whatever the data" in page
    assert "length extrapolation, up to 32 times" in page and "4 runs: 2 initialisations, seeds 1, 2" in page
    results = json.loads((folder / "grid/perplexity_results.json").read_text())
    assert set(results) == {"log_uniform", "linear_decay"} and len(results["log_uniform"]["mean"]) == 2

    # What was measured is taken as it is, until options or the model change.
    file = folder / runs[0].evaluation
    content = json.loads(file.read_text())
    content["record"]["results"][0]["nats_per_token"] = 1.2345
    file.write_text(json.dumps(content))
    assert "1.2345" in run_script(folder, "eval.py --study text.toml").stdout
    assert "1.2345" not in run_script(folder, "eval.py --study text.toml --context 16").stdout

    # A run that is not there, and one of another length.
    (folder / runs[3].final).rename(folder / "grid/moved")
    (folder / runs[3].output).rename(folder / "grid/elsewhere")
    result = run_script(folder, "eval.py --study text.toml --report", code=1)
    assert "no model of seed 2, linear_decay: looked for grid/trained/seed-2-linear_decay-final" in result.stderr
    arguments = [argument.replace("--max-steps=6", "--max-steps=4") for argument in runs[3].arguments]
    run_script(folder, " ".join(["train.py", *arguments]))
    result = run_script(folder, "eval.py --study text.toml --report", code=1)
    assert "seed-1-log_uniform and seed-2-linear_decay cannot be compared: steps is 6 in the one and 4" in result.stderr


@pytest.mark.slow
def test_a_synthetic_task_is_trained_and_scored_by_the_same_scripts(study):
    folder, _ = study
    task = "synthetic:mqar:length=32,pairs=2,values=8,samples=64"
    train = f"train.py --model-path mamba2-40m/seed-42-uniform --dataset-path {task} --max-steps 2 --batch-size 4"
    train += " --eval-steps 1 --eval-windows 8 --sample-tokens 0 --gradient-accumulation-steps 1"
    run_script(folder, f"{train} --max-length 32 --output-dir task/seed-42-uniform")
    command = "eval.py --model-base-path task --initializations uniform --output-file task/r.json --report"
    result = run_script(folder, f"{command} --dataset-name {task}")
    assert " right" in result.stdout and "wrote task/report/report.html" in result.stdout
    recalled = json.loads((folder / "task/r.json").read_text())["uniform"]["details"][0]["recall"][0]
    assert sum(recalled["counts"]) == 2000 and recalled["source"] == task
    page = (folder / "task/report/report.md").read_text()
    assert "Share of right answers in synthetic:mqar" in page and "one initialisation only" in page
    wrong = run_script(folder, f"{train} --max-length 30 --output-dir task/x", code=1)
    assert "windows of 30 tokens cut samples of 32" in wrong.stderr


@pytest.mark.slow
def test_several_data_sets_and_protocols_in_one_call(study):
    folder, _ = study
    (folder / "more").mkdir()
    for i, split in enumerate(("train", "test")):
        (folder / f"more/{split}.txt").write_text("".join(TEXTS[i : i + 4]))

    def evaluate(options: str, code: int = 0) -> tuple[dict, str]:
        command = "eval.py --model-base-path out --initializations uniform --output-file several.json"
        result = run_script(folder, f"{command} {options}", code)
        return json.loads((folder / "several.json").read_text())["uniform"], result.stderr

    several = "--dataset-name more wikitext --protocol strided lm_eval --context 16"
    entry, _ = evaluate(f"{several} --stride 16 --batch-size 8")
    results = entry["details"][0]["results"]
    expected = [(name, protocol) for name in ("more", "wikitext") for protocol in ("strided", "lm_eval")]
    assert [(r["dataset"]["name"], r["protocol"]) for r in results] == expected
    assert entry["mean"] == [results[0]["perplexity"]]
    for r in results:
        assert r["nats_per_token"] == pytest.approx(sum(r["documents"]["nats"]) / sum(r["documents"]["tokens"]))
        assert {"bits_per_byte", "word_perplexity", "interval_95", "words", "bytes", "tokenizer", "context"} <= r.keys()
    assert results[2]["clusters"] == 2 and results[2]["dataset"]["config"] == "wikitext-2-raw-v1"
    other, _ = evaluate("--dataset-name more --dataset-split train test --stride 4")
    assert [r["dataset"]["split"] for r in other["details"][0]["results"]] == ["train", "test"]
    _, refused = evaluate(f"{several} --stride 17", code=1)
    assert "stride is 17, and must be from 1 to the context of 16" in refused
