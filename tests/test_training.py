"""The step: a mean over the tokens of the whole batch, decay where it belongs, a schedule that ends at zero."""

import itertools

import numpy as np
import pytest
import torch

from mamba2.data import Tokens, Windows
from mamba2.model import Mamba2LM
from mamba2.training import accumulate_gradients, learning_rate_factor, make_optimizer, mean_loss, spread
from tests.test_model import small_config


def make_windows() -> Windows:
    ids = (np.arange(16 * 12 - 5) * 7 % 61).astype(np.uint16)
    return Windows(Tokens(ids, np.array([0, 20, 21, 90]), eot_id=0, largest=60), length=16)


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 12])
def test_loss_and_gradient_do_not_depend_on_the_split(micro_batch):
    """The last window is not full: averages of averages would differ."""
    windows = make_windows()
    results = []
    for size in (12, micro_batch):
        model = Mamba2LM(small_config())
        loss, tokens = accumulate_gradients(model, windows, list(range(12)), size, torch.float32)
        assert tokens == 16 * 12 - 6
        results.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert (results[0][1] - results[1][1]).norm() < 1e-6 * results[0][1].norm()


def test_evaluation_is_the_loss_of_the_same_windows_and_leaves_the_mode():
    windows, model = make_windows(), Mamba2LM(small_config()).train()
    expected, _ = accumulate_gradients(model, windows, list(range(12)), 12, torch.float32)
    assert mean_loss(model, windows, 100, 5, torch.float32) == pytest.approx(expected, rel=1e-6)
    assert model.training
    assert spread(12, 4) == [0, 3, 6, 9] and spread(3, 100) == [0, 1, 2]


def test_weight_decay_reaches_matrices_only():
    model = Mamba2LM(small_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    endings = ("embeddings.weight", "in_proj.weight", "out_proj.weight", "lm_head.weight")
    assert decayed == {name for name in before if name.endswith(endings)}
    assert torch.allclose(model.lm_head.weight, before["lm_head.weight"] * 0.95)


def test_schedule_warms_up_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert learning_rate_factor(0, 1, 0) == 1.0
