"""Figures of the preview and the report. Each function draws one and returns a matplotlib Figure.

An initialisation has the same colour everywhere. Every run is drawn, thin; a mean over seeds is thick.
"""

import io
import textwrap
from collections.abc import Iterable

import numpy as np

from mamba2.initializers import INITIALIZERS
from mamba2.study.statistics import EQUIVALENCE, Paired

GRID = {"color": "0.9", "linewidth": 0.8}


def _pyplot():
    """matplotlib is slow to import, and only figures need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    return plt


def png(figure) -> bytes:
    """The figure as a PNG file of at most 255 colours, a third as large as in full colour. Closes the figure."""
    from PIL import Image  # what matplotlib writes PNGs with

    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    _pyplot().close(figure)
    # It holds no date or version: two runs give the same bytes.
    Image.open(drawn).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()


_products: list[str] = []  # of the report that is being drawn


def use_names(names: Iterable[str]) -> None:
    """The names of a report, so that its products have colours that differ."""
    _products[:] = [name for name in names if name not in INITIALIZERS["dt_bias"]]


def color(name: str):
    """The colour of an initialisation, by its place in the registry: the same in every figure of every report. That of
    a product is by its place among those of the report."""
    names = list(INITIALIZERS["dt_bias"])
    if name not in names:
        return _pyplot().get_cmap("Dark2")(_products.index(name) % 8)
    place = names.index(name)
    # The strong half of tab20 first: the first ten initialisations can be told apart best.
    return _pyplot().get_cmap("tab20")((2 * place) % 20 + (place >= 10))


def _legend(figure, axis) -> None:
    """What `axis` names, below all panels, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    kept = [(handle, label) for handle, label in zip(handles, labels) if label]
    columns = max(1, min(4, int(12 * figure.get_figwidth() / max(len(label) + 5 for _, label in kept))))
    figure.tight_layout()
    figure.legend(*zip(*kept), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, frameon=False, fontsize=8)


def _above(name: str, what: str) -> str:
    """A title of a narrow panel: the initialisation, broken between its factors, and below it what is shown."""
    return "\n".join([*textwrap.wrap(name.replace("+", " +"), 34), what])


