"""What windows start from in training: the state before them, noise, or nothing."""

import numpy as np
import pytest
import torch

from mamba2.data import Tokens, Windows
from mamba2.distributed import ALONE, World
from mamba2.mixer import MixerState
from mamba2.model import Mamba2LM
from mamba2.training.initial_state import InitialStates
from mamba2.training.step import accumulate_gradients
from tests.test_model import small_config

LENGTH = 16


def make_windows(starts=(0,)) -> Windows:
    ids = (np.arange(LENGTH * 12 + 1) * 7 % 61).astype(np.uint16)
    return Windows(Tokens(ids, np.array(starts), eot_id=0, largest=60), length=LENGTH)


def states(kind: str, model: Mamba2LM, batch: int, world: World = ALONE) -> InitialStates:
    return InitialStates(kind, model, batch, 5, world, torch.device("cpu"))


def train(model: Mamba2LM, windows: Windows, of_steps: list[list[int]], carried: InitialStates, size: int) -> list:
    """Losses of steps without updates, and the gradient."""
    losses = []
    for step, indices in enumerate(of_steps):
        carried.begin(step, [windows.begins_document(index) for index in indices])
        losses.append(accumulate_gradients(model, windows, indices, size, torch.float32, states=carried)[0])
    return [*losses, torch.cat([p.grad.flatten() for p in model.parameters()])]


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_continued_states_make_windows_one_long_text(micro_batch, checkpoint_every):
    """Three streams of four windows have the losses of three texts four times as long, whatever the split."""
    windows, model = make_windows(), Mamba2LM(small_config()).train()
    model.backbone.checkpoint_every = checkpoint_every
    steps = [[0 + step, 4 + step, 8 + step] for step in range(4)]
    *losses, _ = train(model, windows, steps, states("continued", model, 3), micro_batch)
    ids = torch.from_numpy(windows.tokens.ids.astype(np.int64))
    text = ids[:-1].view(3, 4 * LENGTH), ids[1:].view(3, 4 * LENGTH)
    expected = model.token_losses(*text)[0].view(3, 4, LENGTH).mean(dim=(0, 2))
    torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-5, atol=0)


def test_no_gradient_passes_between_windows():
    windows, model = make_windows(), Mamba2LM(small_config()).train()
    carried = states("passed", model, 1)
    *_, gradient = train(model, windows, [[0], [1]], carried, 1)
    model.zero_grad()
    with torch.no_grad():
        _, first = model.backbone(windows.batch([0])[0])
    losses = model(*windows.batch([0])[:2]), model(*windows.batch([1])[:2], state=[s.detach() for s in first])
    (sum(losses) / LENGTH).backward()
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(not part.requires_grad for layer in carried.ended for part in layer)


def test_a_window_that_begins_a_document_starts_empty():
    windows, model = make_windows(starts=(0, 2 * LENGTH, 3 * LENGTH + 1)), Mamba2LM(small_config()).train()
    assert [windows.begins_document(i) for i in range(5)] == [True, False, True, False, False]
    carried = states("passed", model, 1)
    losses = train(model, windows, [[1], [2]], carried, 1)[:2]
    assert losses[1] == pytest.approx(train(model, windows, [[2]], states("passed", model, 1), 1)[0], rel=1e-6)
    carried = Windows(windows.tokens, LENGTH, reset=False)
    assert [carried.begins_document(i) for i in range(5)] == [True, False, False, False, False]


def test_noise_is_as_large_as_the_states_of_the_step_before():
    model = Mamba2LM(small_config(head_dim=8, state_size=64)).train()
    carried = states("noise", model, 6)
    carried.begin(0, [False] * 6)
    assert all((layer.ssm == 0).all() for layer in carried.ended)  # there was no step
    generator = torch.Generator().manual_seed(0)
    for i, layer in enumerate(carried.ended):
        layer.ssm.copy_(torch.randn(layer.ssm.shape, generator=generator) * (i + 1))
        layer.ssm[:, 0] *= 3
        layer.conv.fill_(1.0)
    expected = [layer.ssm.square().mean((0, 2, 3)).sqrt() for layer in carried.ended]
    carried.begin(1, [False] * 5 + [True])
    for layer, rms in zip(carried.ended, expected):
        torch.testing.assert_close(layer.ssm[:5].square().mean((0, 2, 3)).sqrt(), rms, rtol=0.1, atol=0)
        assert (layer.conv == 0).all() and (layer.ssm[5] == 0).all()
        assert abs(layer.ssm[:5].mean()) < 0.1 * rms.max()


