"""Statistics of a comparison: paired differences, exact tests, equivalence, intervals clustered by document.

Losses are compared in nats, never as perplexities. A paired difference is that of two runs with the same seed.
"""

import bisect
import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

LEVEL = 0.95
ALPHA = 0.05
EQUIVALENCE = 0.005  # nats: smaller differences count as none
EXACT_UP_TO = 20  # differences: 2^20 sign patterns
DRAWS = 100_000  # of sign patterns, above that
MOST_SEEDS = 10_000


def _scipy():
    """scipy.stats, which takes a second to import, and which training does without."""
    from scipy import stats

    return stats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, which is nan with one cluster or one difference."""

    mean: float
    low: float
    high: float
    standard_error: float
    clusters: int


def clustered_interval(sums: list[float], counts: list[float], clusters: list[int]) -> Interval:
    """Interval of Σ sums / Σ counts when what lies in one cluster is not independent.

    se² = D/(D-1) Σ_d (S_d - μ N_d)² / N², S_d and N_d the sums over cluster d of D; Student's t with D-1 degrees.
    """
    _, index = np.unique(clusters, return_inverse=True)
    s, n = np.bincount(index, weights=sums), np.bincount(index, weights=counts)
    mean = float(s.sum() / n.sum())
    if len(s) < 2:
        return Interval(mean, math.nan, math.nan, math.nan, len(s))
    error = math.sqrt(len(s) / (len(s) - 1) * float(((s - mean * n) ** 2).sum())) / float(n.sum())
    half = float(_scipy().t.ppf(0.5 + LEVEL / 2, len(s) - 1)) * error
    return Interval(mean, mean - half, mean + half, error, len(s))


def sign_flip_p(differences: list[float]) -> float:
    """Two-sided p of a mean of zero, if each difference was as likely to have the other sign.

    The share of the 2^n sign patterns whose mean is at least as far from zero: exact up to 20 differences, with no
    assumption on their distribution; beyond, 100 000 patterns drawn from a fixed seed.
    """
    d = np.asarray(differences, dtype=np.float64)
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # sums that differ by rounding count as equal
    if len(d) > EXACT_UP_TO:
        signs = np.random.default_rng(0).integers(0, 2, (DRAWS, len(d)), dtype=np.int8) * 2 - 1
        return float((1 + (np.abs(signs @ d) >= observed).sum()) / (1 + DRAWS))
    sums = np.zeros(1)
    for value in d[1:]:  # the first sign is fixed: the other half is the mirror image
        sums = np.concatenate([sums - value, sums + value])
    return float((np.abs(sums + d[0]) >= observed).mean())


def smallest_p(n: int) -> float:
    """The smallest p that `sign_flip_p` can give with n differences."""
    return min(1.0, 2.0 ** (1 - n))


def seeds_for_significance(contrasts: int, alpha: float = ALPHA) -> int:
    """Fewest seeds with which one of `contrasts` can be shown at all, Holm's correction included."""
    return next(n for n in itertools.count(1) if contrasts * smallest_p(n) <= alpha)


def seeds_for_power(deviation: float, effect: float, power: float = 0.8, alpha: float = ALPHA) -> int | None:
    """Fewest seeds with which a paired t test finds a mean difference of `effect` with probability `power`.

    `deviation`: standard deviation of the paired differences. None: more than 10 000.
    """
    if deviation <= 0:
        return 2

    def enough(n: int) -> bool:
        limit = _scipy().t.ppf(1 - alpha / 2, n - 1)
        return _scipy().nct.sf(limit, n - 1, effect / deviation * math.sqrt(n)) >= power

    found = bisect.bisect_left(range(2, MOST_SEEDS + 1), True, key=enough) + 2
    return found if found <= MOST_SEEDS else None


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest times (m - k + 1), never falling, at most 1."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Paired:
    """One contrast with the baseline. With one seed everything but the difference is nan."""

    name: str
    baseline: str
    seeds: list[int]
    differences: list[float]  # of the named one minus the baseline, nats; below zero: better
    interval: Interval
    p: float  # exact sign flip
    p_holm: float
    p_t: float  # paired t test
    d_z: float  # mean / standard deviation of the differences
    p_equivalence: float  # two one-sided t tests against ±EQUIVALENCE
    p_equivalence_holm: float

    @cached_property
    def seeds_needed(self) -> int | None:
        """To find a mean difference of EQUIVALENCE with 80 % power, at the spread seen here; None: above 10 000."""
        return seeds_for_power(self.interval.standard_error * math.sqrt(len(self.differences)), EQUIVALENCE)

    @property
    def shown(self) -> bool:
        """Whether the sign-flip test shows a difference, after Holm's correction."""
        return self.p_holm <= ALPHA

    @property
    def equivalent(self) -> bool:
        """Whether the t tests show |mean| < EQUIVALENCE, after Holm's correction; assumes normal differences."""
        return self.p_equivalence_holm <= ALPHA


