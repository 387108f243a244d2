"""The part of a report that says why: learning curves, loss by position, memory of the heads, signals."""

from collections.abc import Callable

import numpy as np

from mamba2.study import figures
from mamba2.study.grid import factors
from mamba2.study.page import Page
from mamba2.study.runs import Evaluated, Key, names, unit


def learning(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
    if any(len(run.history.losses) < 2 for run in runs.values()):
        return
    page.heading("Learning curves")
    data = {
        name: {seed: (run.history.tokens / 1e6, run.history.losses) for (n, seed), run in runs.items() if n == name}
        for name in names(runs)
    }
    drawn = figures.curves(
        data, baseline, "held-out loss", f"million {unit(runs)}s seen", f"nats per {unit(runs)}", zoom=True
    )
    shows = (
        "Held-out loss while training, every run thin, means thick; right, minus the baseline's run of the same seed. "
    )
    shows += "The axes leave out the first quarter of the evaluations' range."
    page.figure("learning", drawn, shows, sources["metrics"])


def _diagnosed(runs: dict[Key, Evaluated], get: Callable[[dict], tuple]) -> figures.Curves:
    """x and y of every run, from its diagnostics."""
    return {
        name: {
            seed: tuple(np.asarray(v, dtype=np.float64) for v in get(run.record["diagnostics"]))
            for (n, seed), run in runs.items()
            if n == name
        }
        for name in names(runs)
    }


def positions(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
    first = next(iter(runs.values())).record["diagnostics"]
    if "position_losses" not in first:
        return
    page.heading("Position and length")
    context, longest = first["context"], first["position_ends"][-1]
    data = _diagnosed(runs, lambda d: (d["position_ends"], d["position_losses"]))
    drawn = figures.curves(
        data,
        baseline,
        "loss by position",
        "tokens before the one predicted",
        "nats per token",
        log_x=True,
        mark=context,
    )
    shows = (
        f"Loss in bins (2^(k-1), 2^k] of the position, {first['tokens'][0]} x {first['tokens'][1]} tokens, "
        f"state carried throughout; a bin is drawn at its right end. Left of the dotted line: loss by position up to "
        f"the training length of {context}. Right of it: length extrapolation, up to {longest / context:g} times that. "
        "Bins hold different text, so that only differences between initialisations can be read, not between positions."
    )
    page.figure("positions", drawn, shows, sources["evaluations"])


def recall(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
    for i, task in enumerate(next(iter(runs.values())).record["recall"]):
        if i == 0:
            page.heading("Recall by distance")
        data = {
            name: {
                seed: (
                    np.array(run.record["recall"][i]["distances"], dtype=np.float64),
                    np.array(run.record["recall"][i]["right"]) / np.array(run.record["recall"][i]["counts"]),
                )
                for (n, seed), run in runs.items()
                if n == name
            }
            for name in names(runs)
        }
        drawn = figures.curves(
            data, baseline, "accuracy", "distance, tokens", "share of right answers", log_x=True,
            unit="share   (above zero: better)",
        )  # fmt: skip
        shows = f"Share of right answers in {task['source']}, {task['split']}, in bins (2^(k-1), 2^k] of the distance."
        page.figure(f"recall-{i}", drawn, shows, sources["evaluations"])


def memory(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    page.heading("Memory of the heads")
    used = names(runs)

    def maps(name: str) -> dict[str, np.ndarray]:
        chosen = [run.record["diagnostics"] for (n, _), run in runs.items() if n == name]
        return {
            f"{kind}, {when} training": np.exp(np.mean([np.log(d[when][kind]) for d in chosen], axis=0))
            for kind in ("nominal", "effective")
            for when in ("before", "after")
        }

    shows = (
        "Half-life in tokens by layer and head, geometric mean over seeds. Nominal: at W_dt x = 0, what dt_bias alone "
        "says. Effective: from the mean dt on data."
    )
    page.figure("half-life", figures.half_lives({name: maps(name) for name in used}), shows, sources["evaluations"])
    _drift(page, runs, sources)
    _masks(page, runs, sources)


def _drift(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    used = names(runs)
    rows = []
    for name in used:
        chosen = [run for (n, _), run in runs.items() if n == name]
        moved = [run.record["diagnostics"]["drift"] for run in chosen]
        mean, largest = (float(np.mean([d[key] for d in moved])) for key in ("mean", "largest"))
        ranks = [d["rank_correlation"] for d in moved if d["rank_correlation"] is not None]
        rate = float(factors(name).get("dt_lr", 1)) * float(np.mean([run.history.sum_of_rates for run in chosen]))
        medians = [
            f"{np.median([np.median(run.record['diagnostics'][when][kind]) for run in chosen]):.3g}"
            for kind in ("nominal", "effective")
            for when in ("before", "after")
        ]
        cells = [f"{mean:.3f}", f"{largest:.3f}", f"{rate:.3f}", f"{largest / rate:.0%}" if rate else "-"]
        rows.append([name, *cells, f"{np.mean(ranks):+.3f}" if ranks else "-", *medians])
    header = ["dt_bias", "mean drift", "largest", "its Σ lr", "largest / Σ lr", "rank correlation"]
    header += ["nominal before", "after", "effective before", "after"]
    note = "Rank correlation: Spearman's, of dt before and after, over all heads; none where all begin alike. "
    note += "The last four: median half-life over layers and heads, tokens."
    page.table(header, rows, note)

    drawn = figures.drift(
        {
            name: [
                (*run.history.dt_drift, run.history.sum_of_rates, run.record["diagnostics"]["drift"]["mean"])
                for (n, _), run in runs.items()
                if n == name
            ]
            for name in used
        }
    )
    shows = (
        "How far dt_bias has moved, against the sum of the learning rates so far. Diamonds: mean over all heads, at "
        "the end. Lines: of each layer's median dt while training, mean over layers, where metrics.jsonl has them."
    )
    page.figure("drift", drawn, shows, f"{sources['metrics']} and {sources['evaluations']}")


def _masks(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    used = names(runs)
    first_seed = {name: next(run for (n, _), run in runs.items() if n == name).record["diagnostics"] for name in used}
    masks = {
        name: {f"layer {i}, head {d['mask_head']}": np.array(mask, dtype=float) for i, mask in d["masks"].items()}
        for name, d in first_seed.items()
    }
    shows = (
        "Decay mask after training: the share of what token j wrote that is left at token i, for the first 64 tokens "
        "of a sample of the data. First seed; the head is the one with the longest effective half-life in any layer."
    )
    page.figure("decay-masks", figures.decay_masks(masks), shows, sources["evaluations"])


def signals(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    page.heading("Signals")
    quantities = {
        "residual_rms": "rms of residual stream",
        "output_rms": "rms of mixer output",
        "gradient_norm": "gradient norm",
        "ssm_to_skip": "state / skip D x, rms",
    }
    data = {
        name: {
            key: [
                np.array(run.record["diagnostics"]["before"]["signals"][key])
                for (n, _), run in runs.items()
                if n == name
            ]
            for key in quantities
        }
        for name in names(runs)
    }
    shows = (
        "Before training, by layer: sizes of activations and gradients, and what the state gives over what D x gives."
    )
    page.figure("signals", figures.by_layer(data, quantities), shows, sources["evaluations"])

    pair = tuple(
        _diagnosed(runs, lambda d, w=when: (d[w]["distances"], d[w]["gradient"])) for when in ("before", "after")
    )
    drawn = figures.two_states(
        {"": pair}, "gradient against distance", "distance, tokens", "norm of d loss / d embedding"
    )
    shows = "How strongly the loss of one token depends on a token so far before it, in bins (2^(k-1), 2^k]. "
    page.figure("gradient", drawn, f"{shows}Dashed: before training; solid: after.", sources["evaluations"])

    layers = len(next(iter(runs.values())).record["diagnostics"]["after"]["nominal"])
    panels = {
        f", layer {i}": tuple(
            _diagnosed(runs, lambda d, w=when, i=i: (d[w]["positions"], np.array(d[w]["state_rms"])[:, i]))
            for when in ("before", "after")
        )
        for i in sorted({0, layers // 2, layers - 1})
    }
    shows = (
        "Root mean square of the state after so many tokens from an empty one. Dashed: before training; solid: after."
    )
    page.figure("state", figures.two_states(panels, "state", "position, tokens", "rms"), shows, sources["evaluations"])
