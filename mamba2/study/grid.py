"""A grid of runs in one file: seeds × initialisations × budget.

    python init.py  --study configs/study-text.toml
    python train.py --study configs/study-text.toml
    python eval.py  --study configs/study-text.toml --report
    python -m mamba2.study configs/study-text.toml        what there is to do, and what is done

Each script skips finished runs, so a command can be given again. The file has a table [study]: seeds, initializations,
baseline (what the others are compared with), output (a folder), and optionally plan: what is expected and why so many
seeds, in words that the report prints with the file's hash; and hypothesis: initialisations in the expected order of
loss, lowest first, which the report tests. The tables [init], [train], [eval] have flags of the scripts, like presets.
A name may also say how a run is trained, log_uniform+dt_lr=0, so that training is crossed with initialisations: dt_lr,
A_lr and initial_state of train.py. Two studies with one output share the runs that both name. Files:

    OUTPUT/models/seed-S-NAME           from init.py; NAME without what it says of training
    OUTPUT/trained/seed-S-NAME          metrics and checkpoints from train.py, and the final model in seed-S-NAME-final
    OUTPUT/evaluations/seed-S-NAME.json from eval.py
    OUTPUT/report                       eval.py --report
"""

import argparse
import math
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba2 import cli
from mamba2.data import INITIAL_STATES
from mamba2.factors import parse_initialization
from mamba2.files import sha256

# Flags that [study] sets, and that the other tables must not have.
DECIDED = {
    "init": ("seeds", "initializations", "output_path"),
    "train": ("model_path", "output_dir"),
    "eval": ("model_base_path", "seeds", "initializations", "output_file", "baseline", "checkpoint"),
}
KEYS = ("seeds", "initializations", "baseline", "output")
OPTIONAL = ("plan", "hypothesis")
TRAINED = ("dt_lr", "A_lr", "initial_state")  # options of train.py that a name may state


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """An initialisation, and the options of training that the name states: log_uniform+A=ones+dt_lr=0 is
    log_uniform+A=ones and {"dt_lr": 0.0}. Raises ValueError naming what is unknown or out of its domain."""
    first, *products = name.split("+")
    options: dict[str, Any] = {}
    for product in products:
        key, _, text = product.partition("=")
        if key not in TRAINED:
            first += f"+{product}"
        elif key in options:
            raise ValueError(f"{name!r} names {key} twice")
        elif key == "initial_state":
            if text not in INITIAL_STATES:
                raise ValueError(f"{key} of {name!r} must be one of {', '.join(INITIAL_STATES)}, not {text!r}")
            options[key] = text
        else:
            try:
                options[key] = float(text)
            except ValueError:
                options[key] = -1.0
            if not 0 <= options[key] < math.inf:
                raise ValueError(f"{key} of {name!r} must be a number of at least 0, not {text!r}")
    parse_initialization(first)
    return first, options


def factors(name: str) -> dict[str, str]:
    """What a name says, by factor: {"dt_bias": "log_uniform", "A": "ones", "dt_lr": "0"}. Any name, known or not."""
    first, *products = name.split("+")
    return {"dt_bias": first, **{key: level for key, _, level in (product.partition("=") for product in products)}}


@dataclass(frozen=True)
class StudyRun:
    """One run: its files and folders, and the arguments of train.py."""

    seed: int
    initialization: str
    model: Path
    output: Path
    evaluation: Path
    options: dict[str, Any]  # of train.py, that the name states
    arguments: list[str]  # of train.py

    @property
    def final(self) -> Path:
        return self.output.with_name(self.output.name + "-final")

    @property
    def state(self) -> str:
        """The last stage that it reached."""
        stages = {"evaluated": self.evaluation, "trained": self.final, "started": self.output, "created": self.model}
        return next((stage for stage, path in stages.items() if path.exists()), "missing")


@dataclass(frozen=True)
class Study:
    """The contents of a study's file."""

    path: Path
    seeds: list[int]
    initializations: list[str]
    baseline: str
    plan: str  # what was said before the runs, or nothing
    hypothesis: list[str]  # initialisations in the order of loss that is expected, or none
    output: Path
    tables: dict[str, dict[str, Any]]

    def runs(self) -> list[StudyRun]:
        """Every run, seed by seed, so that a study cut short has complete pairs."""
        runs = []
        for seed in self.seeds:
            for name in self.initializations:
                label = f"seed-{seed}-{name}"
                initialization, options = split_name(name)
                model = self.output / "models" / f"seed-{seed}-{initialization}"
                output = self.output / "trained" / label
                flags = cli.flags({**self.tables["train"], **options})
                arguments = ["--model-path", str(model), "--output-dir", str(output), *flags]
                evaluation = self.output / "evaluations" / f"{label}.json"
                runs.append(StudyRun(seed, name, model, output, evaluation, options, arguments))
        return runs

    @property
    def registered(self) -> str:
        """The file that states plan and hypothesis, and its sha256, for the report."""
        return f"{self.path}, sha256 {sha256(self.path)}"

    def options(self, section: str) -> dict[str, Any]:
        """The flags of a script that [study] sets, and their values."""
        grid = {"seeds": self.seeds, "initializations": self.initializations}
        if section == "init":
            made = list(dict.fromkeys(split_name(name)[0] for name in self.initializations))
            return {"seeds": self.seeds, "initializations": made, "output_path": str(self.output / "models")}
        if section == "train":
            models = [str(run.model) for run in self.runs()]
            return {"model_path": models, "output_dir": str(self.output / "trained")}
        results = str(self.output / "perplexity_results.json")
        trained = str(self.output / "trained")
        return {**grid, "model_base_path": trained, "output_file": results, "baseline": self.baseline}


