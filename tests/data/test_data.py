"""From tokens to batches that depend on (seed, step) alone; the articles of WikiText."""

import numpy as np
import pytest

from mamba2.data import Tokens, Windows, wikitext_articles


def test_articles_of_wikitext_begin_at_headings_of_the_first_level():
    lines = ["", " = One = \n", "", " text = more \n", " = = Part = = \n", " text \n", " = Two = \n", " text \n"]
    assert list(wikitext_articles(iter(lines))) == [lines[:6], lines[6:]]


def windows_of(count: int, length: int, starts=(0,), **options) -> Windows:
    ids = np.arange(1, count + 1, dtype=np.uint16)
    return Windows(Tokens(ids, np.asarray(starts), eot_id=0, largest=count), length, **options)


@pytest.mark.parametrize("count", [2, 4, 5, 9, 10, 23])
def test_every_token_but_the_first_is_a_target_once(count):
    windows = windows_of(count, 4)
    _, targets, _ = windows.batch(list(range(len(windows))))
    assert targets[targets != -100].tolist() == list(range(2, count + 1))


def test_inputs_stand_before_their_targets():
    inputs, targets, _ = windows_of(10, 4).batch([1, 2])
    assert inputs.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert targets.tolist() == [[6, 7, 8, 9], [10, -100, -100, -100]]


def test_documents_restart_inside_a_window_unless_told_otherwise():
    starts = (0, 3, 6, 7)
    assert windows_of(12, 5, starts).batch([0, 1])[2].tolist() == [[1, 1, 1, 2, 2], [2, 3, 4, 4, 4]]
    assert windows_of(12, 5, starts, reset=False).batch([0])[2] is None


def test_windows_in_which_no_document_begins_restart_nothing():
    assert windows_of(20, 4, (0, 8, 12)).batch([0, 1, 2, 3])[2] is None  # documents begin where windows do
    assert windows_of(20, 4, (0, 9)).batch([0, 2])[2].tolist() == [[1] * 4, [1, 2, 2, 2]]


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own():
    windows = windows_of(101, 10)
    epochs = [windows.indices(seed=1, step=epoch, batch=10) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != windows.indices(seed=2, step=0, batch=10)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_order_does_not_depend_on_the_batch_or_on_what_was_asked_before(batch):
    windows, fresh = windows_of(101, 10), windows_of(101, 10)
    flat = [i for step in range(21) for i in windows.indices(5, step, batch)]
    assert flat[:21] == fresh.indices(5, 0, 21)
    assert fresh.indices(5, 20, batch) == flat[20 * batch : 21 * batch]


def test_the_order_in_half_the_memory_is_that_of_a_permutation():
    windows = windows_of(1001, 1)
    assert windows.indices(7, 0, 1000) == np.random.default_rng([7, 0]).permutation(1000).tolist()
    assert windows._shuffled(7, 0, 1000).nbytes == 4 * 1000
