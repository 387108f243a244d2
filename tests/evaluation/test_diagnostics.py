"""Diagnostics against what can be computed in another way, or is known beforehand."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mamba2.evaluation import diagnostics
from mamba2.initializers import INITIALIZERS, DtParams
from mamba2.model import Mamba2LM
from tests.test_model import small_config


@pytest.fixture(scope="module")
def model():
    return Mamba2LM(small_config(), seed=2, initialization="log_uniform").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (3, 65), generator=torch.Generator().manual_seed(1))


def test_nominal_half_life_is_when_half_is_left(model):
    tau = diagnostics.nominal_half_life(model)
    dt = F.softplus(model.dt_bias().double())
    left = torch.exp(-dt * model.A() * torch.from_numpy(tau))
    assert left.allclose(torch.full_like(left, 0.5))


def test_without_a_projection_the_effective_half_life_is_the_nominal_one(ids):
    model = Mamba2LM(small_config(), seed=2)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.in_proj.weight[-8:] = 0  # the rows of dt
    nominal = diagnostics.nominal_half_life(model)
    assert diagnostics.effective_half_life(model, diagnostics.trace(model, ids)) == pytest.approx(nominal, rel=1e-5)
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[-8:] = 0.3
    changed = diagnostics.effective_half_life(model, diagnostics.trace(model, ids)) / nominal
    assert np.allclose(changed[0], 1, rtol=1e-5) and not np.allclose(changed[1], 1, rtol=0.01)


def test_the_trace_is_of_what_the_model_computes(model, ids):
    """Without D the state's part is the whole output: the ratio says how much D x adds."""
    traces = diagnostics.trace(model, ids)
    x, residual = F.embedding(ids, model.backbone.embeddings.weight), None
    for block, layer in zip(model.backbone.layers, traces):
        x, residual, _ = block(x, residual, None, None)
        assert layer.residual_rms == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-5)
        assert layer.output_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
    doubled = Mamba2LM(small_config(), seed=2)
    with torch.no_grad():
        doubled.backbone.layers[0].mixer.D.fill_(2.0)
    assert diagnostics.trace(doubled, ids)[0].ssm_to_skip == pytest.approx(traces[0].ssm_to_skip / 2, rel=1e-5)


def test_shares_of_heads():
    tau = np.array([[0.5, 2.0], [1024.0001, 2000.0]])
    assert diagnostics.shares_remembering(tau) == {1: 0.75, 16: 0.5, 128: 0.5, 1024: 0.25}


def test_decay_mask_is_the_product_of_decays():
    dt, A = torch.tensor([0.1, 0.2, 0.4]), 2.0
    mask = diagnostics.decay_mask(dt, A)
    assert mask[2, 0] == pytest.approx(math.exp(-2 * 0.6)) and mask[1, 0] == pytest.approx(math.exp(-0.4))
    assert np.diag(mask) == pytest.approx([1, 1, 1]) and np.isnan(mask[0, 1])


def test_gradient_against_distance_is_that_of_a_finite_difference(model, ids):
    one = ids[:1]
    measured = diagnostics.gradient_against_distance(model, one)
    assert len(measured) == 64
    embedded = F.embedding(one[:, :-1], model.backbone.embeddings.weight).double()
    distance, index = 5, 63 - 5
    double = Mamba2LM(small_config(), seed=2).double()

    def loss(x):
        residual, y = None, x
        for block in double.backbone.layers:
            y, residual, _ = block(y, residual, None, None)
        hidden = F.rms_norm(y + residual, (32,), double.backbone.norm_f.weight, 1e-5)[0, -1]
        return F.cross_entropy(hidden @ double.lm_head.weight.T, one[0, -1])

    gradient = []
    with torch.no_grad():
        for i in range(32):
            step = torch.zeros_like(embedded)
            step[0, index, i] = 1e-5
            gradient.append(((loss(embedded + step) - loss(embedded - step)) / 2e-5).item())
    assert measured[distance] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
    assert not model.backbone.layers[0]._forward_pre_hooks


