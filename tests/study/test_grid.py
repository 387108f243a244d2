"""A study's file: the grid, what each script takes from it, and what is refused."""

import argparse
import sys

import pytest

import init
from mamba2.study import add_study, grid, read_study, study_runs
from mamba2.study.statistics import seeds_for_significance

TEXT = """
[study]
seeds = [1, 2]
initializations = ["log_uniform", "constant"]
baseline = "log_uniform"
output = "out"
[train]
learning_rate = 3e-3
no_reset = true
betas = [0.9, 0.99]
[eval]
context = 64
"""


def write(tmp_path, text=TEXT):
    file = tmp_path / "study.toml"
    file.write_text(text)
    return file


def test_a_run_has_its_folders_and_its_command(tmp_path):
    runs = study_runs(write(tmp_path))
    assert [(run.seed, run.initialization) for run in runs] == [
        (1, "log_uniform"),
        (1, "constant"),
        (2, "log_uniform"),
        (2, "constant"),
    ]
    assert str(runs[1].final) == "out/trained/seed-1-constant-final"
    folders = ["--model-path", "out/models/seed-1-constant", "--output-dir", "out/trained/seed-1-constant"]
    assert runs[1].arguments == [*folders, "--learning-rate=0.003", "--no-reset", "--betas", "0.9", "0.99"]


def test_a_name_may_say_how_a_run_is_trained(tmp_path):
    names = '["log_uniform", "log_uniform+dt_lr=0", "ones+A=slow+dt_lr=10+initial_state=passed"]'
    study = read_study(write(tmp_path, TEXT.replace('["log_uniform", "constant"]', names)))
    plain, frozen, last = study.runs()[:3]
    assert plain.model == frozen.model != last.model and plain.output != frozen.output
    assert (plain.options, frozen.options) == ({}, {"dt_lr": 0.0})
    assert last.options == {"dt_lr": 10.0, "initial_state": "passed"}
    assert str(last.model) == "out/models/seed-1-ones+A=slow"
    assert frozen.arguments[-1] == "--dt-lr=0.0" and str(frozen.final).endswith("seed-1-log_uniform+dt_lr=0-final")
    assert study.options("init")["initializations"] == ["log_uniform", "ones+A=slow"]
    assert len(study.options("eval")["initializations"]) == 3
    assert grid.factors("ones+A=slow+dt_lr=10") == {"dt_bias": "ones", "A": "slow", "dt_lr": "10"}
    assert grid.factors("mine") == {"dt_bias": "mine"}  # eval.py compares models of any name


def test_the_state_of_a_run_is_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)
    run = study_runs(file)[0]
    states = [run.state]
    for folder in (run.model, run.output, run.final):
        folder.mkdir(parents=True)
        states.append(run.state)
    run.evaluation.parent.mkdir()
    run.evaluation.write_text("{}")
    assert [*states, run.state] == ["missing", "created", "started", "trained", "evaluated"]
    monkeypatch.setattr(sys, "argv", ["study", str(file)])
    grid.main()
    assert capsys.readouterr().out.splitlines()[0].split()[:4] == ["evaluated", "seed", "1", "log_uniform"]
    monkeypatch.setattr(sys, "argv", ["study", str(file), "--commands"])
    grid.main()
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 3 and all("log_uniform-final" not in line for line in commands)


def parser():
    result = argparse.ArgumentParser()
    result.add_argument("--context", type=int, default=1024)
    result.add_argument("--seeds", type=int, nargs="+", default=[42])
    result.add_argument("--batch-size", type=int, default=1)
    return result


