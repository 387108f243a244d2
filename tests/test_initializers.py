"""Initializers of dt_bias: each formula against values worked out by hand or with numpy; seeds, records, refusals."""

import hashlib
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from mamba2.initializers import (
    INITIALIZERS,
    DtParams,
    dt_bias_sha256,
    dt_table,
    half_life,
    inverse_softplus,
    make_dt_bias,
    seed_stream,
)

L, H = 12, 24
SHAPE = (L, H)
A = torch.arange(1, H + 1).double()  # the study's: log(1..24) in A_log
ETA = np.arange(H) / (H - 1)  # η
NAMES = list(INITIALIZERS["dt_bias"])
MEASURED = {"length": 256.0, "eigenvalue": 9.0}  # what inverse_length and autocorrelation read
SPACED = ["uniform", "linear_decay", "linear_decay_reverse", "log_linspace", "uniform_per_head", "linear_shuffle"]
SPACED += ["geometric_decay", "geometric_decay_reverse", "constant"]  # between t_min and t_max
RANDOM = {"uniform", "log_uniform", "uniform_per_head", "chrono"}
SHUFFLED = {"log_linspace", "linear_shuffle", "halflife", "retnet", "rwkv", "lightning"}


def dt_of(name, shape=SHAPE, A=A, seed=42, **params) -> np.ndarray:
    """dt in float64, straight from the formula."""
    initializer = INITIALIZERS["dt_bias"][name]
    p = DtParams(**{**MEASURED, **params})
    return initializer.function(shape, A.expand(shape), p, seed_stream(seed, initializer.stream)).numpy()


def rate_of(name, **kwargs) -> np.ndarray:
    """-ln of the share of the state that is kept per token, heads in ascending order."""
    return np.sort(dt_of(name, **kwargs) * A.numpy(), axis=1)


# ------------------------------------------------------------------------------------------------------------- formulas


def test_all_names_are_there_and_documented():
    """Models and studies on disk say these names."""
    assert {*SPACED, "log_uniform", "ones", "halflife", "retnet", "rwkv", "chrono", "hgrn", "lightning"} <= set(NAMES)
    assert all(initializer.function.__doc__ for choices in INITIALIZERS.values() for initializer in choices.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), SHAPE])
def test_dt_is_positive_float64_of_the_shape_asked_for(name, shape):
    initializer = INITIALIZERS["dt_bias"][name]
    dt = initializer.function(
        shape, torch.ones(shape).double(), DtParams(**MEASURED), seed_stream(0, initializer.stream)
    )
    assert dt.shape == shape and dt.dtype == torch.float64
    assert bool(((dt > 0) & dt.isfinite()).all())


def test_uniform_is_one_draw_per_layer():
    dt = dt_of("uniform", shape=(4000, 3), A=torch.ones(3))
    assert (dt == dt[:, :1]).all()
    assert stats.kstest(dt[:, 0], stats.uniform(0.001, 0.099).cdf).pvalue > 0.01


def test_linear_decay_and_reverse():
    dt, reverse = dt_of("linear_decay", shape=(3, 2), A=A[:2]), dt_of("linear_decay_reverse", shape=(3, 2), A=A[:2])
    np.testing.assert_allclose(dt, [[0.001] * 2, [0.0505] * 2, [0.1] * 2], rtol=1e-14)
    np.testing.assert_allclose(reverse, dt[::-1], rtol=1e-14)
    assert dt_of("linear_decay", shape=(1, 1), A=A[:1]) == 0.001 and dt_of("linear_decay_reverse", (1, 1), A[:1]) == 0.1


def test_geometric_decay_and_reverse():
    dt = dt_of("geometric_decay", shape=(3, 1), A=A[:1])
    np.testing.assert_allclose(dt[:, 0], [0.001, 0.01, 0.1], rtol=1e-14)
    np.testing.assert_allclose(dt_of("geometric_decay_reverse", shape=(3, 1), A=A[:1]), dt[::-1], rtol=1e-14)


