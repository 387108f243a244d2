"""Weight decay where it belongs, and the learning rate of every step."""

import itertools
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from mamba2.model import Mamba2LM
from mamba2.training import Schedule, make_optimizer
from tests.test_model import small_config


def decayed_by(decay: str) -> tuple[set[str], Mamba2LM]:
    """Names of the parameters that a step with a gradient of zero moves."""
    model = Mamba2LM(small_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.5, decay=decay)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(model.lm_head.weight, before["lm_head.weight"] * 0.95)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}, model


def test_weight_decay_reaches_matrices_only():
    decayed, model = decayed_by("matrices")
    endings = ("embeddings.weight", "in_proj.weight", "out_proj.weight", "lm_head.weight")
    assert decayed == {name for name, _ in model.named_parameters() if name.endswith(endings)}


def test_the_legacy_decay_spares_biases_only():
    decayed, model = decayed_by("all_but_biases")
    # A_log of the first head is log 1 = 0, but others move
    assert decayed == {name for name, _ in model.named_parameters() if not name.endswith(("dt_bias", "conv1d.bias"))}


def test_betas_and_eps_reach_adamw():
    group = make_optimizer(Mamba2LM(small_config()), 0.1, (0.7, 0.8), 0.5, eps=1e-3).param_groups[0]
    assert group["betas"] == (0.7, 0.8) and group["eps"] == 1e-3


def test_cosine_warms_up_then_falls_to_zero():
    factors = [Schedule("cosine", 100, 10).factor(step) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert Schedule("cosine", 1).factor(0) == 1.0


def test_linear_constant_and_wsd():
    linear = [Schedule("linear", 100, 20).factor(step) for step in range(100)]
    assert linear[20] == 1.0 and linear[60] == pytest.approx(0.5) and linear[99] == pytest.approx(1 / 80)
    assert {Schedule("constant", 100, 20).factor(step) for step in range(19, 100)} == {1.0}
    wsd = [Schedule("wsd", 100, 20, decay_steps=40).factor(step) for step in range(101)]
    assert set(wsd[19:61]) == {1.0} and wsd[80] == pytest.approx(0.5) and wsd[100] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_floor_is_where_a_schedule_ends(kind):
    schedule = Schedule(kind, 100, 10, decay_steps=20, floor=0.1)
    assert schedule.factor(100) == pytest.approx(0.1) and schedule.factor(10) == 1.0


def test_warmup_from_zero_is_transformers_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 7, 50)
    ours = Schedule("cosine", 50, 7, warmup_from_zero=True)
    for step in range(50):
        assert ours.factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_schedules_are_the_same_as_far_as_their_rates_are():
    short, longer = Schedule("wsd", 100, 10, 20), Schedule("wsd", 200, 10, 20)
    assert short.same_until(longer, 80) and not short.same_until(longer, 82)
    assert not Schedule("cosine", 100).same_until(Schedule("cosine", 200), 2)
    assert math.isclose(short.factor(81), 0.95)