@pytest.mark.parametrize("kind", ["passed", "noise", "continued"])
def test_a_row_has_the_same_state_whatever_the_processes(kind, tmp_path, monkeypatch):
    """Five rows among two processes: what the first and the second of them hold is what one process holds."""
    model = Mamba2LM(small_config())
    one = states(kind, model, 5)
    generator = torch.Generator().manual_seed(0)
    for layer in one.ended:
        for part in layer:
            part.copy_(torch.randn(part.shape, generator=generator))
    one.save(tmp_path)
    squares = [layer.ssm.double().square().sum((0, 2, 3)) for layer in one.ended]
    sums = iter([torch.stack(squares), torch.tensor(float(5 * one.ended[0].ssm[0, 0].numel()))] * 2)
    monkeypatch.setattr(World, "sum", lambda world, value: next(sums) if world.size == 2 else value)
    empty = [False, False, True, False, False]
    two = [states(kind, model, 5, World(rank, 2)) for rank in range(2)]
    for part in two:
        part.load(tmp_path)
        part.begin(7, empty)
    one.begin(7, empty)
    for rank, part in enumerate(two):
        for mine, all_rows in zip(part.ended, one.ended):
            assert all(torch.equal(m[: part.mine], a[rank::2]) for m, a in zip(mine, all_rows))


@pytest.mark.parametrize("count", [5, 16, 47, 160])
@pytest.mark.parametrize("batch", [1, 3, 16, 40])
def test_streams_go_on_from_step_to_step_and_visit_every_window(count, batch):
    ids = (np.arange(LENGTH * count + 1) % 61).astype(np.uint16)
    windows = Windows(Tokens(ids, np.array([0]), eot_id=0, largest=60), length=LENGTH)
    steps = [windows.streams(9, step, batch) for step in range(16 * (2 + 20 // batch))]
    indices, anew = np.array([step[0] for step in steps]), np.array([step[1] for step in steps])
    assert anew[0].all() and anew[:, 0].sum() == len(steps) / 16
    goes_on = ~anew[1:]
    assert ((indices[1:] - indices[:-1]) % count == 1)[goes_on].all()
    assert (anew[1:].sum(axis=1) <= -(-batch // 16)).all()  # the rows begin anew at different steps
    assert set(indices.flatten()) == set(range(count))


def test_streams_are_as_mixed_as_single_windows():
    """One pass of ten stretches by two rows: each is read once, in an order drawn from the seed."""
    ids = (np.arange(LENGTH * 160 + 1) % 61).astype(np.uint16)
    windows = Windows(Tokens(ids, np.array([0]), eot_id=0, largest=60), length=LENGTH)
    first = [windows.streams(9, 16 * visit, 2)[0][0] // 16 for visit in range(5)]
    second = [windows.streams(9, 8 + 16 * visit, 2)[0][1] // 16 for visit in range(5)]
    assert len(set(first)) == len(set(second)) == 5 and sorted(first) != first
    assert windows.streams(9, 0, 2) != windows.streams(8, 0, 2)


def test_states_are_empty_after_clearing_and_attention_is_refused():
    carried = states("passed", Mamba2LM(small_config()), 2)
    carried.put(slice(0, 2), [MixerState(torch.ones_like(s.conv), torch.ones_like(s.ssm)) for s in carried.ended])
    carried.clear()
    assert all((part == 0).all() for layer in carried.take(slice(0, 2)) for part in layer)
    hybrid = Mamba2LM(small_config(attn_layer_idx=(0,), attn_cfg={"num_heads": 2, "causal": True}))
    with pytest.raises(
        ValueError, match="--initial-state noise is for states of a fixed size, and the model has attent"
    ):
        states("noise", hybrid, 2)
