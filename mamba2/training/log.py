"""Give finished runs to TensorBoard or wandb, as `train.py --log` does while they train.

python -m mamba2.training.log OUT ... --to tensorboard       writes OUT/tensorboard
python -m mamba2.training.log OUT ... --to wandb             one wandb run each, of the project in OUT/train.toml
"""

import argparse
import tomllib
from pathlib import Path

from mamba2.cli import run
from mamba2.training.metrics import Tracker
from mamba2.training.plot import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output_dir", type=Path, nargs="+", help="--output-dir of a run of train.py, or several")
    add("--to", choices=("tensorboard", "wandb"), required=True)
    add("--wandb", choices=("online", "offline"), help="[online if there is an API key, else offline]")
    args = parser.parse_args()
    runs = []
    for folder in dict.fromkeys(args.output_dir):
        if (folder / args.to).exists():
            raise FileExistsError(f"{folder / args.to} is there already; remove it to write it anew")
        rows = read_rows(folder)
        options = tomllib.loads((folder / "train.toml").read_text(encoding="utf-8"))["train"]
        runs.append((folder, rows, {**options, "wandb": args.wandb}))
    for folder, rows, options in runs:
        tracker = Tracker([args.to], folder, options, strict=True)
        for row in rows:
            tracker.log(row)
        tracker.finish()
        print(f"wrote {folder / args.to}")


if __name__ == "__main__":
    run(main)
