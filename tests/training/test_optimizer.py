"""Weight decay where it belongs, and the learning rate of every step."""

import itertools
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from mamba2.model import Mamba2LM
from mamba2.training import OPTIMIZERS, make_optimizer
from mamba2.training.optimizer import Muon, Schedule
from tests.test_model import small_config

MATRICES = ("embeddings.weight", "in_proj.weight", "out_proj.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("decay", "reached"),
    [
        ("matrices", lambda name: name.endswith(MATRICES)),
        ("all_but_biases", lambda name: not name.endswith(("dt_bias", "conv1d.bias"))),
    ],
)
def test_weight_decay_reaches_what_it_is_for(decay, reached):
    """By a step with a gradient of zero. In A_log only the first head does not move, as log 1 = 0."""
    model = Mamba2LM(small_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.5, decay=decay)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(model.lm_head.weight, before["lm_head.weight"] * 0.95)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(filter(reached, before))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("multiple", [0.0, 1.0, 10.0])
def test_dt_bias_and_A_have_rates_of_their_own(name, multiple):
    """The first step of AdamW moves a parameter by its rate, and none at all with a rate of 0."""
    models = []
    for rates in ({}, {"dt": multiple}, {"A": multiple}):
        model = Mamba2LM(small_config())
        optimizer = make_optimizer(model, 1e-3, (0.9, 0.99), 0.0, name=name, rates=rates)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        optimizer.step()
        models.append(dict(model.named_parameters()))
    initial = dict(Mamba2LM(small_config()).named_parameters())
    for moved, parameter in zip(models[1:], ("dt_bias", "A_log")):
        for key in initial:
            if key.endswith(parameter):
                expected = torch.full_like(initial[key], 1e-3 * multiple)
                torch.testing.assert_close((moved[key] - initial[key]).abs(), expected, rtol=1e-3, atol=1e-6)
                assert multiple or moved[key].equal(initial[key])
            else:
                assert moved[key].equal(models[0][key])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_is_torchs_where_a_matrix_has_no_parts(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    groups = [{"params": [ours], "weight_decay": 0.1}]
    optimizers = Muon(groups, {}, 0.02), torch.optim.Muon([theirs], 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_muon_treats_the_parts_of_a_fused_projection_one_by_one_and_leaves_the_rest_to_adamw():
    """A step moves each part as a step of that part alone would."""
    config = small_config(attn_layer_idx=[1], attn_cfg={"num_heads": 4, "causal": True})
    models = [Mamba2LM(config), Mamba2LM(config)]
    muon, adamw = (
        make_optimizer(m, 0.02, (0.9, 0.99), 0.1, name=name) for m, name in zip(models, ("muon", "adamw"), strict=True)
    )
    generator = torch.Generator().manual_seed(1)
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient.clone()
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        optimizer.step()
    rows = {0: (64, 64, 28, 28, 8), 1: (32, 32, 32)}  # z, x, B, C, dt; q, k, v
    for (name, ours), (_, theirs) in zip(*(m.named_parameters() for m in models), strict=True):
        if not name.endswith("_proj.weight"):
            assert torch.equal(ours, theirs), name
            continue
        parts = rows[int(name.split(".")[2]) % 2] if "in_proj" in name else (len(ours),)
        for old, gradient, new in zip(*(t.split(parts) for t in (before[name], ours.grad, ours)), strict=True):
            alone = torch.nn.Parameter(old.clone())
            alone.grad = gradient.clone()
            torch.optim.Muon([alone], 0.02, 0.1, adjust_lr_fn="match_rms_adamw").step()
            torch.testing.assert_close(new.detach(), alone.detach(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_one_group_with_the_options_given(name):
    model = Mamba2LM(small_config())
    groups = make_optimizer(model, 0.1, (0.7, 0.8), 0.5, eps=1e-3, name=name).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    assert {group["peak"] for group in groups} == {0.1}
    assert {(group["betas"], group["eps"]) for group in groups if "betas" in group} == {((0.7, 0.8), 1e-3)}


def test_schedules_warm_up_then_fall_to_zero():
    cosine, linear, wsd, constant = (
        [Schedule(kind, 100, 20, decay_steps=40).factor(step) for step in range(101)]
        for kind in ("cosine", "linear", "wsd", "constant")
    )
    for factors in (cosine, linear, wsd, constant):
        assert factors[0] == 0.05 and factors[19] == factors[20] == 1.0
        assert all(a >= b for a, b in itertools.pairwise(factors[20:]))
    assert cosine[60] == linear[60] == wsd[80] == pytest.approx(0.5) and cosine[40] > linear[40]
    assert [factors[100] for factors in (cosine, linear, wsd)] == pytest.approx([0.0] * 3)
    assert set(wsd[19:61]) == set(constant[19:]) == {1.0} and linear[99] == pytest.approx(1 / 80)
    assert Schedule("cosine", 1).factor(0) == 1.0


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
