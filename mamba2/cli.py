"""What the three scripts share: presets, and errors as one sentence."""

import argparse
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"


def parse_arguments(
    parser: argparse.ArgumentParser, section: str, required: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Parse the command line over a preset.

    `--preset NAME` reads the table `section` of configs/NAME.toml, whose keys are the script's flags with underscores;
    what the command line says wins. No arguments at all mean `--preset tiny`.
    """
    parser.add_argument("--preset", help="defaults from configs/PRESET.toml; with no arguments at all: tiny")
    arguments = sys.argv[1:] or ["--preset", "tiny"]
    preset = parser.parse_args(arguments).preset
    if preset is not None:
        parser.set_defaults(**_read_preset(preset, section, parser))
    parsed = parser.parse_args(arguments)
    for name in required:
        if getattr(parsed, name) is None:
            parser.error(f"--{name.replace('_', '-')} is required (`--preset tiny` gives every flag a value)")
    return parsed


def _read_preset(name: str, section: str, parser: argparse.ArgumentParser) -> dict:
    path = CONFIGS / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
        parser.error(f"--preset {name}: there is no {path}; choose {names}")
    values = tomllib.loads(path.read_text(encoding="utf-8")).get(section, {})
    known = {action.dest for action in parser._actions}
    if unknown := sorted(values.keys() - known):
        parser.error(f"{path}, [{section}]: unknown {', '.join(unknown)}")
    return values


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. What the user can mend ends as one sentence and exit code 1; MAMBA2_DEBUG=1 shows all."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("MAMBA2_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