def test_log_uniform_is_mambas_default():
    dt = dt_of("log_uniform", shape=(200, 50), A=A[:1])
    log10 = np.log10(dt).ravel()
    assert stats.kstest(log10, stats.uniform(-3, 2).cdf).pvalue > 0.01
    assert np.unique(dt).size == dt.size  # per layer and head


def test_log_uniform_has_a_floor_and_nothing_else_has():
    low = {"t_min": 1e-6, "t_max": 1e-5}
    assert (dt_of("log_uniform", **low) == 1e-4).all()
    assert (dt_of("log_uniform", **low, dt_floor=0.0) < 1e-5).all()
    assert all((dt_of(name, **low) <= 1e-5).all() for name in SPACED)
    assert dt_of("lightning").min() < 1e-8 and dt_of("halflife").min() < 5e-5


def test_log_linspace_is_even_in_log_time_in_every_layer():
    dt = dt_of("log_linspace")
    np.testing.assert_allclose(np.sort(dt, axis=1), np.tile(np.logspace(-3, -1, H), (L, 1)), rtol=1e-13)


def test_uniform_per_head_is_one_draw_per_head():
    dt = dt_of("uniform_per_head", shape=(200, 50), A=A[:1])
    assert np.unique(dt).size == dt.size
    assert stats.kstest(dt.ravel(), stats.uniform(0.001, 0.099).cdf).pvalue > 0.01


def test_linear_shuffle_has_the_values_of_linear_decay_in_another_order():
    dt = dt_of("linear_shuffle")
    assert (dt == dt[:, :1]).all()
    np.testing.assert_array_equal(np.sort(dt, axis=0), dt_of("linear_decay"))
    assert (dt != dt_of("linear_decay")).any()


def test_constant_is_the_geometric_mean_unless_given():
    np.testing.assert_allclose(dt_of("constant"), np.full(SHAPE, 0.01), rtol=1e-14)
    np.testing.assert_array_equal(dt_of("constant", value=0.3), np.full(SHAPE, 0.3))


def test_ones_is_a_bias_of_exactly_one():
    np.testing.assert_allclose(dt_of("ones"), np.full(SHAPE, 1.3132616875182228), rtol=1e-15)  # ln(1 + e)
    dt_bias, _ = make_dt_bias("ones", SHAPE, A, seed=0)
    assert torch.equal(dt_bias, torch.ones(SHAPE))


def test_halflife_spaces_half_lives_geometrically_whatever_A_is():
    for magnitudes in (A, torch.rand(SHAPE, generator=seed_stream(0, "test"), dtype=torch.float64) * 15 + 1):
        dt = dt_of("halflife", A=magnitudes, half_life_min=2, half_life_max=512)
        tokens = np.sort(half_life(torch.from_numpy(dt), magnitudes).numpy(), axis=1)
        np.testing.assert_allclose(tokens, np.tile(np.geomspace(2, 512, H), (L, 1)), rtol=1e-12)


def test_retnet_has_the_decays_of_the_paper():
    """With 5 heads the spacing is the paper's own: γ = 1 - 2^(-5-h)."""
    dt = dt_of("retnet", shape=(L, 5), A=A[:5])
    kept = np.sort(np.exp(-dt * A[:5].numpy()), axis=1)
    np.testing.assert_allclose(kept, np.tile(1 - 2.0 ** (-5 - np.arange(5)), (L, 1)), rtol=1e-14)
    forgotten = np.exp(np.log(1 / 32) + ETA * (np.log(1 / 512) - np.log(1 / 32)))
    np.testing.assert_allclose(rate_of("retnet"), np.tile(np.sort(-np.log(1 - forgotten)), (L, 1)), rtol=1e-12)


def test_rwkv_matches_its_time_decay():
    expected = [[math.exp(-6 + 5 * (h / 23) ** (0.7 + 1.3 * (l / 11))) for h in range(24)] for l in range(12)]
    np.testing.assert_allclose(rate_of("rwkv"), expected, rtol=1e-12)
    # middle head of five: first layer -6 + 5 · 0.5^0.7, last layer -6 + 5 · 0.5²
    middle = np.median(dt_of("rwkv", shape=(2, 5), A=torch.ones(5)), axis=1)
    np.testing.assert_allclose(np.log(middle), [-6 + 5 * 0.6155722067, -4.75], rtol=1e-9)