def compare(values: dict[str, dict[int, float]], baseline: str) -> list[Paired]:
    """Every name against the baseline, over the seeds that both have. `values`: nats by name and seed.

    Raises ValueError when the baseline is not there, or shares no seed with a name.
    """
    if baseline not in values:
        raise ValueError(f"the baseline {baseline} is not among {', '.join(values)}")
    names = [name for name in values if name != baseline]
    seeds = {name: sorted(values[name].keys() & values[baseline].keys()) for name in names}
    if alone := [name for name in names if not seeds[name]]:
        raise ValueError(f"{alone[0]} and the baseline {baseline} have no seed in common")
    found = [
        _paired(name, baseline, seeds[name], [values[name][seed] - values[baseline][seed] for seed in seeds[name]])
        for name in names
    ]
    return _corrected(found)


def _corrected(found: list[Paired]) -> list[Paired]:
    """With Holm's correction over all of them."""
    tested = [c for c in found if len(c.seeds) > 1]  # one difference has no p-value
    differ, equal = holm([c.p for c in tested]), holm([c.p_equivalence for c in tested])
    corrected = iter([replace(c, p_holm=p, p_equivalence_holm=q) for c, p, q in zip(tested, differ, equal)])
    return [next(corrected) if len(c.seeds) > 1 else c for c in found]


