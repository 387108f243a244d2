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
from mamba2.cli import CONFIGS, parse_arguments, write_preset

PRESETS = sorted(path.stem for path in CONFIGS.glob("*.toml") if not path.name.startswith("study-"))


def parse(monkeypatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.parse()


def refused(monkeypatch, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(monkeypatch, *arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accepted_by_every_script(monkeypatch, preset):
    base = ["--model-path", "m", "--output-dir", "o"]
    args = parse(monkeypatch, *base, "--preset", preset)
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
    base = ["--model-path", "m", "--output-dir", "o"]
    bare, default = vars(parse(monkeypatch, *base)), vars(parse(monkeypatch, *base, "--preset", "default"))
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
    ("text", "message"),
    [
        ("[train]\nlearning_rat = 1", "key learning_rat is unknown; did you mean learning_rate?"),
        ("[trian]\nseed = 1", "table trian is unknown; did you mean train?"),
        ("[train]\nbatch_size = 1.5", "invalid int value: '1.5'"),
        ("[train]\nbatch_size = true", "invalid int value: 'True'"),
        ('[train]\nschedule = "cosin"', "invalid choice: 'cosin'"),
        ("[train]\nclip = -1", "--clip must be at least 0, not -1.0"),
        ("[train", "is not TOML"),
    ],
)
def test_a_wrong_preset_is_refused_by_name(monkeypatch, capsys, tmp_path, text, message):
    (tmp_path / "p.toml").write_text(text)
    arguments = ["--preset", str(tmp_path / "p.toml"), "--model-path", "m", "--output-dir", "o"]
    assert message in refused(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
def test_a_value_out_of_its_domain_is_refused_by_name(monkeypatch, capsys, arguments, message):
    assert message in refused(monkeypatch, capsys, "--model-path", "m", "--output-dir", "o", *arguments)


def test_epochs_off_and_all_are_other_names(monkeypatch):
    base = ["--model-path", "m", "--output-dir", "o"]
    assert parse(monkeypatch, *base, "--epochs", "2.5").num_epochs == 2.5
    for word, value in (("off", 0), ("all", 1), ("3", 3)):
        assert parse(monkeypatch, *base, "--checkpoint-every", word).checkpoint_every == value


def test_what_is_written_can_be_read_as_a_preset(monkeypatch, tmp_path):
    strings = [
        'o"\\',
        "ä",
        "\U0001f600 名",
        "\n",
        "a\nb\r\nc",
        "\t\x0b",
        *map(chr, range(1, 32)),
        "\x7f",
        "\x85\u2028",
        "'",
    ]
    strings += ["-dash", "--clip=3", " ", "#", '"""', "\\u0041", "\ue000\uffff"]
    for text in strings:
        options = ("--clip", "0.1", "--eps", "1e-30", "--no-keep-best", "--no-reset")
        args = parse(monkeypatch, f"--model-path={text}", f"--output-dir={text}", f"--dataset-path={text}", *options)
        values = {key: value for key, value in vars(args).items() if key != "preset"}
        write_preset(tmp_path / "p.toml", "train", values, f"a comment {text!r}\nof two lines")
        again = parse(monkeypatch, "--preset", str(tmp_path / "p.toml"))
        assert {**vars(again), "preset": None} == vars(args)
    args = parse(monkeypatch, "--model-path", "ä", "b", "--output-dir", "o")
    write_preset(tmp_path / "p.toml", "train", {"model_path": args.model_path, "output_dir": "o"}, "two models")
    assert vars(parse(monkeypatch, "--preset", str(tmp_path / "p.toml"))) == {
        **vars(args),
        "preset": str(tmp_path / "p.toml"),
    }


# A system that names files in ASCII: paths come as bytes that are none of its characters, and what is printed is ASCII.
ASCII = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("script", ["init.py", "train.py", "eval.py", "-mmamba2.generate", "-mmamba2.checkpoint"])
def test_a_path_that_the_system_cannot_name_is_refused_first(tmp_path, script):
    command = [sys.executable, script, "--output-dir", f"{tmp_path}/\U0001f600"]
    result = subprocess.run(command, env=ASCII, capture_output=True, cwd=CONFIGS.parent)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert result.stderr.startswith(b"error: the argument b'") and result.stderr.count(b"\n") == 1
    assert b"is not text in ascii, in which files are named here; PYTHONUTF8=1 makes that UTF-8" in result.stderr


def test_what_a_terminal_cannot_show_ends_no_run_and_a_preset_cannot_name_what_the_system_cannot(tmp_path):
    program = (
        "from mamba2 import cli\n"
        "def main():\n    print('caf\\u00e9 \\U0001f600', flush=True)\n    open('\\U0001f600', 'w', encoding='utf-8')\n"
        "cli.run(main)"
    )
    result = subprocess.run([sys.executable, "-c", program], env=ASCII, capture_output=True, cwd=CONFIGS.parent)
    assert (result.returncode, result.stdout) == (1, b"caf\\xe9 \\U0001f600\n")
    assert result.stderr.startswith(b"error: '\\U0001f600' is not text in ascii") and result.stderr.count(b"\n") == 1


def test_numbers_of_thousands_of_digits_are_named_and_not_printed(tmp_path):
    text = '{"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 1%s}' % ("0" * 5000)
    (tmp_path / "config.json").write_text(text)
    command = [sys.executable, "init.py", "--config-path", tmp_path, "--output-path", tmp_path / "models"]
    result = subprocess.run(command, capture_output=True, cwd=CONFIGS.parent, text=True)
    said = "num_hidden_layers is 100000000… (5001 digits), and must be an integer of at least 1 that int64 holds"
    assert (result.returncode, result.stderr) == (1, f"error: {tmp_path / 'config.json'}: {said}\n")
