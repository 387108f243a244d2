"""Plot a run's metrics.jsonl: loss, gradient norm, and dt and half-life of each layer over training.

python -m mamba2.training.plot OUT            writes OUT/metrics.png
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from mamba2.cli import run
from mamba2.training.metrics import read_metrics


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of `folder`/metrics.jsonl. Raises FileNotFoundError if there is none, ValueError if it holds no step."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {folder}: name the --output-dir of a run")
    rows = read_metrics(file)
    if not any("loss" in row for row in rows):
        raise ValueError(f"{file} holds no training step yet")
    return rows


def column(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `name`. Values that were not finite are stored as null: such a row is
    left out, and inside a list the value is NaN."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=np.float64)


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Write the picture to `file`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["loss"] * 3 + ["gradient"] * 3, ["dt"] * 2 + ["moved"] * 2 + ["half_life"] * 2],
        figsize=(14, 8),
        constrained_layout=True,
    )
    loss, gradient = axes["loss"], axes["gradient"]
    figure.suptitle(title)
    loss.plot(*column(rows, "loss"), linewidth=0.8, label="training")
    loss.plot(*column(rows, "validation_loss"), "o-", markersize=4, label="validation")
    loss.set_ylabel("nats per token")
    loss.legend()
    gradient.semilogy(*column(rows, "gradient_norm"), linewidth=0.8, color="C2", label="gradient norm before clipping")
    gradient.semilogy(*column(rows, "learning_rate"), color="C3", label="learning rate")
    gradient.legend()
    for name, unit in (("dt", "dt"), ("half_life", "half-life in tokens")):
        axis = axes[name]
        at, medians = column(rows, f"{name}_median")  # (rows,), (rows, L)
        _, least = column(rows, f"{name}_min")
        _, most = column(rows, f"{name}_max")
        layers = medians.shape[1]
        for layer in range(layers):
            color = plt.cm.viridis(layer / max(1, layers - 1))
            axis.semilogy(at, medians[:, layer], color=color, label=f"layer {layer}")
            if name == "dt":
                axes["moved"].plot(at, medians[:, layer] / medians[0, layer], color=color)
        axis.fill_between(at, least.min(1), most.max(1), color="0.9", label="all heads of all layers")
        axis.set_ylabel(f"nominal {unit}, median of heads")
    axes["moved"].set_ylabel("the same, over its first value")
    axes["half_life"].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes.values():
        axis.set_xlabel("step")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="--output-dir of a run of train.py")
    folder = parser.parse_args().output_dir
    draw(read_rows(folder), str(folder), folder / "metrics.png")
    print(f"wrote {folder / 'metrics.png'}")


if __name__ == "__main__":
    run(main)