@pytest.mark.parametrize("longest", [3, 100])
def test_chrono_keeps_v_over_one_plus_v(longest):
    dt = dt_of("chrono", shape=(200, 50), A=A[:1] * 3, chrono_max=longest)
    kept = np.exp(-dt * 3).ravel()
    v = kept / (1 - kept)
    assert stats.kstest(v, stats.uniform(1, longest - 2).cdf).pvalue > 0.01  # U(1, T-1)


def test_hgrn_retention_rises_from_one_half():
    kept = np.exp(-dt_of("hgrn", shape=(4, 3), A=A[:3]) * A[:3].numpy())
    np.testing.assert_allclose(kept, np.tile([[0.5], [0.625], [0.75], [0.875]], (1, 3)), rtol=1e-14)


def test_lightning_has_alibis_slopes_fading_with_depth():
    rate = dt_of("lightning", shape=(3, 8), A=torch.ones(8))  # 8 heads: slopes 1/2, 1/4, ... 1/256
    slopes = np.array([1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2])
    np.testing.assert_allclose(np.sort(rate, axis=1), np.outer([1.00001, 0.50001, 1e-5], slopes), rtol=1e-10)


@pytest.mark.parametrize("name", ["hgrn", "rwkv", "lightning", "linear_decay_reverse", "geometric_decay_reverse"])
def test_deeper_layers_remember_longer(name):
    tokens = np.median(math.log(2) / (dt_of(name) * A.numpy()), axis=1)
    assert (np.diff(tokens) > 0).all()


@pytest.mark.parametrize("name", sorted(SHUFFLED - {"linear_shuffle"}))
def test_heads_are_shuffled_apart_from_A(name):
    """Half-life must not rank heads as A does, and layers must not share an order."""
    rate = dt_of(name, shape=(200, H)) * (1 if name == "log_linspace" else A.numpy())
    rho = [stats.spearmanr(A.numpy(), row).statistic for row in rate]
    assert abs(np.mean(rho)) < 0.05
    assert len({tuple(row) for row in np.argsort(rate, axis=1)}) == 200