def test_state_rms_is_that_of_one_pass(model, ids):
    positions, rms = diagnostics.state_rms(model, ids)
    assert positions.tolist() == [1, 2, 4, 8, 16, 32, 64]
    with torch.no_grad():
        _, state = model.backbone(ids[:, :16])
    assert rms[4] == pytest.approx([layer.ssm.square().mean().sqrt().item() for layer in state], rel=1e-4)


def test_loss_by_position_averages_bins_of_the_plain_loss(model, ids):
    ends, losses = diagnostics.loss_by_position(model, ids, context=16, batch_size=2)
    with torch.no_grad():
        plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 64)
    assert ends.tolist() == [2, 4, 8, 16, 32, 64]
    assert losses[0] == pytest.approx(plain[:, 1].mean().item(), rel=1e-4)  # two tokens before it
    assert losses[-1] == pytest.approx(plain[:, 32:64].mean().item(), rel=1e-4)


def test_gradient_norms_are_those_of_backward(model, ids):
    measured = diagnostics.gradient_norms(model, ids)
    other = Mamba2LM(small_config(), seed=2)
    (other(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
    for value, block in zip(measured, other.backbone.layers, strict=True):
        squares = sum(p.grad.square().sum() for p in block.parameters())
        assert value == pytest.approx(squares.sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("name", list(INITIALIZERS["dt_bias"]))
def test_the_model_that_training_began_with_is_made_again(name, tmp_path):
    parameters = DtParams(
        t_min=0.002, t_max=0.2, value=0.05, half_life_max=77.0, chrono_max=90.0, length=64.0, eigenvalue=4.0
    )
    model = Mamba2LM(small_config(), seed=6, initialization=name, dt_parameters=parameters)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5
    loaded = Mamba2LM.from_pretrained(model.save_pretrained(tmp_path))
    again = diagnostics.initial_model(loaded)
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    moved = diagnostics.drift(again, loaded)
    assert moved["mean"] == pytest.approx(0.5) and moved["largest"] == pytest.approx(0.5)
    ranks = math.nan if name in ("constant", "ones", "inverse_length", "autocorrelation") else 1.0
    assert moved["rank_correlation"] == pytest.approx(ranks, nan_ok=True)


def test_what_was_not_recorded_is_said():
    model = Mamba2LM(small_config(), seed=1)
    model.config.dt_bias_init["seed"] = 2
    with pytest.raises(ValueError, match="log_uniform, seed 2, is not the recorded one"):
        diagnostics.initial_model(model)
    model.config = small_config()
    with pytest.raises(ValueError, match="has no dt_bias_init"):
        diagnostics.initial_model(model)


def test_sequences_are_spread_over_the_data():
    assert diagnostics.batches([[0, 1, 2], [3, 4, 5, 6], [7, 8]], 2, 2).tolist() == [[0, 1], [4, 5]]
    with pytest.raises(ValueError, match="the data has 3 tokens, and the diagnostics need 4"):
        diagnostics.batches([[0, 1, 2]], 4, 2)


def test_all_of_it_is_json_and_covers_sixteen_contexts(model):
    long = torch.randint(0, 61, (2, 16 * 8 + 1), generator=torch.Generator().manual_seed(1))
    result = json.loads(json.dumps(diagnostics.diagnose(model, long, context=8, batch_size=2)))
    assert result["position_ends"][-1] == 128 and len(result["position_losses"]) == 7
    assert result["before"]["nominal"] == result["after"]["nominal"]
    assert result["drift"]["mean"] == 0 and result["drift"]["rank_correlation"] == pytest.approx(1)
    assert list(result["masks"]) == ["0", "1", "2"] and np.array(result["masks"]["0"]).shape == (8, 8)
    assert np.max(result["after"]["effective"]) == np.array(result["after"]["effective"])[:, result["mask_head"]].max()
