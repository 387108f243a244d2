"""Shared by the scripts: presets, errors printed as one sentence, values that JSON can hold."""

import argparse
import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import tomli_w

from mamba2.files import write_text

# Packages that only some commands need, and the extra of pyproject.toml that installs each.
EXTRAS = {"triton": "gpu", "datasets": "data", "pyarrow": "data", "wandb": "wandb"}
EXTRAS |= {"tensorboard": "tensorboard", "lm_eval": "harness", "gguf": "gguf", "huggingface_hub": "hub"}
EXTRAS |= dict.fromkeys(("matplotlib", "PIL", "scipy"), "report")
ROOT = Path(__file__).parent.parent
INSTALLED = not (ROOT / "pyproject.toml").is_file()
CONFIGS = Path(__file__).parent / "configs" if INSTALLED else ROOT / "configs"
SECTIONS = ("init", "train", "eval")
NO_NAME = f"text in {sys.getfilesystemencoding()}, in which files are named here; PYTHONUTF8=1 makes that UTF-8"


def parse_arguments(
    parser: argparse.ArgumentParser, section: str, required: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Parse the command line over a preset.

    `--preset NAME` reads the table `section` of configs/NAME.toml, or of a .toml file by its path; its keys are the
    script's flags with underscores, and its values are checked like theirs. The command line overrides the preset. No
    arguments at all mean `--preset tiny`.
    """
    parser.allow_abbrev = False  # else `--pres` would pass here and be missed by `only_preset`
    parser.add_argument("--preset", help="defaults from configs/PRESET.toml or a .toml file; with no arguments: tiny")
    arguments = sys.argv[1:] or ["--preset", "tiny"]
    only_preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_preset.add_argument("--preset")
    preset = only_preset.parse_known_args(arguments)[0].preset
    if preset is not None:
        arguments = [*_read_preset(preset, section, parser), *arguments]
    parsed = parser.parse_args(arguments)
    for name in required:
        if getattr(parsed, name) is None:
            parser.error(f"--{name.replace('_', '-')} is required (`--preset tiny` gives every flag a value)")
    return parsed


def _read_preset(name: str, section: str, parser: argparse.ArgumentParser) -> list[str]:
    """The preset's table as command-line arguments."""
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml") if not file.name.startswith("study-")))
        parser.error(f"--preset {name}: there is no {path}; choose {names}, or a .toml file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        parser.error(f"{path} is not TOML: {error}")
    _refuse_unknown(tables, SECTIONS, f"{path}: table", parser)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "preset")}
    values = tables.get(section, {})
    _refuse_unknown(values, actions, f"{path}, [{section}]: key", parser)
    return flags(values, switches(parser))


def switches(parser: argparse.ArgumentParser) -> set[str]:
    """The options that take no value."""
    return {option for action in parser._actions if action.nargs == 0 for option in action.option_strings}


def shipped(name: str) -> Path:
    """The path `name`, or what is shipped under it: configs/tiny.json is there from any folder."""
    path = Path(name)
    return path if path.exists() or not (CONFIGS.parent / path).exists() else CONFIGS.parent / path


def flags(table: dict[str, Any], known: set[str] | None = None) -> list[str]:
    """A table as command-line arguments: true is --flag, false --no-flag, a list several values.

    `known`: the parser's `switches`, if available: only they are written so, and a false is left out where the parser
    has no --no-flag, because it is the default.
    """
    arguments = []
    for key, value in table.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool) and (known is None or flag in known):
            flag = flag if value else flag.replace("--", "--no-", 1)
            arguments += [flag] if known is None or flag in known else []
        elif isinstance(value, list) and len(value) != 1:
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value[0] if isinstance(value, list) else value}")  # may begin with a dash
    return arguments


def _refuse_unknown(given: Iterable[str], known: Iterable[str], what: str, parser: argparse.ArgumentParser) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, list(known), n=1)
            parser.error(f"{what} {key} is unknown{f'; did you mean {close[0]}?' if close else ''}")


def write_preset(file: Path, section: str, values: dict[str, object], comment: str) -> None:
    """Write `values` so that `--preset file` gives them again; None, which TOML does not have, is left out."""
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    text += "\n" + tomli_w.dumps({section: {key: value for key, value in values.items() if value is not None}})
    write_text(file, text)


def json_ready(value: Any) -> Any:
    """`value` with None for every nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_ready(v) for key, v in value.items()}
    if isinstance(value, list):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def extra_of(error: Exception) -> str | None:
    """The extra that a missing package belongs to; None for any other error."""
    return EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None


def explain_missing(error: Exception) -> str:
    """Of a missing package the command that installs it, else what the error says."""
    extra = extra_of(error)
    if extra is None:
        return str(error)
    wanted = [f"'{ROOT}[{extra}]'"]
    if INSTALLED:
        asked = (line.partition(";") for line in requires("mamba2"))
        wanted = [f"'{package.strip()}'" for package, _, only in asked if re.search(rf"\b{extra}\b", only)]
    return f"this needs the package {error.name}: pip install {' '.join(wanted)}"


def installed() -> None:
    """The commands mamba2-init, mamba2-train, mamba2-eval and mamba2-generate of an installation: those scripts."""
    name = Path(sys.argv[0]).stem.removeprefix("mamba2-")
    package = "mamba2.scripts." if INSTALLED else ""
    if not INSTALLED:  # by pip install -e: the scripts are those of the checkout
        sys.path.insert(0, str(ROOT))
    run(import_module("mamba2.generate" if name == "generate" else f"{package}{name}").main)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. User errors end as one sentence and exit code 1; MAMBA2_DEBUG=1 raises them."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a character that a terminal cannot show must not end a run
    sys.set_int_max_str_digits(0)  # a huge integer in a file is refused by the check of its key
    try:
        for argument in sys.argv[1:]:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise ValueError(f"the argument {os.fsencode(argument)} is not {NO_NAME}")
        main()
    except ModuleNotFoundError as error:
        if os.environ.get("MAMBA2_DEBUG") == "1" or extra_of(error) is None:
            raise
        print(f"error: {explain_missing(error)}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("MAMBA2_DEBUG") == "1":
            raise
        sentence = f"{error.object!r} is not {NO_NAME}" if isinstance(error, UnicodeEncodeError) else error
        short = re.sub(r"\d{50,}", lambda number: f"{number[0][:9]}… ({len(number[0])} digits)", str(sentence))
        print(f"error: {short}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