def _paired(name: str, baseline: str, seeds: list[int], differences: list[float]) -> Paired:
    """A contrast before Holm's correction."""
    d = np.asarray(differences, dtype=np.float64)
    n, mean, nan = len(d), float(np.mean(differences)), math.nan
    if n == 1:
        return Paired(
            name, baseline, seeds, differences, Interval(mean, nan, nan, nan, n), nan, nan, nan, nan, nan, nan
        )
    deviation = float(d.std(ddof=1))
    error = deviation / math.sqrt(n)
    half = float(_scipy().t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    if deviation == 0:  # all differences are equal: no spread to estimate
        p_t = 1.0 if mean == 0 else 0.0
        p_equivalence, d_z = (0.0 if abs(mean) < EQUIVALENCE else 1.0), nan
    else:
        p_t = float(2 * _scipy().t.sf(abs(mean) / error, n - 1))
        p_equivalence = float(_scipy().t.sf((EQUIVALENCE - abs(mean)) / error, n - 1))
        d_z = mean / deviation
    interval = Interval(mean, mean - half, mean + half, error, n)
    p = sign_flip_p(differences)
    return Paired(name, baseline, seeds, differences, interval, p, nan, p_t, d_z, p_equivalence, nan)


# ------------------------------------------------------------------------------------------------------------- factors


def crossed(
    values: dict[str, dict[int, float]], factors: dict[str, dict[str, Any]], baseline: str
) -> tuple[list[Paired], list[Paired]]:
    """Effects and interactions of the factors that a design crosses, paired by seed; none where nothing is crossed.

    `factors`: the levels of each name, {"dt_bias": "halflife", "dt_lr": 0.0}; a factor that a name leaves out is at its
    default. An effect is the difference of a level from the baseline's level, averaged over all pairs of names that
    differ in nothing else, of which there must be two. An interaction of two levels is how much the effect of the one
    differs between the other and the baseline's: (ab - b) - (a - baseline), averaged likewise.
    Holm's correction is over effects and interactions together.
    """
    levels = {name: frozenset(of_name.items()) for name, of_name in factors.items()}
    name_of = {level: name for name, level in levels.items()}
    base = factors[baseline]

    def without(name: str, factor: str) -> str | None:
        """The name that differs in having the baseline's level of the factor."""
        changed = {key: value for key, value in factors[name].items() if key != factor}
        if factor in base:
            changed[factor] = base[factor]
        return name_of.get(frozenset(changed.items()))

    pairs: dict[str, list[dict[str, int]]] = {}  # by label: sums of names, each with its sign
    both: dict[str, list[dict[str, int]]] = {}
    for name in values:
        moved = [(key, value) for key, value in factors[name].items() if base.get(key) != value]
        for factor, level in moved:
            other = without(name, factor)
            if other is not None:
                pairs.setdefault(f"{factor}={level}", []).append({name: 1, other: -1})
        for (one, a), (two, b) in itertools.combinations(moved, 2):
            no_one, no_two = without(name, one), without(name, two)
            neither = no_one and without(no_one, two)
            if no_one and no_two and neither:
                both.setdefault(f"{one}={a} with {two}={b}", []).append({name: 1, no_one: -1, no_two: -1, neither: 1})
    effects = [_averaged(label, sums, values) for label, sums in pairs.items() if len(sums) > 1]
    interactions = [_averaged(label, sums, values) for label, sums in both.items()]
    corrected = _corrected([c for c in (*effects, *interactions) if c is not None])
    count = sum(c is not None for c in effects)
    return corrected[:count], corrected[count:]


def _averaged(label: str, sums: list[dict[str, int]], values: dict[str, dict[int, float]]) -> Paired | None:
    """The mean of signed sums of names, over the seeds that all of them have; None if there are none."""
    seeds = sorted(set.intersection(*(set(values[name]) for of_names in sums for name in of_names)))
    if not seeds:
        return None
    totals = [sum(sign * values[n][seed] for of_names in sums for n, sign in of_names.items()) for seed in seeds]
    what = f"{label} ({len(sums)} pairs)" if len(sums[0]) == 2 else label
    return _paired(what, "", seeds, [total / len(sums) for total in totals])


# ------------------------------------------------------------------------------------------------------------ in words


def answer(comparisons: list[Paired], endpoint: str) -> list[str]:
    """What the comparisons show about `endpoint`, one sentence each, claiming no more than the tests do."""
    if not comparisons:
        return ["There is one initialisation only, and nothing to compare it with."]
    tested = [c for c in comparisons if len(c.differences) > 1]
    n, m = max(len(c.differences) for c in comparisons), len(tested)
    baseline = comparisons[0].baseline
    sentences = [f"Differences are in {endpoint}, from {baseline}, paired by seed; below zero is better."]
    if n == 1:
        sentences.append(
            "One seed only: no p-value and no interval can be given, and nothing below says more than that these runs "
            "differ by these amounts."
        )
    elif m * smallest_p(n) > ALPHA:
        wanted = seeds_for_significance(m)
        alone = f"p ≥ {smallest_p(n):.2g} whatever the data"
        if m > 1:
            alone += f", and after Holm's correction over {m} contrasts p ≥ {min(1, m * smallest_p(n)):.2g}"
        sentences.append(
            f"{n} seeds cannot show a difference by the exact test: {alone}. The question needs {wanted} seeds."
        )
    for c in sorted(comparisons, key=lambda c: c.interval.mean):
        sentences.append(f"{c.name}: {c.interval.mean:+.4f} nats{_verdict(c)}.")
    return sentences


def _verdict(c: Paired) -> str:
    if len(c.differences) == 1:
        return " in the one seed"
    i = c.interval
    text = f" (95 % interval {i.low:+.4f} to {i.high:+.4f}, {i.clusters} seeds), "
    if c.shown:
        text += f"{'better' if i.mean < 0 else 'worse'} than {c.baseline} (sign flip, Holm: p = {c.p_holm:.2g})"
        return text + (f", and by less than {EQUIVALENCE} nats" if c.equivalent else "")
    if c.equivalent:
        text += f"no difference larger than {EQUIVALENCE} nats "
        return text + f"(two one-sided t tests, Holm: p = {c.p_equivalence_holm:.2g})"
    if i.low > 0 or i.high < 0:
        return text + (
            f"the interval leaves out zero, which holds if differences are normally distributed; the exact test does "
            f"not show it (p = {c.p:.2g}, Holm {c.p_holm:.2g})"
        )
    needed = f"about {c.seeds_needed}" if c.seeds_needed else f"more than {MOST_SEEDS:,}"
    text += f"neither a difference nor its absence is shown (p = {c.p:.2g}); "
    return text + f"to find {EQUIVALENCE} nats here takes {needed} seeds"
