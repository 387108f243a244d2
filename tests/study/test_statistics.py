"""Statistics against scipy, against cases computed by hand, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from mamba2.study.statistics import (
    EQUIVALENCE,
    answer,
    clustered_interval,
    compare,
    crossed,
    holm,
    seeds_for_power,
    seeds_for_significance,
    sign_flip_p,
    smallest_p,
)

# Two initialisations by three rates of dt_bias, and one more that is crossed with nothing.
CROSSED = {f"{a}{b}": {"dt_bias": a, **({"dt_lr": b} if b != "" else {})} for a in ("x", "y") for b in ("", 0.0, 10.0)}
CROSSED["z"] = {"dt_bias": "z"}
RNG = np.random.default_rng(3)


def contrast(differences, baseline="log_uniform"):
    values = {
        baseline: dict.fromkeys(range(len(differences)), 3.0),
        "x": {i: 3.0 + d for i, d in enumerate(differences)},
    }
    return compare(values, baseline)[0]


@pytest.mark.parametrize("n", [2, 3, 6, 9])
def test_sign_flip_equals_scipys_exact_permutation_test(n):
    for d in (RNG.normal(0.5, 1, n), RNG.integers(-2, 3, n).astype(float)):
        expected = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flip_p(list(d)) == pytest.approx(expected)


def test_sign_flip_by_hand():
    assert sign_flip_p([1.0, 2.0, 3.0]) == smallest_p(3) == 0.25
    assert sign_flip_p([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip_p([3.0, -1.0]) == 1.0  # |3-1| = 2: both (3,-1) and (3,1) are as far, with their mirror images
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0  # a sum of zero but for rounding
    assert (smallest_p(6), smallest_p(8)) == (0.03125, 0.0078125)
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_sign_flip_of_many_differences_draws_patterns():
    d = list(RNG.normal(0.35, 1, 24))
    expected = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=50_000, random_state=np.random.default_rng(1)
    ).pvalue
    assert sign_flip_p(d) == pytest.approx(expected, abs=0.01)


def test_holm_by_hand_and_against_scipys_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == []
    assert holm([0.02]) == [0.02]


def test_a_contrast_equals_scipys_paired_tests():
    a, b = RNG.normal(3, 0.1, 7), RNG.normal(3.05, 0.1, 7)
    c = compare({"a": dict(enumerate(a)), "b": dict(enumerate(b))}, "b")[0]
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert (c.interval.low, c.interval.high) == pytest.approx((interval.low, interval.high))
    assert c.p_t == pytest.approx(test.pvalue)
    assert c.d_z == pytest.approx(test.statistic / math.sqrt(7))
    d = a - b
    sides = [
        stats.ttest_1samp(d, -EQUIVALENCE, alternative="greater").pvalue,
        stats.ttest_1samp(d, EQUIVALENCE, alternative="less").pvalue,
    ]
    assert c.p_equivalence == pytest.approx(max(sides))


def test_only_seeds_that_both_have_are_paired():
    c = compare({"a": {1: 1.0, 2: 2.0, 3: 9.0}, "b": {2: 1.5, 1: 1.0, 7: 0.0}}, "b")[0]
    assert c.seeds == [1, 2] and c.differences == [0.0, 0.5]
    with pytest.raises(ValueError, match="a and the baseline b have no seed in common"):
        compare({"a": {1: 1.0}, "b": {2: 1.0}}, "b")
    with pytest.raises(ValueError, match="the baseline c is not among a, b"):
        compare({"a": {1: 1.0}, "b": {2: 1.0}}, "c")


def test_seeds_that_the_question_needs():
    assert [seeds_for_significance(m) for m in (1, 2, 4, 5)] == [6, 7, 8, 8]
    n = seeds_for_power(deviation=1.0, effect=1.0)
    power = [stats.nct.sf(stats.t.ppf(0.975, k - 1), k - 1, math.sqrt(k)) for k in (n - 1, n)]
    assert power[0] < 0.8 <= power[1] and n == 10  # G*Power's answer for d_z = 1
    assert seeds_for_power(1.0, 1e-4) is None


def test_clustered_interval_is_the_formula_and_counts_clusters():
    sums, counts, clusters = [3.0, 1.0, 5.0, 2.0], [2, 1, 3, 2], [0, 0, 1, 2]
    i = clustered_interval(sums, counts, clusters)
    mean = 11 / 8
    residuals = [4 - mean * 3, 5 - mean * 3, 2 - mean * 2]
    error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 8
    assert (i.mean, i.standard_error, i.clusters) == pytest.approx((mean, error, 3))
    assert i.high - i.mean == pytest.approx(stats.t.ppf(0.975, 2) * error)
    assert math.isnan(clustered_interval(sums, counts, [0] * 4).low)


def test_paired_intervals_cover_and_the_null_is_rejected_as_often_as_said():
    """4000 studies of 8 seeds, seed effects far larger than the difference."""
    truth, covered, rejected, equivalent = 0.01, 0, 0, 0
    for seeds, noise in zip(RNG.normal(3, 0.5, (4000, 8)), RNG.normal(0, 0.02, (4000, 8))):
        d = (seeds + truth + noise) - seeds
        c = contrast(list(d))
        covered += c.interval.low <= truth <= c.interval.high
        rejected += sign_flip_p(list(d - truth)) <= 0.05
        equivalent += contrast(list(d - truth + EQUIVALENCE)).equivalent
    assert covered / 4000 == pytest.approx(0.95, abs=0.02)
    # Of 256 patterns 12 are at most 5 %: 4.7 %.
    assert rejected / 4000 == pytest.approx(0.047, abs=0.015)
    assert equivalent / 4000 <= 0.05 + 0.01  # a true difference on the bound must not be called none


def test_clustered_intervals_cover_where_plain_ones_do_not():
    covered = plain = 0
    for _ in range(2000):
        tokens = RNG.integers(20, 200, 40)
        nats = tokens * (3 + RNG.normal(0, 0.4, 40)) + RNG.normal(0, np.sqrt(tokens))
        i = clustered_interval(list(nats), list(tokens), list(range(40)))
        covered += i.low <= 3 <= i.high
        plain += abs(nats.sum() / tokens.sum() - 3) <= 1.96 / math.sqrt(tokens.sum())
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)
    assert plain / 2000 < 0.8


def words(*differences):
    values = {"log_uniform": dict.fromkeys(range(len(differences[0])), 3.0)}
    values |= {f"x{k}": {i: 3.0 + v for i, v in enumerate(d)} for k, d in enumerate(differences)}
    return " ".join(answer(compare(values, "log_uniform"), "held-out nats per token"))


def test_the_answer_is_never_stronger_than_the_tests():
    one = words([-0.5])
    assert "One seed only: no p-value" in one and "p =" not in one and "better than" not in one
    three = words([-0.5, -0.6, -0.5])
    assert "3 seeds cannot show a difference" in three and "p ≥ 0.25 whatever the data" in three
    assert "needs 6 seeds" in three and "better than" not in three and "normally distributed" in three
    six = words([-0.5, -0.6, -0.5, -0.5, -0.4, -0.5])
    assert "better than log_uniform" in six and "cannot show" not in six
    several = words(*[[-0.5, -0.6, -0.5, -0.5, -0.4, -0.5]] * 4)
    assert "p ≥ 0.031 whatever" in several and "p ≥ 0.12" in several and "needs 8 seeds" in several
    assert "better than" not in several
    assert "no difference larger than 0.005" in words([0.001, -0.001, 0.0005, -0.0005, 0.001, -0.001])
    assert "neither a difference nor its absence" in words([0.1, -0.1, 0.05, -0.05, 0.1, -0.1])
    same = [0.001, -0.001, 0.0005, -0.0005, 0.001, -0.001]
    near = [0.004, 0.001, 0.0035, 0.0025, 0.006, 0.001]  # alone at 2.5 %, which is not enough for one of three
    contrasts = compare({"b": dict.fromkeys(range(6), 0.0), **{n: dict(enumerate(near)) for n in "xyz"}}, "b")
    assert contrasts[0].p_equivalence < 0.05 < contrasts[0].p_equivalence_holm == 3 * contrasts[0].p_equivalence
    assert not contrasts[0].equivalent and words(same, same).count("no difference larger") == 2
    assert "worse than log_uniform" in words([0.5, 0.6, 0.5, 0.5, 0.4, 0.5])


def test_a_contrast_with_one_pair_left_does_not_speak_for_the_others():
    values = {"b": dict.fromkeys(range(8), 3.0), "x": {i: 2.5 + 0.01 * i for i in range(8)}, "y": {0: 2.0}}
    text = " ".join(answer(compare(values, "b"), "nats"))
    assert "better than b (sign flip, Holm: p = 0.0078)" in text and "y: -1.0000 nats in the one seed." in text
    assert "One seed only" not in text and "cannot show" not in text


# ------------------------------------------------------------------------------------------------------------- factors


def crossed_values(rng, effect=None, seeds=9):
    """Losses that are the same for all names but for noise, and what `effect` gives for the levels of a name."""
    return {
        name: {s: 3.0 + 0.1 * rng.standard_normal() + (effect(levels) if effect else 0.0) for s in range(seeds)}
        for name, levels in CROSSED.items()
    }


def test_effects_and_interactions_are_those_of_the_cells():
    def effect(levels):
        of_rate = {None: 0.0, 0.0: 0.5, 10.0: -0.2}[levels.get("dt_lr")]
        return 1.0 * (levels["dt_bias"] == "y") + of_rate * (3 if levels["dt_bias"] == "y" else 1)

    values = {name: {s: effect(levels) + s for s in range(4)} for name, levels in CROSSED.items()}
    effects, interactions = crossed(values, CROSSED, "x")
    # y: 1, 1 + 2 * 0.5, 1 - 2 * 0.2 at the three rates; a rate: once and three times its effect
    assert {c.name: pytest.approx(c.interval.mean) for c in effects} == {
        "dt_lr=0.0 (2 pairs)": 1.0,
        "dt_lr=10.0 (2 pairs)": -0.4,
        "dt_bias=y (3 pairs)": (1 + 2 + 0.6) / 3,
    }
    assert {c.name: pytest.approx(c.interval.mean) for c in interactions} == {
        "dt_bias=y with dt_lr=0.0": 1.0,
        "dt_bias=y with dt_lr=10.0": -0.4,
    }
    # by hand, of one seed
    by_hand = (values["y0.0"][2] - values["y"][2]) - (values["x0.0"][2] - values["x"][2])
    assert interactions[0].differences[2] == pytest.approx(by_hand)


def test_a_design_that_crosses_nothing_has_no_factors():
    names = {"x": {"dt_bias": "x"}, "y": {"dt_bias": "y"}, "x+A": {"dt_bias": "x", "A": "ones"}}
    values = {name: {0: 1.0, 1: 2.0} for name in names}
    assert crossed(values, names, "x") == ([], [])


def test_a_lost_run_takes_its_seed_out_of_what_it_is_part_of():
    values = crossed_values(np.random.default_rng(0))
    del values["y10.0"][4]
    effects, interactions = crossed(values, CROSSED, "x")
    seeds = {c.name: c.seeds for c in (*effects, *interactions)}
    assert 4 in seeds["dt_lr=0.0 (2 pairs)"] and 4 not in seeds["dt_lr=10.0 (2 pairs)"]
    assert 4 in seeds["dt_bias=y with dt_lr=0.0"] and 4 not in seeds["dt_bias=y (3 pairs)"]
    del values["y0.0"]
    effects, interactions = crossed(values, CROSSED, "x")
    assert [c.name for c in interactions] == ["dt_bias=y with dt_lr=10.0"]


def test_crossed_designs_without_effects_show_one_in_one_of_twenty():
    """By simulation: where nothing differs, a table of contrasts and one of factors each show anything at all in at
    most 5 % of studies; with an effect of twice the noise they show it."""
    rng, studies = np.random.default_rng(7), 200
    wrong = np.zeros(2)
    for _ in range(studies):
        values = crossed_values(rng, seeds=10)
        tables = compare(values, "x"), [c for found in crossed(values, CROSSED, "x") for c in found]
        wrong += [any(c.shown for c in table) for table in tables]
    limit = stats.binom.ppf(0.999, studies, 0.05)
    assert wrong.max() <= limit and wrong.sum() > 0
    values = crossed_values(rng, lambda levels: 0.2 * (levels.get("dt_lr") == 0.0), seeds=10)
    shown = {c.name for c in crossed(values, CROSSED, "x")[0] if c.shown}
    assert shown == {"dt_lr=0.0 (2 pairs)"}