# ----------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_fixes_dt_bias_and_only_random_ones_depend_on_it(name):
    torch.manual_seed(1)
    first, record = make_dt_bias(name, SHAPE, A, 42, DtParams(**MEASURED))
    torch.manual_seed(2)
    again, same_record = make_dt_bias(name, SHAPE, A, 42, DtParams(**MEASURED))
    other, _ = make_dt_bias(name, SHAPE, A, 43, DtParams(**MEASURED))
    assert torch.equal(first, again) and record == same_record
    assert torch.equal(first, other) == (name not in RANDOM | SHUFFLED)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generator_is_left_alone(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    make_dt_bias(name, SHAPE, A, 42, DtParams(**MEASURED))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_one_seed_are_independent():
    draws = {
        (seed, name): torch.rand(3, generator=seed_stream(seed, name))
        for seed in (0, 1, -1, 2**40)
        for name in ("dt_bias", "dt_bias_shuffle", "weights")
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(draws)
    assert torch.equal(draws[0, "weights"], torch.rand(3, generator=seed_stream(0, "weights")))


def test_a_seed_stream_is_the_documented_one():
    digest = hashlib.sha256(b"42:dt_bias").digest()
    expected = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)
    assert torch.equal(torch.rand(5, generator=expected), torch.rand(5, generator=seed_stream(42, "dt_bias")))


# --------------------------------------------------------------------------------------------- bias, half-life, record


def test_softplus_gives_dt_back_in_float32():
    dt = torch.logspace(-6, 1, 200, dtype=torch.float64)
    back = F.softplus(inverse_softplus(dt).float()).double()
    torch.testing.assert_close(back, dt, rtol=1e-6, atol=0)


def test_inverse_softplus_at_both_ends():
    dt = torch.tensor([1e-12, math.log(2), 50.0], dtype=torch.float64)
    torch.testing.assert_close(
        inverse_softplus(dt),
        torch.tensor([math.log(1e-12) + 5e-13, 0.0, 50.0], dtype=torch.float64),
        rtol=1e-13,
        atol=1e-15,
    )
    assert inverse_softplus(torch.tensor([0.1])).dtype == torch.float64


def test_half_life_is_where_half_is_left():
    dt, magnitude = torch.tensor([0.01, 0.1]).double(), torch.tensor([1.0, 24.0]).double()
    tokens = half_life(dt, magnitude)
    torch.testing.assert_close(torch.exp(-dt * magnitude * tokens), torch.full((2,), 0.5).double())
    assert abs(tokens[0].item() - 69.3147) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_dt_bias_gives_the_dt_of_the_formula(name):
    dt_bias, _ = make_dt_bias(name, SHAPE, A, 3, DtParams(**MEASURED))
    assert dt_bias.dtype == torch.float32 and dt_bias.shape == SHAPE
    # float32 keeps the bias to 6e-8 of itself, and |dt_bias| is below 21
    np.testing.assert_allclose(F.softplus(dt_bias.double()).numpy(), dt_of(name, seed=3), rtol=1.3e-6)


def test_A_may_differ_by_layer():
    per_layer = A * torch.arange(1, L + 1)[:, None]
    shared, _ = make_dt_bias("hgrn", SHAPE, A, seed=0)
    scaled, _ = make_dt_bias("hgrn", SHAPE, per_layer, seed=0)
    ratio = F.softplus(shared.double()) / F.softplus(scaled.double())
    torch.testing.assert_close(ratio, torch.arange(1, L + 1).double()[:, None].expand(SHAPE), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_record_says_what_was_applied(name):
    params = DtParams(t_min=0.002, t_max=0.05, half_life_max=99.0, chrono_max=77.0, **MEASURED)
    dt_bias, record = make_dt_bias(name, SHAPE, A, seed=11, params=params)
    assert json.loads(json.dumps(record)) == record
    assert (record["name"], record["seed"]) == (name, 11)
    assert record["sha256"] == hashlib.sha256(dt_bias.numpy().tobytes()).hexdigest() == dt_bias_sha256(dt_bias)
    parameters = {
        "log_uniform": {"t_min": 0.002, "t_max": 0.05, "dt_floor": 1e-4},
        "constant": {"constant": pytest.approx(0.01)},
        "halflife": {"half_life_min": 1.0, "half_life_max": 99.0},
        "chrono": {"chrono_max": 77.0},
        "inverse_length": {"length": 256.0},
        "autocorrelation": MEASURED,
        **{key: {} for key in ("ones", "retnet", "rwkv", "hgrn", "lightning")},
    }.get(name, {"t_min": 0.002, "t_max": 0.05})
    assert {key: record[key] for key in record.keys() - {"name", "seed", "sha256"}} == parameters


@pytest.mark.parametrize("name", NAMES)
def test_an_initializer_reads_the_parameters_it_records_and_no_others(name):
    base = DtParams(t_min=1e-5, **MEASURED)
    changed = {"t_min": 2e-5, "t_max": 0.3, "dt_floor": 1e-3, "value": 0.5}
    changed |= {"half_life_min": 2.0, "half_life_max": 50.0, "chrono_max": 50.0, "length": 99.0, "eigenvalue": 5.0}
    reads = set(INITIALIZERS["dt_bias"][name].parameters)
    reads = {"value", "t_min", "t_max"} if name == "constant" else reads
    before = make_dt_bias(name, SHAPE, A, 0, base)[0]
    for key, value in changed.items():
        after = make_dt_bias(name, SHAPE, A, 0, DtParams(**{"t_min": 1e-5, **MEASURED, key: value}))[0]
        assert torch.equal(before, after) == (key not in reads), key


def test_the_hash_is_of_values_not_of_memory():
    dt_bias = torch.arange(6.0).view(2, 3)
    assert dt_bias_sha256(dt_bias) == dt_bias_sha256(dt_bias.t().contiguous().t())
    assert dt_bias_sha256(dt_bias) == dt_bias_sha256(dt_bias.double().requires_grad_())
    assert dt_bias_sha256(dt_bias) != dt_bias_sha256(dt_bias.t())
    assert dt_bias_sha256(dt_bias) == hashlib.sha256(struct.pack("<6f", 0, 1, 2, 3, 4, 5)).hexdigest()


def test_the_study_figures_for_half_life():
    """Median 9.8 tokens with Mamba's defaults (6 % of heads above 100); 1.5 with dt even in its range and A = 1..24."""
    n = 4000
    mamba_A = 1 + 15 * torch.rand((n, H), generator=seed_stream(0, "test"), dtype=torch.float64)
    tokens = half_life(torch.from_numpy(dt_of("log_uniform", (n, H), mamba_A)), mamba_A)
    assert abs(tokens.median().item() - 9.8) < 0.2
    assert abs((tokens > 100).double().mean().item() - 0.06) < 0.005
    tokens = half_life(torch.from_numpy(dt_of("uniform", (n, H), A)), A)
    assert abs(tokens.median().item() - 1.5) < 0.2


def test_the_readme_names_every_choice_of_every_parameter():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert [name for choices in INITIALIZERS.values() for name in choices if f"`{name}`" not in text] == []


def test_dt_by_length_and_by_autocorrelation():
    assert (dt_of("inverse_length", length=128.0) == 1 / 128).all()
    assert (
        dt_of("autocorrelation", length=256.0, eigenvalue=1.0) == 1 / 16
    ).all()  # independent tokens: 1/sqrt(length)
    assert (dt_of("autocorrelation", length=256.0, eigenvalue=256.0) == 1 / 256).all()  # constant ones: 1/length


def test_what_is_not_given_is_named():
    with pytest.raises(ValueError, match="inverse_length needs length, which is not given"):
        make_dt_bias("inverse_length", SHAPE, A, 0)
    with pytest.raises(ValueError, match="autocorrelation needs eigenvalue, which is not given"):
        make_dt_bias("autocorrelation", SHAPE, A, 0, DtParams(length=64.0))


# ------------------------------------------------------------------------------------------------------ table, refusals


def test_the_table_shows_each_layer():
    dt_bias, _ = make_dt_bias("linear_decay", (2, 3), torch.tensor([1.0, 2.0, 4.0]), seed=0)
    lines = dt_table(dt_bias, torch.tensor([1.0, 2.0, 4.0])).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    cells = [line.replace("|", " ").split() for line in lines[2:]]
    # half-life at dt = 0.001: 693, 347, 173 tokens; at 0.1 a hundredth of that
    assert cells[0] == ["0", "0.001", "0.001", "0.001", "173", "347", "693", "100%", "100%", "0%"]
    assert cells[1] == ["1", "0.1", "0.1", "0.1", "1.73", "3.47", "6.93", "0%", "0%", "0%"]


def test_the_table_counts_a_half_life_of_1024_as_not_above_1024():
    dt_bias, _ = make_dt_bias("halflife", SHAPE, A, seed=42)
    rows = dt_table(dt_bias, A).splitlines()[2:]
    assert {tuple(row.split("|")[2].split()) for row in rows} == {("1", "32.4", "1024")}
    assert {tuple(row.split("|")[3].split()) for row in rows} == {("58%", "29%", "0%")}


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(
        ValueError, match=r"unknown initialization 'unifrom': choose from uniform, linear_decay, .*lightning"
    ):
        make_dt_bias("unifrom", SHAPE, A, seed=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"t_min": 0.2}, "t_min is 0.2 and t_max is 0.1, and must satisfy 0 < t_min <= t_max"),
        ({"t_min": 0.0}, "t_min is 0.0"),
        ({"t_max": math.inf}, "t_max is inf"),
        ({"t_min": math.nan}, "t_min is nan"),
        ({"dt_floor": -1e-4}, "dt_floor is -0.0001"),
        ({"value": 0.0}, "value is 0.0"),
        ({"half_life_min": 2000.0}, "half_life_min is 2000.0 and half_life_max is 1024.0"),
        ({"chrono_max": 2.0}, "chrono_max is 2.0, and must be above 2"),
        ({"length": 0}, "length is 0, and must be above 0"),
        ({"eigenvalue": math.inf}, "eigenvalue is inf, and must be above 0"),
    ],
)
def test_parameters_outside_their_domain_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        DtParams(**params)
    DtParams(t_min=0.1, t_max=0.1, dt_floor=0.0)


