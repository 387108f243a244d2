"""The report of a study: one self-contained page of HTML, and the same as Markdown with its figures.

It begins with the answer in words, from `mamba2.study.statistics.answer`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mamba2.cli import json_ready
from mamba2.study import causes, figures
from mamba2.study.grid import factors
from mamba2.study.page import Page
from mamba2.study.runs import LAST, Evaluated, Key, Values, check_comparable, names, unit
from mamba2.study.statistics import (
    EQUIVALENCE,
    Paired,
    answer,
    compare,
    crossed,
    seeds_for_significance,
    smallest_p,
)


def write_report(
    folder: Path,
    runs: dict[Key, Evaluated],
    baseline: str,
    sources: dict[str, str],
    plan: str = "",
    hypothesis: Sequence[str] = (),
) -> Path:
    """Write report.html, report.md, figures/, statistics.json and metrics.jsonl (the held-out losses of each run) into
    `folder`. Returns the HTML file.

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
    figures.use_names(names(good))
    page = Page()
    page.heading("What the initialisation does", 1)
    primary, name = _primary(good)
    comparisons = compare(primary, baseline)
    _answer(page, comparisons, name, primary, good, bad, sources, plan, hypothesis)
    _comparison(page, comparisons, name, primary, sources)
    _factors(page, primary, baseline)
    _secondary(page, good, baseline, sources)
    causes.learning(page, good, baseline, sources)
    causes.positions(page, good, baseline, sources)
    causes.recall(page, good, baseline, sources)
    causes.memory(page, good, sources)
    causes.signals(page, good, sources)
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
    losses = [
        {"run": _label(key), "tokens": run.history.tokens.tolist(), "nats": run.history.losses.round(6).tolist()}
        for key, run in runs.items()
    ]
    lines = "".join(json.dumps(json_ready(row)) + "\n" for row in losses)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
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


def _listed(bad: dict[Key, str]) -> str:
    return "; ".join(f"{_label(key)}: {reason}" for key, reason in bad.items())


def _by_name(runs: dict[Key, Evaluated], value: Callable[[Evaluated], float]) -> Values:
    return {name: {seed: value(run) for (n, seed), run in runs.items() if n == name} for name in names(runs)}


def _primary(runs: dict[Key, Evaluated]) -> tuple[Values, str]:
    """The primary endpoint: the mean of the last held-out evaluations, or the test data where training had none."""
    values = _by_name(runs, lambda run: run.history.endpoint)
    if not any(math.isnan(v) for by_seed in values.values() for v in by_seed.values()):
        count = min(LAST, min(int((run.history.steps > 0).sum()) for run in runs.values()))
        what = f"the mean of the last {count} evaluations" if count > 1 else "the last evaluation"
        return values, f"held-out nats per {unit(runs)} ({what})"
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
        f"{len(good)} runs: {len(names(good))} initialisations, seeds {seeds_used}. "
        f"Each: {config['parameters']:,} parameters, {settings['steps']:,} steps, {settings['tokens']:,} "
        f"{unit(good)}s{kind}. "
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
        endpoints[f"million {unit(runs)}s to {target:.3f} nats"] = _by_name(
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
        for name in names(runs):
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
            rows.append([label if name == names(runs)[0] else "", name, *means, half, str(result["clusters"])])
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
