"""The best learning rate over widths, without and with muP (`Mamba2Config.width_multiple`).

    OMP_NUM_THREADS=1 python -m benchmarks.mup     # writes docs/mup.png
    python -m benchmarks.mup --steps 20            # a look, without the picture

Trains two layers on bytes of the Python standard library, each width with each rate, from the same seed and on the same
windows, and prints the loss on held-out windows. The base width is the smallest, where muP changes nothing, to the bit.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from mamba2.config import WEIGHT_INITS, Mamba2Config
from mamba2.data import STDLIB, Windows, load_tokens, load_validation
from mamba2.model import Mamba2LM
from mamba2.study import figures
from mamba2.tokenizer import get_tokenizer
from mamba2.training import make_optimizer
from mamba2.training.optimizer import Schedule
from mamba2.training.step import accumulate_gradients, mean_loss, update

WIDTHS = (64, 128, 256, 512)
RATES = tuple(2.0**power for power in range(-10, -4))
STEPS, BATCH, LENGTH = 100, 4, 64
PICTURE = Path(__file__).parent.parent / "docs" / "mup.png"


def config(width: int, mup_base_width: int | None) -> Mamba2Config:
    shape = {"num_hidden_layers": 2, "expand": 1, "head_dim": 32, "num_heads": width // 32, "n_groups": 1}
    shape |= {"vocab_size": 257, "hidden_size": width, "state_size": 16, "chunk_size": 64}
    return Mamba2Config(**shape, **WEIGHT_INITS["mamba_ssm"], weight_init="mamba_ssm", mup_base_width=mup_base_width)


def train(config: Mamba2Config, rate: float, steps: int, windows: Windows, held_out: Windows) -> float:
    """Held-out loss, nats per byte, after training with the peak `rate`; infinite where a gradient was not finite."""
    model = Mamba2LM(config)
    optimizer, schedule = make_optimizer(model, rate, (0.9, 0.99), 0.01), Schedule("cosine", steps, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule.factor(step)
        accumulate_gradients(model, windows, windows.indices(0, step, BATCH), BATCH, torch.float32)
        if update(model, optimizer, clip=1.0) is None:
            return math.inf
    return mean_loss(model, held_out, 128, 32, torch.float32)


def picture(losses: dict[str, dict[int, list[float]]]) -> bytes:
    """Loss against rate, a panel for each parametrisation and a line for each width: a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(losses), figsize=(9, 3.6), sharey=True, constrained_layout=True)
    for axis, (name, rows) in zip(axes, losses.items(), strict=True):
        for place, (width, row) in enumerate(rows.items()):
            color = plt.cm.viridis(place / len(WIDTHS))
            axis.semilogx(RATES, row, "-", color=color, base=2, label=f"width {width}")
            axis.plot(RATES[row.index(min(row))], min(row), "o", color=color)
        axis.set(title=name, xlabel="peak learning rate (dot: the best)")
        axis.grid(color="0.9")
    axes[0].set_ylabel("held-out loss, nats per byte")
    axes[0].legend()
    return figures.png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"[{STEPS}]")
    steps, started = parser.parse_args().steps, time.perf_counter()
    tokenizer = get_tokenizer("bytes")
    windows = Windows(load_tokens(STDLIB, "train", tokenizer), LENGTH)
    held_out = Windows(load_validation(STDLIB, tokenizer), LENGTH)
    losses: dict[str, dict[int, list[float]]] = {"standard": {}, "muP": {}}
    print(f"{'':8} {'width':>5} {' '.join(f'{rate:7.5f}' for rate in RATES)}  best rate")
    for width in WIDTHS:
        for name, base in (("standard", None), ("muP", WIDTHS[0])):
            if width == base:
                row = losses["standard"][width]
            else:
                row = [train(config(width, base), rate, steps, windows, held_out) for rate in RATES]
            losses[name][width] = row
            best = RATES[row.index(min(row))]
            print(f"{name:8} {width:5} {' '.join(f'{loss:7.4f}' for loss in row)}  {best:.5f}", flush=True)
    print(f"nats per byte after {steps} steps of {BATCH} x {LENGTH} bytes; {time.perf_counter() - started:.0f} s")
    if steps == STEPS:
        PICTURE.write_bytes(picture(losses))
        print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