@pytest.mark.parametrize("name", INITIALIZERS["dt_bias"])
@pytest.mark.parametrize(
    "params",
    [
        {"t_max": 1e308},
        {"t_max": 3e38},
        {"t_min": 1e-320},
        {"t_min": 1e-44, "dt_floor": 0.0},
        {"value": 1e300},
        {"value": 1e-42},
        {"half_life_min": 1e-300},
        {"half_life_max": 1e39},
        {"half_life_max": 1e300},
        {"chrono_max": 1e300},
        {"length": 1e300},
        {"eigenvalue": 1e300},
    ],
)
def test_what_float32_does_not_hold_is_refused_or_not_made(name, params):
    tiny = torch.finfo(torch.float32).tiny
    try:
        dt_bias, _ = make_dt_bias(name, (3, 8), torch.arange(1.0, 9), 0, DtParams(**{**MEASURED, **params}))
    except ValueError as error:
        assert re.match(
            rf"(dt(_bias)?|the half-life) of {name} .*would hold .*, and float32 holds numbers from 1.18e-38",
            str(error),
        )
    else:
        dt = torch.nn.functional.softplus(dt_bias)
        assert (dt.isfinite() & (dt >= tiny) & ((dt_bias == 0) | (dt_bias.abs() >= tiny))).all()
        assert (half_life(dt, torch.arange(1.0, 9)) >= tiny).all()


