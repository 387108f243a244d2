"""The report of a study: one self-contained page of HTML, and the same as Markdown with its figures.

It begins with the answer in words, from `mamba2.study.statistics.answer`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mamba2.cli import json_ready
from mamba2.study import figures
from mamba2.study.grid import factors
from mamba2.study.page import Page
from mamba2.study.runs import LAST, History, check_comparable
from mamba2.study.statistics import (
    EQUIVALENCE,
    Paired,
    answer,
    compare,
    crossed,
    seeds_for_significance,
    smallest_p,
)

Key = tuple[str, int]  # initialisation, seed
Values = dict[str, dict[int, float]]  # by initialisation and seed


@dataclass(frozen=True)
class Evaluated:
    """One run: its training, and what eval.py measured (see eval.py for the keys of `record`)."""

    history: History
    record: dict


def write_report(
    folder: Path,
    runs: dict[Key, Evaluated],
    baseline: str,
    sources: dict[str, str],
    plan: str = "",
    hypothesis: Sequence[str] = (),
) -> Path:
    """Write report.html, report.md, figures/ and statistics.json into `folder`. Returns the HTML file.

    `sources` names the files of "metrics" and "evaluations". `plan` and `hypothesis`, initialisations in the order of
    loss that was expected, are registered in sources["study"]. Raises ValueError naming two runs that cannot be
    compared, because data, tokenizer, steps or another setting differ. Runs that diverged are named on the page and
    left out of every mean, each with its pair.
    """
    bad = {key: reason for key, run in runs.items() if (reason := _diverged(run))}
    good = {key: run for key, run in runs.items() if key not in bad}
    check_comparable({_label(key): {**run.history.settings, **run.record["settings"]} for key, run in good.items()})
    if baseline not in {name for name, _ in good}:
        raise ValueError(
            f"no run of the baseline {baseline} is left to compare with; {_listed(bad) or 'give --baseline'}"
        )
    figures.use_names(_names(good))
    page = Page()
    page.heading("What the initialisation does", 1)
    primary, name = _primary(good)
    comparisons = compare(primary, baseline)
    _answer(page, comparisons, name, primary, good, bad, sources, plan, hypothesis)
    _comparison(page, comparisons, name, primary, sources)
    _factors(page, primary, baseline)
    _secondary(page, good, baseline, sources)
    _learning(page, good, baseline, sources)
    _positions(page, good, baseline, sources)
    _recall(page, good, baseline, sources)
    _memory(page, good, sources)
    _signals(page, good, sources)
    _runs(page, runs, bad, primary)

    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for stale in (folder / "figures").glob("*.png"):
        stale.unlink()
    for figure, data in page.figures.items():
        (folder / "figures" / f"{figure}.png").write_bytes(data)
    statistics = {
        "endpoint": name,
        "baseline": baseline,
        "values": primary,
        "diverged": {_label(k): v for k, v in bad.items()},
    }
    statistics["comparisons"] = [asdict(c) | {"seeds_needed": c.seeds_needed} for c in comparisons if len(c.seeds) > 1]
    (folder / "statistics.json").write_text(json.dumps(json_ready(statistics), indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(page.markdown(), encoding="utf-8")
    (folder / "report.html").write_text(page.html("dt_bias"), encoding="utf-8")
    return folder / "report.html"


def _label(key: Key) -> str:
    return f"seed-{key[1]}-{key[0]}"


def _diverged(run: Evaluated) -> str | None:
    if run.history.diverged:
        return run.history.diverged
    if any(result["nats_per_token"] is None for result in run.record["results"]):
        return "its loss on the test data is not finite"
    return None


def _unit(runs: dict[Key, Evaluated]) -> str:
    """The unit that losses are averaged over: in synthetic tasks only answers count."""
    return "token" if any(run.record["results"] for run in runs.values()) else "answer"


def _listed(bad: dict[Key, str]) -> str:
    return "; ".join(f"{_label(key)}: {reason}" for key, reason in bad.items())


def _names(runs: dict[Key, Evaluated]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in runs))


def _by_name(runs: dict[Key, Evaluated], value: Callable[[Evaluated], float]) -> Values:
    return {name: {seed: value(run) for (n, seed), run in runs.items() if n == name} for name in _names(runs)}


def _primary(runs: dict[Key, Evaluated]) -> tuple[Values, str]:
    """The primary endpoint: the mean of the last held-out evaluations, or the test data where training had none."""
    values = _by_name(runs, lambda run: run.history.endpoint)
    if not any(math.isnan(v) for by_seed in values.values() for v in by_seed.values()):
        count = min(LAST, min(int((run.history.steps > 0).sum()) for run in runs.values()))
        what = f"the mean of the last {count} evaluations" if count > 1 else "the last evaluation"
        return values, f"held-out nats per {_unit(runs)} ({what})"
    if not all(run.record["results"] for run in runs.values()):
        raise ValueError("training had no evaluations and eval.py no text to measure: there is nothing to compare")
    first = next(iter(runs.values())).record["results"][0]
    return _by_name(runs, lambda run: run.record["results"][0]["nats_per_token"]), (
        f"nats per token on {first['dataset']['label']} ({first['protocol']})"
    )


# ------------------------------------------------------------------------------------------------------------- sections


def _answer(
    page: Page,
    comparisons: list[Paired],
    name: str,
    primary: Values,
    good: dict[Key, Evaluated],
    bad: dict[Key, str],
    sources: dict[str, str],
    plan: str,
    hypothesis: Sequence[str],
) -> None:
    first, *rest = answer(comparisons, name)
    page.text(first)
    page.items(rest)
    if bad:
        page.text(f"Left out, because they diverged: {_listed(bad)}. Of their seeds only complete pairs are compared.")
    if plan:
        page.text(f"Registered in {sources['study']}: {' '.join(plan.split())}")
    if hypothesis and all(n in primary for n in hypothesis):
        seeds = set.intersection(*(set(primary[n]) for n in hypothesis))
        losses = [[primary[n][seed] for n in hypothesis] for seed in seeds]
        holds = sum(of_seed == sorted(of_seed) for of_seed in losses)
        page.text(
            f"The hypothesis registered in {'the same file' if plan else sources['study']}, {' ≤ '.join(hypothesis)} "
            f"in loss, holds in {holds} of {len(seeds)} seeds; by chance alone it would in one of "
            f"{math.factorial(len(hypothesis))}."
        )
    settings = next(iter(good.values())).history.settings
    config = next(iter(good.values())).record["settings"]
    kind = f" of {config['tokenizer']}" if config["tokenizer"] else ""
    seeds_used = ", ".join(map(str, sorted({seed for _, seed in good})))
    page.text(
        f"{len(good)} runs: {len(_names(good))} initialisations, seeds {seeds_used}. "
        f"Each: {config['parameters']:,} parameters, {settings['steps']:,} steps, {settings['tokens']:,} "
        f"{_unit(good)}s{kind}. "
        "For one seed, all weights but those that an initialisation names and the order of the data are the same. The "
        "conclusions hold for this size, this budget and these data."
    )


def _comparison(page: Page, comparisons: list[Paired], name: str, primary: Values, sources: dict[str, str]) -> None:
    page.heading("The comparison")
    seeds = sorted({seed for by_seed in primary.values() for seed in by_seed})
    rows = []
    for init, by_seed in primary.items():
        mean = float(np.mean(list(by_seed.values())))
        rows.append([init, *(_f(by_seed.get(seed)) for seed in seeds), _f(mean)])
    page.table(["mean nats", *(f"seed {seed}" for seed in seeds), "mean"], rows)
    if not comparisons:
        return
    rows = [
        [
            c.name,
            f"{c.interval.mean:+.4f}",
            _interval(c),
            *(_f(v, ".3g") for v in (c.p, c.p_holm, c.p_t)),
            _f(c.d_z, "+.2f"),
            _f(c.p_equivalence, ".3g"),
            "-" if len(c.seeds) < 2 else str(c.seeds_needed or "> 10 000"),
        ]
        for c in comparisons
    ]
    n, m = max(len(c.seeds) for c in comparisons), sum(len(c.seeds) > 1 for c in comparisons)
    header = ["minus the baseline", "difference", "95 % t interval", "p sign flip", "p Holm", "p t test", "d_z"]
    header += [f"p within ±{EQUIVALENCE}", f"seeds for {EQUIVALENCE}"]
    note = f"With {n} seeds the exact sign-flip p cannot be below {smallest_p(n):.3g}"
    if m > 1:
        note += f", nor below {min(1, m * smallest_p(n)):.3g} after Holm's correction over {m} contrasts"
    note += (
        f"; at least {seeds_for_significance(m)} seeds are needed to show one of {m}. d_z: mean over standard "
        f"deviation of the differences. The last column: seeds with which a difference of {EQUIVALENCE} nats would be "
        "found with 80 % power, at the spread seen here."
    )
    if n == 1:
        note = "One seed: no p-value, no interval."
    page.table(header, rows, note)
    shows = (
        f"Paired differences in {name}. Dots: seeds. Diamond and bar: mean and 95 % t interval. Grey: differences "
        f"of at most {EQUIVALENCE} nats, which count as none."
    )
    page.figure("comparison", figures.forest(comparisons, "loss"), shows, sources["metrics"])


def _factors(page: Page, primary: Values, baseline: str) -> None:
    effects, interactions = crossed(primary, {name: factors(name) for name in primary}, baseline)
    if not effects and not interactions:
        return
    page.heading("Factors that are crossed", 3)
    rows = [
        [kind, c.name, f"{c.interval.mean:+.4f}", _interval(c), _f(c.p, ".3g"), _f(c.p_holm, ".3g"), _f(c.d_z, "+.2f")]
        for kind, found in (("effect", effects), ("interaction", interactions))
        for c in found
    ]
    note = (
        f"An effect: what a level changes against that of {baseline}, averaged over all pairs of names that differ in "
    )
    note += "nothing else. An interaction: by how much one level changes the effect of the other. Holm's correction is "
    note += f"over these {len(rows)} tests."
    page.table(["", "level", "difference", "95 % t interval", "p sign flip", "p Holm", "d_z"], rows, note)


def _secondary(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
    page.heading("Other endpoints")
    endpoints: dict[str, Values] = {}
    evaluated = all(len(run.history.losses) > 1 for run in runs.values())
    if evaluated:
        target = max(run.history.endpoint for run in runs.values())
        endpoints["mean held-out loss over training, nats"] = _by_name(runs, lambda run: run.history.area)
        endpoints[f"million {_unit(runs)}s to {target:.3f} nats"] = _by_name(
            runs, lambda run: run.history.tokens_to(target) / 1e6
        )
    first = next(iter(runs.values())).record
    for i, result in enumerate(first["results"]):
        label = f"nats/token, {result['dataset']['label']}, {result['protocol']}"
        endpoints[label] = _by_name(runs, lambda run, i=i: run.record["results"][i]["nats_per_token"])
    for i, result in enumerate(first["recall"]):
        label = f"accuracy, {result['source']}, {result['split']}"
        endpoints[label] = _by_name(runs, lambda run, i=i: run.record["recall"][i]["accuracy"])
    if "position_losses" in first["diagnostics"]:
        ends = first["diagnostics"]["position_ends"]
        label = f"nats/token at positions {ends[-1] // 2 + 1} to {ends[-1]}"
        endpoints[label] = _by_name(runs, lambda run: run.record["diagnostics"]["position_losses"][-1])
    rows = []
    for label, values in endpoints.items():
        contrasts = {c.name: c for c in compare(values, baseline)}
        for name, by_seed in values.items():
            c = contrasts.get(name)
            cells = (
                ["baseline", "", "", ""]
                if c is None
                else [f"{c.interval.mean:+.4f}", _interval(c), _f(c.d_z, "+.2f"), _f(c.p, ".3g")]
            )
            rows.append([label, name, _f(float(np.mean(list(by_seed.values())))), *cells])
            label = ""
    header = ["endpoint", "initialisation", "mean", "difference", "95 % t interval", "d_z", "p sign flip"]
    page.table(
        header, rows, "Secondary: these p-values are not corrected for their number, and show nothing by themselves."
    )
    _test_data(page, runs, sources)


def _test_data(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    first = next(iter(runs.values())).record
    rows = []
    for i, result in enumerate(first["results"]):
        for name in _names(runs):
            chosen = [run.record["results"][i] for (n, _), run in runs.items() if n == name]
            halves = [
                (r["interval_95"][1] - r["interval_95"][0]) / 2 for r in chosen if r["interval_95"][0] is not None
            ]
            means = [
                _mean([r[key] for r in chosen])
                for key in ("nats_per_token", "bits_per_byte", "perplexity", "word_perplexity")
            ]
            half = _f(float(np.mean(halves))) if halves else "-"
            label = f"{result['dataset']['label']}, {result['protocol']}"
            rows.append([label if name == _names(runs)[0] else "", name, *means, half, str(result["clusters"])])
    if rows:
        page.heading("Test data", 3)
        header = [
            "data, protocol",
            "initialisation",
            "nats/token",
            "bits/byte",
            "perplexity",
            "per word",
            "± test set",
            "documents",
        ]
        note = (
            f"Means over seeds. ± is half the 95 % interval that comes from the choice of documents, clustered by them "
            f"(of the mean perplexity under hf_evaluate); it applies to a level, not to the paired differences. "
            f"Context {first['results'][0]['context']} tokens, float32, from {sources['evaluations']}."
        )
        page.table(header, rows, note)


def _learning(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
    if any(len(run.history.losses) < 2 for run in runs.values()):
        return
    page.heading("Learning curves")
    data = {
        name: {seed: (run.history.tokens / 1e6, run.history.losses) for (n, seed), run in runs.items() if n == name}
        for name in _names(runs)
    }
    drawn = figures.curves(
        data, baseline, "held-out loss", f"million {_unit(runs)}s seen", f"nats per {_unit(runs)}", zoom=True
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
        for name in _names(runs)
    }


def _positions(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
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
        f"Loss in bins (2^(k-1), 2^k] of the position, {first['tokens'][0]} sequences of {first['tokens'][1]} tokens, "
        f"state carried throughout; a bin is drawn at its right end. Left of the dotted line: loss by position up to "
        f"the training length of {context}. Right of it: length extrapolation, up to {longest / context:g} times that. "
        "Bins hold different text, so that only differences between initialisations can be read, not between positions."
    )
    page.figure("positions", drawn, shows, sources["evaluations"])


def _recall(page: Page, runs: dict[Key, Evaluated], baseline: str, sources: dict[str, str]) -> None:
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
            for name in _names(runs)
        }
        drawn = figures.curves(
            data, baseline, "accuracy", "distance, tokens", "share of right answers", log_x=True,
            unit="share   (above zero: better)",
        )  # fmt: skip
        shows = f"Share of right answers in {task['source']}, {task['split']}, in bins (2^(k-1), 2^k] of the distance."
        page.figure(f"recall-{i}", drawn, shows, sources["evaluations"])


def _memory(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    page.heading("Memory of the heads")
    names = _names(runs)

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
    page.figure("half-life", figures.half_lives({name: maps(name) for name in names}), shows, sources["evaluations"])
    _drift(page, runs, sources)
    _masks(page, runs, sources)


def _drift(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    names = _names(runs)
    rows = []
    for name in names:
        chosen = [run for (n, _), run in runs.items() if n == name]
        moved = [run.record["diagnostics"]["drift"] for run in chosen]
        mean, largest = (float(np.mean([d[key] for d in moved])) for key in ("mean", "largest"))
        ranks = [d["rank_correlation"] for d in moved if d["rank_correlation"] is not None]
        rate = factors(name).get("dt_lr", 1.0) * float(np.mean([run.history.sum_of_rates for run in chosen]))
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
            for name in names
        }
    )
    shows = (
        "How far dt_bias has moved, against the sum of the learning rates so far. Diamonds: mean over all heads, at "
        "the end. Lines: of each layer's median dt while training, mean over layers, where metrics.jsonl has them."
    )
    page.figure("drift", drawn, shows, f"{sources['metrics']} and {sources['evaluations']}")


def _masks(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
    names = _names(runs)
    first_seed = {name: next(run for (n, _), run in runs.items() if n == name).record["diagnostics"] for name in names}
    masks = {
        name: {f"layer {i}, head {d['mask_head']}": np.array(mask, dtype=float) for i, mask in d["masks"].items()}
        for name, d in first_seed.items()
    }
    shows = (
        "Decay mask after training: the share of what token j wrote that is left at token i, for the first 64 tokens "
        "of a sample of the data. First seed; the head is the one with the longest effective half-life in any layer."
    )
    page.figure("decay-masks", figures.decay_masks(masks), shows, sources["evaluations"])


def _signals(page: Page, runs: dict[Key, Evaluated], sources: dict[str, str]) -> None:
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
        for name in _names(runs)
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


def _runs(page: Page, runs: dict[Key, Evaluated], bad: dict[Key, str], primary: Values) -> None:
    page.heading("The runs")
    rows = [
        [
            _label(key),
            str(run.history.settings["steps"]),
            _f(primary.get(key[0], {}).get(key[1])),
            bad.get(key, "whole"),
        ]
        for key, run in runs.items()
    ]
    page.table(["run", "steps", "loss", "state"], rows)


def _f(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _mean(values: list[float | None]) -> str:
    """The mean with four decimals, or four significant digits from 1e4 on."""
    if None in values:
        return "-"
    mean = float(np.mean(values))
    return f"{mean:.4f}" if mean < 1e4 else f"{mean:.4g}"


def _interval(c: Paired) -> str:
    return "-" if math.isnan(c.interval.low) else f"{c.interval.low:+.4f} to {c.interval.high:+.4f}"
