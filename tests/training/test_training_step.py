"""The step: a mean over the tokens of the whole batch, a clip, and no update without a finite gradient."""

import numpy as np
import pytest
import torch

from mamba2.data import Tokens, Windows
from mamba2.model import Mamba2LM
from mamba2.training import make_optimizer
from mamba2.training.step import accumulate_gradients, mean_loss, spread, update
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


def gradients_of(model: Mamba2LM, scale: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, scale)


def test_the_norm_is_that_before_clipping_and_the_gradient_is_clipped():
    count = sum(p.numel() for p in Mamba2LM(small_config()).parameters())
    for clip, expected in ((0.5, 0.5), (0.0, 2.0 * count**0.5), (1e6, 2.0 * count**0.5)):
        model = Mamba2LM(small_config())
        optimizer = make_optimizer(model, 1e-3, (0.9, 0.99), 0.0)
        gradients_of(model, 2.0)
        assert update(model, optimizer, clip) == pytest.approx(2.0 * count**0.5, rel=1e-5)
        first_moments = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
        assert first_moments.norm().item() == pytest.approx(0.1 * expected, rel=1e-4)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = Mamba2LM(small_config())
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.99), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    gradients_of(model, 1.0)
    model.lm_head.weight.grad[3, 3] = bad
    assert update(model, optimizer, 1.0) is None
    assert not optimizer.state
    assert all(map(torch.equal, model.parameters(), before))
