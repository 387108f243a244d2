"""The synthetic tasks hold what they say: answers that the sample determines, at the distances given."""

import numpy as np
import pytest
import torch

from mamba2.data import Windows, load_tokens, load_validation, synthetic_samples
from mamba2.tokenizer import get_tokenizer

SMALL = "length=64,samples=300"


@pytest.mark.parametrize("options", ["", ",gap=20"])
def test_mqar_asks_for_each_key_once(options):
    samples = synthetic_samples(f"synthetic:mqar:{SMALL},pairs=4{options}", "train")
    assert samples.ids.shape == (300, 64)
    for ids, distance in zip(samples.ids, samples.distance):
        pairs = dict(zip(ids[0:8:2], ids[1:8:2]))
        assert len(pairs) == 4
        answers = np.flatnonzero(distance)
        assert sorted(ids[answers - 1]) == sorted(pairs)
        for at in answers:
            assert ids[at] == pairs[ids[at - 1]]
            assert ids[at - 1 - distance[at]] == ids[at - 1] and at - 1 - distance[at] < 8
            assert at - 1 >= 8 + (20 if options else 0)
        assert (np.isin(ids[8:], list(pairs)).sum()) == 4  # noise holds no key


def test_copying_repeats_the_items_in_order():
    samples = synthetic_samples(f"synthetic:copying:{SMALL},items=5,gap=10", "train")
    for ids, distance in zip(samples.ids, samples.distance):
        assert ids[-6] == 1 and (ids[-16:-6] == 0).all()
        content = ids[:-6]
        assert content[content > 0].tolist() == ids[-5:].tolist()
        assert np.flatnonzero(distance).tolist() == [59, 60, 61, 62, 63]
        for at in range(59, 64):
            assert ids[at - distance[at]] == ids[at]
        assert (np.diff([at - distance[at] for at in range(59, 64)]) > 0).all()


def test_induction_asks_for_what_followed_the_mark():
    samples = synthetic_samples("synthetic:induction:length=64,samples=4000", "train")
    for ids, distance in zip(samples.ids, samples.distance):
        first, second = np.flatnonzero(ids == 1)
        assert second == 62 and ids[63] == ids[first + 1] != 1
        assert np.flatnonzero(distance).tolist() == [63] and distance[63] == second - first
    octaves = np.histogram(np.log2(samples.distance[:, -1]), bins=[2, 3, 4, 5])[0]
    assert octaves.min() > 0.85 * octaves.max()  # even in log-distance


@pytest.mark.parametrize("task", ["mqar", "copying", "induction"])
def test_samples_are_always_the_same_and_splits_and_seeds_differ(task):
    source = f"synthetic:{task}:{SMALL}"
    a = synthetic_samples(source, "train").ids
    assert np.array_equal(a, synthetic_samples(source, "train").ids)
    held_out = synthetic_samples(source, "validation").ids
    assert held_out.shape == (1000, 64) and not np.array_equal(a, held_out[:300])
    assert not np.array_equal(held_out, synthetic_samples(source, "test").ids)
    assert not np.array_equal(a, synthetic_samples(f"{source},seed=1", "train").ids)


def test_windows_hold_whole_samples_and_only_answers_count():
    source = f"synthetic:mqar:{SMALL},pairs=4"
    tokens = load_tokens(source, "train", get_tokenizer("bytes"))
    samples = synthetic_samples(source, "train")
    windows = Windows(tokens, length=128)
    inputs, targets, seq_idx = windows.batch([3, len(windows) - 1])
    assert inputs[0].tolist() == samples.ids[6:8].reshape(-1).tolist()
    expected = np.where(samples.distance[6:8] > 0, samples.ids[6:8], -100).reshape(-1)
    assert targets[0, :-1].tolist() == expected[1:].tolist() and targets[0, -1] == -100
    assert (targets != -100).sum() == 4 * 4
    assert torch.equal(seq_idx[0].unique_consecutive(return_counts=True)[1], torch.tensor([64, 64]))
    assert tokens.largest == samples.ids.max() < 257
    assert load_validation(source, None).ids.shape == (64_000,)
    assert load_tokens(source, "train", None).sha256 == tokens.sha256
    with pytest.raises(ValueError, match="windows of 100 tokens cut samples of 64"):
        Windows(tokens, length=100)


@pytest.mark.parametrize(
    "source, message",
    [
        ("synthetic:sorting", "the task 'sorting' is unknown; choose mqar, copying, induction"),
        ("synthetic:mqar:items=3", "the option 'items' is unknown; choose length, samples, values, pairs, gap, seed"),
        ("synthetic:mqar:pairs=x", "pairs is 'x', and must be an integer of at least 1"),
        ("synthetic:mqar:length=16,pairs=8", "8 pairs do not fit: there is room for 0 questions"),
        ("synthetic:mqar:values=4", "among 4 keys"),
        ("synthetic:copying:length=16", "8 items do not fit in 7 tokens"),
        ("synthetic:induction:gap=255", "a sample of 256 tokens is too short"),
    ],
)
def test_bad_options_are_one_sentence(source, message):
    with pytest.raises(ValueError, match=message):
        synthetic_samples(source, "train")
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, validation"):
        synthetic_samples("synthetic:mqar", "dev")