def test_a_script_takes_the_table_and_the_grid_and_the_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--study", str(write(tmp_path)), "--batch-size", "3"])
    p = parser()
    assert add_study(p, "eval").baseline == "log_uniform"
    args = p.parse_args()
    assert (args.context, args.seeds, args.batch_size) == (64, [1, 2], 3)
    assert args.model_base_path == "out/trained" and args.initializations == ["log_uniform", "constant"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--study", str(write(tmp_path)), "--context", "5"])
    p = parser()
    add_study(p, "eval")
    assert p.parse_args().context == 5
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    p = parser()
    assert add_study(p, "eval") is None and p.parse_args().context == 1024


def test_options_of_each_script(tmp_path):
    s = read_study(write(tmp_path))
    assert s.options("train")["model_path"][1] == "out/models/seed-1-constant"
    assert s.options("train")["output_dir"] == "out/trained"
    assert s.options("init") == {"seeds": [1, 2], "initializations": s.initializations, "output_path": "out/models"}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[train]", "[training]", "the table training is unknown; a study has study, init, train, eval"),
        ("output =", "folder =", "the key folder is unknown; choose seeds, initializations, baseline, output"),
        ('output = "out"', "", "output is missing"),
        (
            '"constant"]',
            '"constant+dt_lr=-1"]',
            "dt_lr of 'constant.dt_lr=-1' must be a number of at least 0, not '-1'",
        ),
        ('"constant"]', '"constant+A_lr=fast"]', "A_lr of .* must be a number of at least 0, not 'fast'"),
        ('"constant"]', '"constant+dt_lr=0+dt_lr=1"]', "names dt_lr twice"),
        ('"constant"]', '"constant+initial_state=x"]', "must be one of zero, noise, passed, continued, not 'x'"),
        ('"constant"]', '"constant+lr=1"]', "unknown factor 'lr=1'"),
        ("[1, 2]", "[1, 1]", "seeds names one twice"),
        ("[1, 2]", '["a"]', "must be a list of integers"),
        ('"constant"]', '"constnat"]', "unknown initialization 'constnat': choose from uniform, linear_decay"),
        (
            'baseline = "log_uniform"',
            'baseline = "ones"',
            "baseline is 'ones', and must be one of log_uniform, constant",
        ),
        ("[train]", 'hypothesis = ["log_uniform"]\n[train]', "must be two or more of log_uniform, constant"),
        ("[train]", 'hypothesis = ["ones", "constant"]\n[train]', "must be two or more of log_uniform, constant"),
        ("[train]", 'hypothesis = ["constant", "constant"]\n[train]', "hypothesis names one twice"),
        ("context = 64", "seeds = [3]", r"\[eval\]: seeds is decided by \[study\]; leave it out"),
        ("[study]", "[study", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        read_study(write(tmp_path, TEXT.replace(old, new)))


def test_an_unknown_key_of_a_script_and_a_missing_file_are_named(tmp_path, monkeypatch):
    file = write(tmp_path, TEXT.replace("context = 64", "contxt = 64"))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--study", str(file)])
    with pytest.raises(ValueError, match=r"\[eval\]: the key contxt is unknown to eval.py"):
        add_study(parser(), "eval")
    with pytest.raises(FileNotFoundError, match=r"no study at absent\.toml"):
        read_study("absent.toml")


@pytest.mark.parametrize(
    "name", ["text", "text-large", "text-rates", "text-states", "recall", "recall-short", "recall-rates"]
)
def test_the_studies_that_come_with_it_are_valid_and_large_enough(name, monkeypatch):
    s = read_study(f"configs/study-{name}.toml")
    begun = []  # init.py gets as far as making models, with parameters that something reads
    monkeypatch.setattr(init, "preview", lambda config, seed, names, parameters, output: begun.append(names))
    monkeypatch.setattr(init, "load_tokens", lambda data, split, tokenizer: None)
    monkeypatch.setattr(init, "measure_eigenvalue", lambda tokens, length: 2.0)
    monkeypatch.setattr(sys, "argv", ["init.py", "--study", str(s.path), "--preview"])
    init.main()
    assert begun == [s.options("init")["initializations"]]
    assert len(s.seeds) >= seeds_for_significance(len(s.initializations) - 1) and s.plan and s.hypothesis