def read_study(path: str | Path) -> Study:
    """Read a study. Raises FileNotFoundError, or ValueError naming the key that is missing, unknown or wrong."""
    path = cli.shipped(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study at {path}: give a .toml file such as configs/study-text.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    if unknown := sorted(content.keys() - {"study", *DECIDED}):
        raise ValueError(f"{path}: the table {unknown[0]} is unknown; a study has study, init, train, eval")
    values = content.get("study", {})
    if unknown := sorted(values.keys() - {*KEYS, *OPTIONAL}):
        known = ", ".join((*KEYS, *OPTIONAL))
        raise ValueError(f"{path}, [study]: the key {unknown[0]} is unknown; choose {known}")
    if missing := [key for key in KEYS if key not in values]:
        raise ValueError(f"{path}, [study]: {missing[0]} is missing")
    tables = {section: content.get(section, {}) for section in DECIDED}
    for section, table in tables.items():
        if decided := sorted(table.keys() & set(DECIDED[section])):
            raise ValueError(f"{path}, [{section}]: {decided[0]} is decided by [study]; leave it out")
    seeds, names, baseline = values["seeds"], values["initializations"], values["baseline"]
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{path}, [study]: seeds is {seeds!r}, and must be a list of integers")
    if not isinstance(names, list) or not names or any(not isinstance(name, str) for name in names):
        raise ValueError(f"{path}, [study]: initializations is {names!r}, and must be a list of names")
    for name in names:
        try:
            split_name(name)
        except ValueError as error:
            raise ValueError(f"{path}, [study]: {error}") from None
    plan, hypothesis = values.get("plan", ""), values.get("hypothesis", [])
    if not isinstance(plan, str):
        raise ValueError(f"{path}, [study]: plan is {plan!r}, and must be text")
    if not isinstance(hypothesis, list) or len(hypothesis) == 1 or any(name not in names for name in hypothesis):
        raise ValueError(
            f"{path}, [study]: hypothesis is {hypothesis!r}, and must be two or more of {', '.join(names)}, the lowest "
            "loss expected first"
        )
    for key, items in (("seeds", seeds), ("initializations", names), ("hypothesis", hypothesis)):
        if len(set(items)) < len(items):
            raise ValueError(f"{path}, [study]: {key} names one twice")
    if baseline not in names:
        raise ValueError(f"{path}, [study]: baseline is {baseline!r}, and must be one of {', '.join(names)}")
    return Study(path, seeds, names, baseline, plan, hypothesis, Path(values["output"]), tables)


def study_runs(path: str | Path) -> list[StudyRun]:
    """The runs of a study's file; see `read_study` for the errors."""
    return read_study(path).runs()


def add_study(parser: argparse.ArgumentParser, section: str) -> Study | None:
    """Add `--study FILE` to a script's parser; if the command line has it, the study's values become the defaults.

    Call it after all other flags are added and before parsing. Keys and values are checked like flags.
    """
    parser.add_argument("--study", metavar="FILE", help="run a grid, e.g. configs/study-text.toml; see mamba2/study")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--study")
    path = peek.parse_known_args(sys.argv[1:])[0].study
    if path is None:
        return None
    study = read_study(path)
    table = study.tables[section]
    if unknown := sorted(table.keys() - {action.dest for action in parser._actions}):
        raise ValueError(f"{path}, [{section}]: the key {unknown[0]} is unknown to {section}.py")
    parsed = vars(parser.parse_args(cli.flags(table, cli.switches(parser))))
    parser.set_defaults(**{key: parsed[key] for key in table}, **study.options(section))
    return study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="FILE")
    parser.add_argument("--commands", action="store_true", help="print the train.py command of each unfinished run")
    args = parser.parse_args()
    for run in study_runs(args.study):
        if not args.commands:
            print(f"{run.state:10} seed {run.seed:4}  {run.initialization:24} {run.final}")
        elif not run.final.exists():
            print("python train.py", *run.arguments)