def _labelled(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(True, **GRID)
    axis.set_axisbelow(True)


def _heat(axis, values: np.ndarray, title: str, norm, cmap: str):
    image = axis.imshow(values, aspect="auto", norm=norm, cmap=cmap, interpolation="nearest")
    axis.set_title(title, loc="left", fontsize=8)
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 6)))
    axis.set_yticks(range(0, values.shape[0], max(1, values.shape[0] // 4)))
    return image


def _log_norm(*arrays: np.ndarray):
    from matplotlib.colors import LogNorm

    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    return LogNorm(low, high if high > low else low * 1.001)


# ---------------------------------------------------------------------------------------------------------- an endpoint


def forest(comparisons: list[Paired], what: str):
    """Paired differences: each seed, the mean with its 95 % t interval, and the band that counts as no difference."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.5 * len(comparisons)))
    ordered = sorted(comparisons, key=lambda c: -c.interval.mean)
    axis.axvspan(-EQUIVALENCE, EQUIVALENCE, color="0.92", label=f"±{EQUIVALENCE} nats: no difference")
    axis.axvline(0, color="0.4", linewidth=0.8)
    for row, c in enumerate(ordered):
        i = c.interval
        axis.plot(c.differences, [row - 0.18] * len(c.differences), "o", color=color(c.name), alpha=0.45, markersize=4)
        if np.isfinite(i.low):
            axis.plot([i.low, i.high], [row, row], color=color(c.name), linewidth=2)
        axis.plot(i.mean, row, "D", color=color(c.name), markersize=6)
    axis.set_yticks(range(len(ordered)), [c.name for c in ordered])
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    _labelled(axis, "", f"{what}: difference from {comparisons[0].baseline}, nats   (left: better)", "")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 1.18), frameon=False)
    return figure


Curves = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]  # x and y by initialisation and seed


def curves(
    data: Curves,
    baseline: str,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    mark: float | None = None,
    zoom: bool = False,
    unit: str = "nats   (below zero: better)",
):
    """Left: every run and the mean over seeds. Right: the same minus the baseline's run of the same seed.

    `unit`: of the difference. `mark`: a vertical line at the training length. `zoom`: the y axis spans what the curves
    span without their first quarter.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, runs in data.items():
        _bundle(left, list(runs.values()), name, color(name))
        paired = [(xs, ys - data[baseline][seed][1]) for seed, (xs, ys) in runs.items() if seed in data[baseline]]
        if name != baseline and paired:
            _bundle(right, paired, name, color(name))
    right.axhline(0, color=color(baseline), linewidth=1.5, label=f"{baseline} (baseline)")
    _labelled(left, title, x, y)
    _labelled(right, f"difference from {baseline}, same seed", x, unit)
    for axis in (left, right):
        if log_x:
            axis.set_xscale("log", base=2)
        if mark:
            axis.axvline(mark, color="0.5", linestyle=":", label="training length")
    if zoom:
        late = np.concatenate([ys[len(ys) // 4 :] for runs in data.values() for _, ys in runs.values()])
        left.set_ylim(late.min() - 0.05 * np.ptp(late), late.max() + 0.05 * np.ptp(late))
        late = [
            (ys - data[baseline][seed][1])[len(ys) // 4 :]
            for runs in data.values()
            for seed, (_, ys) in runs.items()
            if seed in data[baseline]
        ]
        reach = 1.1 * max(float(np.abs(d).max()) for d in late) + 1e-6
        right.set_ylim(-reach, reach)
    _legend(figure, left)
    return figure


def _bundle(axis, runs: list[tuple[np.ndarray, np.ndarray]], label: str, its_color, style: str = "-") -> None:
    for xs, ys in runs:
        axis.plot(xs, ys, style, color=its_color, alpha=0.3, linewidth=0.8)
    if all(len(xs) == len(runs[0][0]) for xs, _ in runs):
        axis.plot(runs[0][0], np.mean([ys for _, ys in runs], axis=0), style, color=its_color, linewidth=2, label=label)
    else:
        axis.plot([], [], style, color=its_color, linewidth=2, label=label)


def two_states(data: dict[str, tuple[Curves, Curves]], title: str, x: str, y: str):
    """Before (dashed) and after (solid) training, log-log, a panel for each key of `data`."""
    plt = _pyplot()
    columns = min(3, len(data))
    rows = -(-len(data) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns + 1, 3.1 * rows), squeeze=False, sharey=True)
    for axis, (panel, (before, after)) in zip(axes.flat, data.items()):
        for curves_of, style in ((before, "--"), (after, "-")):
            for name, runs in curves_of.items():
                _bundle(axis, list(runs.values()), f"{name}, after" if style == "-" else "", color(name), style)
        _labelled(axis, f"{title}{panel}", x, y)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    for axis in list(axes.flat)[len(data) :]:
        axis.set_visible(False)
    _legend(figure, axes.flat[0])
    return figure


# ------------------------------------------------------------------------------------------------------------ heat-maps


def half_lives(data: dict[str, dict[str, np.ndarray]]):
    """Half-life by layer and head; a row for each initialisation, a column for each state, one colour scale."""
    plt = _pyplot()
    titles = list(next(iter(data.values())))
    figure, axes = plt.subplots(
        len(data), len(titles), figsize=(3 * len(titles) + 1, 1.7 * len(data) + 0.4), squeeze=False
    )
    norm = _log_norm(*(values for columns in data.values() for values in columns.values()))
    for row, (name, columns) in zip(axes, data.items()):
        for axis, (title, values) in zip(row, columns.items()):
            image = _heat(axis, values, _above(name, title), norm, "viridis")
    figure.tight_layout()
    figure.colorbar(image, ax=axes, label="half-life, tokens", fraction=0.025)
    return figure


def decay_masks(data: dict[str, dict[str, np.ndarray]]):
    """What is left of token j at token i, from white (nothing) to dark (all)."""
    plt = _pyplot()
    columns = max(len(masks) for masks in data.values())
    figure, axes = plt.subplots(len(data), columns, figsize=(2.2 * columns + 1, 2.2 * len(data)), squeeze=False)
    for row, (name, masks) in zip(axes, data.items()):
        for axis, (title, mask) in zip(row, masks.items()):
            image = axis.imshow(mask, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
            axis.set_title(_above(name, title), fontsize=8, loc="left")
            axis.set_xlabel("written at token j")
            axis.set_ylabel("read at token i")
    figure.tight_layout()
    figure.colorbar(image, ax=axes, label="share of j left at i", fraction=0.025)
    return figure


# -------------------------------------------------------------------------------------------------- layers and training


def by_layer(data: dict[str, dict[str, list[np.ndarray]]], quantities: dict[str, str]):
    """A panel for each quantity, against the layer; every seed thin, the mean thick."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(quantities), figsize=(3.4 * len(quantities), 3.2), squeeze=False)
    for axis, (key, label) in zip(axes[0], quantities.items()):
        for name, values in data.items():
            _bundle(axis, [(np.arange(len(v)), v) for v in values[key]], name, color(name))
        _labelled(axis, label, "layer", "")
        low, high = (f([v for values in data.values() for v in np.ravel(values[key])]) for f in (min, max))
        axis.set_yscale("log")
        axis.set_ylim(low / 1.5, high * 1.5)  # or a difference of 10 % would fill the panel
        axis.set_xticks(range(0, len(next(iter(data.values()))[key][0]), 1 + len(values[key][0]) // 8))
    _legend(figure, axes[0][0])
    return figure


def drift(data: dict[str, list[tuple[np.ndarray, np.ndarray, float, float]]]):
    """How far dt_bias has moved, against the sum of learning rates, about the most that Adam can move it.

    Each run: Σ lr and drift while training (perhaps empty), drawn as a line; Σ lr and drift at the end, a diamond.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4))
    furthest = max(end for runs in data.values() for _, _, end, _ in runs)
    axis.plot([0, furthest], [0, furthest], ":", color="0.5", label="Σ lr: about the most that Adam can do")
    for name, runs in data.items():
        for number, (xs, ys, end, moved) in enumerate(runs):
            axis.plot(xs, ys, color=color(name), alpha=0.6, linewidth=1)
            label = name if number == 0 else None
            axis.plot(end, moved, "D", color=color(name), alpha=0.6, markersize=5, label=label)
    _labelled(axis, "drift of dt_bias", "Σ learning rate", "mean distance of dt_bias from its beginning")
    _legend(figure, axis)
    return figure


def preview(rows: dict[str, dict[str, np.ndarray]], labels: dict[str, str], panels: list[str]):
    """A row for each initialisation: heat-maps of dt and half-life, and lines by layer for each of `panels`."""
    use_names(rows)
    plt = _pyplot()
    width = 2 + len(panels)
    figure, axes = plt.subplots(len(rows), width, figsize=(3.1 * width, 2.2 * len(rows) + 0.4), squeeze=False)
    norms = {key: _log_norm(*(row[key] for row in rows.values())) for key in ("dt", "half_life")}
    limits = {
        key: (min(r[key].min() for r in rows.values()), max(r[key].max() for r in rows.values())) for key in panels
    }
    for axis_row, (name, row) in zip(axes, rows.items()):
        for axis, key, cmap in zip(axis_row, ("dt", "half_life"), ("cividis", "viridis")):
            image = _heat(axis, row[key], _above(name, labels[key]), norms[key], cmap)
            figure.colorbar(image, ax=axis, fraction=0.05)
        for axis, key in zip(axis_row[2:], panels):
            axis.plot(row[key], "o-", color=color(name), markersize=3)
            _labelled(axis, labels[key], "layer", "")
            axis.set_xticks(range(0, len(row[key]), 1 + len(row[key]) // 8))
            axis.set_yscale("log")
            axis.set_ylim(limits[key][0] / 1.5, limits[key][1] * 1.5)
    figure.tight_layout()
    return figure