@pytest.mark.parametrize(
    ("shape", "magnitude", "message"),
    [
        ((0, 4), torch.ones(4), r"shape is \(0, 4\)"),
        ((4,), torch.ones(4), r"shape is \(4,\)"),
        ((2, 4), torch.ones(3), r"A has shape \(3,\), and must broadcast to \(n_layers, nheads\) = \(2, 4\)"),
        ((2, 4), torch.ones(1, 2, 4), r"A has shape \(1, 2, 4\)"),
        ((2, 4), -torch.ones(4), "A goes from -1 to -1, and must be positive and finite"),
        ((2, 4), torch.tensor([1, 2, 3, math.inf]), "A goes from 1 to inf"),
    ],
)
def test_a_bad_shape_or_A_is_refused(shape, magnitude, message):
    with pytest.raises(ValueError, match=message):
        make_dt_bias("hgrn", shape, magnitude, seed=0)


def test_parameters_are_read_from_texts_and_lengths_as_shares():
    settings = ["half_life_min=2", "half_life_max=0.5L", "chrono_max=2L", "value=1e-2"]
    read = DtParams.read(settings, length=256, t_max=0.2)
    assert read == DtParams(t_max=0.2, half_life_min=2.0, half_life_max=128.0, chrono_max=512.0, value=0.01, length=256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["half_live_max=2"], "half_live_max=2 sets no parameter of an initialisation: give t_min, t_max"),
        (["value"], "value: '' is no number"),
        (["value=0.1x"], "value=0.1x: '0.1x' is no number"),
        (["value=0.1", "value=0.2"], "value is set twice"),
        (["value=0.1L"], "value is no length; a share of L is for half_life_min, half_life_max, chrono_max"),
        (["half_life_max=0.5L"], "how long L is, --length says"),
        (["value=nan"], "value is nan, and must be above 0"),
    ],
)
def test_a_parameter_that_cannot_be_read_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DtParams.read(settings)
