"""Presets: what they set, what wins over them, and what is refused by name."""

import argparse
import os
import subprocess
import sys
import tomllib

import pytest

import eval as eval_script
import init
import train
from mamba2.cli import CONFIGS, parse_arguments, run, write_preset

PRESETS = sorted(path.stem for path in CONFIGS.glob("*.toml") if not path.name.startswith("study-"))
BASE = ["--model-path", "m", "--output-dir", "o"]


def parse(monkeypatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.parse()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accepted_by_every_script(monkeypatch, preset):
    args = parse(monkeypatch, *BASE, "--preset", preset)
    table = tomllib.loads((CONFIGS / f"{preset}.toml").read_text())
    given = {k: v for k, v in table["train"].items() if k not in ("model_path", "output_dir")}
    assert {key: getattr(args, key) for key in given} == given
    for script, section in ((init, "init"), (eval_script, "eval")):
        monkeypatch.setattr(sys, "argv", ["x", "--preset", preset])
        monkeypatch.setattr(script, "parse_arguments", lambda parser, name, required=(): parsed(parser, name))
        with pytest.raises(Parsed) as result:
            script.main()
        values = vars(result.value.args[0])
        assert all(values[key] == value for key, value in table.get(section, {}).items())


class Parsed(Exception):
    pass


def parsed(parser: argparse.ArgumentParser, section: str) -> None:
    raise Parsed(parse_arguments(parser, section))


def test_the_default_preset_is_what_train_does_without_one(monkeypatch):
    bare, default = vars(parse(monkeypatch, *BASE)), vars(parse(monkeypatch, *BASE, "--preset", "default"))
    assert default.pop("preset") == "default" and bare.pop("preset") is None
    assert default == bare
    listed = tomllib.loads((CONFIGS / "default.toml").read_text())["train"]
    assert listed.keys() == {key for key, value in bare.items() if value is not None} - {"model_path", "output_dir"}


def test_the_command_line_wins_and_flags_can_be_undone(monkeypatch, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nmodel_path = ["a", "b"]\noutput_dir = "o"\nbatch_size = 3\nkeep_best = false\n')
    args = parse(monkeypatch, "--preset", str(file), "--batch-size", "4", "--model-path", "c")
    assert (args.batch_size, args.model_path, args.keep_best, args.output_dir) == (4, ["c"], False, "o")
    assert parse(monkeypatch, "--preset", str(file), "--keep-best").keep_best


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[train]\nlearning_rat = 1", "key learning_rat is unknown; did you mean learning_rate?"),
        ("[trian]\nseed = 1", "table trian is unknown; did you mean train?"),
        ("[train]\nbatch_size = 1.5", "invalid int value: '1.5'"),
        ("[train]\nbatch_size = true", "invalid int value: 'True'"),
        ('[train]\nschedule = "cosin"', "invalid choice: 'cosin'"),
        ("[train]\nclip = -1", "--clip must be at least 0, not -1.0"),
        ("[train", "is not TOML"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--warmup-ratio", "1.5"], "--warmup-ratio must be from 0 to 1"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--betas", "0.9", "1"], "--betas must be from 0 to below 1"),
        (["--checkpoint-every", "-1"], "--checkpoint-every"),
        (["--checkpoint-every", "some"], "invalid"),
        (["--preset", "huge"], "choose 1.3b, 130m"),
        (["--batch", "3"], "unrecognized arguments: --batch 3"),
    ],
)
def test_a_wrong_preset_and_a_value_out_of_its_domain_are_refused(monkeypatch, capsys, tmp_path, given, message):
    if isinstance(given, str):
        (tmp_path / "p.toml").write_text(given)
        given = ["--preset", str(tmp_path / "p.toml")]
    with pytest.raises(SystemExit) as exit:
        parse(monkeypatch, *BASE, *given)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_epochs_off_and_all_are_other_names(monkeypatch):
    assert parse(monkeypatch, *BASE, "--epochs", "2.5").num_epochs == 2.5
    for word, value in (("off", 0), ("all", 1), ("3", 3)):
        assert parse(monkeypatch, *BASE, "--checkpoint-every", word).checkpoint_every == value


def test_what_is_written_can_be_read_as_a_preset(monkeypatch, tmp_path):
    strings = ['o"\\', "ä", "\U0001f600 名", "a\nb\r\nc", "\t\x0b", "\x7f", "\x85\u2028", "'", " ", "#", '"""']
    strings += ["-dash", "--clip=3", "\\u0041", "\ue000\uffff", *map(chr, range(1, 32))]
    given = [[f"--model-path={text}", f"--output-dir={text}", f"--dataset-path={text}"] for text in strings]
    for names in (*given, ["--model-path", "ä", "b", "--output-dir", "o"]):
        args = parse(monkeypatch, *names, "--clip", "0.1", "--eps", "1e-30", "--no-keep-best", "--no-reset")
        values = {key: value for key, value in vars(args).items() if key != "preset"}
        write_preset(tmp_path / "p.toml", "train", values, f"a comment {names!r}\nof two lines")
        again = parse(monkeypatch, "--preset", str(tmp_path / "p.toml"))
        assert {**vars(again), "preset": None} == vars(args)


SCRIPTS = [CONFIGS.parent / name for name in ("init.py", "train.py", "eval.py")]
SCRIPTS += [file for file in (CONFIGS.parent / "mamba2").rglob("*.py") if "__main__" in file.read_text()]


def test_every_command_runs_inside_of_what_reports_errors():
    assert {"generate.py", "__main__.py", "plot.py"} <= {file.name for file in SCRIPTS}
    for file in SCRIPTS:
        assert file.read_text().endswith("run(main)\n"), file


# A system that names files in ASCII: paths come as bytes that are none of its characters, and what is printed is ASCII.
ASCII = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAM = """
import contextlib, sys
from mamba2 import cli

def main():
    print('caf\\u00e9 \\U0001f600', flush=True)
    open('\\U0001f600', 'w', encoding='utf-8')

with contextlib.suppress(SystemExit):
    cli.run(main)
del sys.argv[1:]
cli.run(main)
"""


def test_what_the_system_cannot_name_is_refused_and_what_a_terminal_cannot_show_ends_no_run(tmp_path):
    """A path on the command line is refused before `main` runs; one from elsewhere, a preset say, when it is opened."""
    command = [sys.executable, "-c", PROGRAM, f"{tmp_path}/\U0001f600"]
    result = subprocess.run(command, env=ASCII | {"PYTHONPATH": str(CONFIGS.parent)}, capture_output=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, b"caf\\xe9 \\U0001f600\n") and not list(tmp_path.iterdir())
    argument, opened = result.stderr.splitlines()
    assert argument.startswith(b"error: the argument b'")
    assert argument.endswith(b"is not text in ascii, in which files are named here; PYTHONUTF8=1 makes that UTF-8")
    assert opened.startswith(b"error: '\\U0001f600' is not text in ascii")


def test_numbers_of_thousands_of_digits_are_named_and_not_printed(tmp_path, monkeypatch, capsys):
    sys.set_int_max_str_digits(4300)  # Python's default, which an earlier test may have changed
    text = '{"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 1%s}' % ("0" * 5000)
    (tmp_path / "config.json").write_text(text)
    options = ["--config-path", str(tmp_path), "--output-path", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", ["init.py", *options])
    with pytest.raises(SystemExit) as exit:
        run(init.main)
    said = "num_hidden_layers is 100000000… (5001 digits), and must be an integer of at least 1 that int64 holds"
    assert (exit.value.code, capsys.readouterr().err) == (1, f"error: {tmp_path / 'config.json'}: {said}\n")
