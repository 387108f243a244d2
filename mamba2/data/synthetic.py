"""Recall tasks, generated from a seed without any files: `--dataset-path synthetic:TASK[:OPTIONS]`.

    synthetic:mqar       key-value pairs, then noise in which each key comes once more, followed by its value:
                         multi-query associative recall (Arora et al. 2023, arXiv:2312.04927)
    synthetic:copying    items scattered in noise, repeated in order at the end: selective copying (Gu & Dao 2023)
    synthetic:induction  a mark among random tokens; the mark again at the end, then the token that followed it before

OPTIONS are NAME=VALUE, separated by commas, e.g. synthetic:mqar:length=512,pairs=16,gap=64:
    length   tokens of a sample [256]; a sample starts with an empty state, and --max-length must be a multiple of it
    samples  of the training split [10000]; validation, val and test have 1000, from other seeds
    values   how many different keys, values or items there are [64]
    pairs    of mqar [8];  items  of copying [8]
    gap      fewest tokens between what is to be remembered and the first question [0]
    seed     [0]

Only answers count in the loss. In mqar and induction, distances are spread evenly over log-distance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mamba2.data.tokens import Tokens

PREFIX = "synthetic:"
SPLITS = ("train", "validation", "val", "test")
HELD_OUT = 1000  # samples of the other splits
NOISE, MARK, FIRST = 0, 1, 2  # ids; what is remembered begins at FIRST


@dataclass(frozen=True)
class Options:
    """The options of a task; the module's docstring explains them."""

    length: int = 256
    samples: int = 10_000
    values: int = 64
    pairs: int = 8
    items: int = 8
    gap: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Samples:
    """Samples of a task: ids (samples, length), and distance (samples, length), which is the number of tokens from an
    answer back to the token it repeats, and 0 for ids that are not answers. Both are int64."""

    ids: np.ndarray
    distance: np.ndarray


def is_synthetic(source: object) -> bool:
    """Whether --dataset-path names one of these tasks."""
    return str(source).startswith(PREFIX)


def synthetic_samples(source: str, split: str) -> Samples:
    """The samples of a split, always the same. Raises ValueError for an unknown task, option or split."""
    name, _, settings = str(source).removeprefix(PREFIX).partition(":")
    if name not in TASKS:
        raise ValueError(f"{source}: the task {name!r} is unknown; choose {', '.join(TASKS)}")
    function, unused = TASKS[name]
    options = _parse(source, settings, unused)
    if split not in SPLITS:
        raise ValueError(f"{source} has no split {split!r}; it has {', '.join(SPLITS)}")
    if split != "train":
        options = replace(options, samples=HELD_OUT)
    rng = np.random.default_rng([options.seed, SPLITS.index(split), list(TASKS).index(name)])
    return function(source, options, rng)


def synthetic_tokens(source: str, split: str) -> Tokens:
    """The samples of a split, each one a document, in which only the answers count."""
    samples = synthetic_samples(source, split)
    count, length = samples.ids.shape
    starts = np.arange(0, count * length, length)
    ids = samples.ids.astype(np.uint16).reshape(-1)
    counted = samples.distance.reshape(-1) > 0
    return Tokens(ids, starts, NOISE, int(ids.max()), counted=counted, sample_length=length)


def _parse(source: str, settings: str, unused: tuple[str, ...]) -> Options:
    known, values = [key for key in vars(Options()) if key not in unused], {}
    for part in filter(None, settings.split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise ValueError(f"{source}: the option {key!r} is unknown; choose {', '.join(known)}")
        lowest = 0 if key in ("gap", "seed") else 1
        if not text.isdecimal() or int(text) < lowest:
            raise ValueError(f"{source}: {key} is {text!r}, and must be an integer of at least {lowest}")
        values[key] = int(text)
    return Options(**values)


def _choose(
    rng: np.random.Generator, rows: int, size: int, count: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """For each row, `count` different numbers below `size` in random order, drawn with `weights`: (rows, count)."""
    keys = rng.exponential(size=(rows, size)) / (1 if weights is None else weights)  # the smallest are drawn
    return np.argsort(keys, axis=1)[:, :count]


def _mqar(source: str, o: Options, rng: np.random.Generator) -> Samples:
    first_slot = -(-o.gap // 2)
    slots = (o.length - 2 * o.pairs) // 2 - first_slot
    if o.pairs > min(slots, o.values):
        room = f"there is room for {max(0, slots)} questions among {o.values} keys"
        raise ValueError(f"{source}: {o.pairs} pairs do not fit: {room}; raise length or values, or lower pairs or gap")
    rows = np.arange(o.samples)[:, None]
    keys = FIRST + _choose(rng, o.samples, o.values, o.pairs)
    values = FIRST + o.values + rng.integers(0, o.values, (o.samples, o.pairs))
    noise = FIRST + 2 * o.values
    ids = rng.integers(noise, noise + o.values // 2 + 1, (o.samples, o.length))
    ids[:, 0 : 2 * o.pairs : 2], ids[:, 1 : 2 * o.pairs : 2] = keys, values
    slot = _choose(rng, o.samples, slots, o.pairs, 1 / (first_slot + 1 + np.arange(slots)))
    position = 2 * o.pairs + 2 * (first_slot + slot)  # of the question about pair 0, 1, …
    ids[rows, position], ids[rows, position + 1] = keys, values
    distance = np.zeros_like(ids)
    distance[rows, position + 1] = position - 2 * np.arange(o.pairs)
    return Samples(ids, distance)


def _copying(source: str, o: Options, rng: np.random.Generator) -> Samples:
    room = o.length - o.items - 1 - o.gap
    if o.items > room:
        raise ValueError(f"{source}: {o.items} items do not fit in {max(0, room)} tokens; raise length or lower gap")
    rows = np.arange(o.samples)[:, None]
    place = np.sort(_choose(rng, o.samples, room, o.items), axis=1)
    items = FIRST + rng.integers(0, o.values, (o.samples, o.items))
    ids = np.full((o.samples, o.length), NOISE)
    ids[rows, place] = items
    ids[:, -o.items - 1], ids[:, -o.items :] = MARK, items
    distance = np.zeros_like(ids)
    distance[:, -o.items :] = np.arange(o.length - o.items, o.length) - place
    return Samples(ids, distance)


def _induction(source: str, o: Options, rng: np.random.Generator) -> Samples:
    shortest = max(2, o.gap)  # between the two marks there is at least the token that followed the first
    if o.length - 2 < shortest:
        raise ValueError(f"{source}: a sample of {o.length} tokens is too short; raise length or lower gap")
    ids = FIRST + rng.integers(0, o.values, (o.samples, o.length))
    distances = np.arange(shortest, o.length - 1)
    distance_of = rng.choice(distances, o.samples, p=(1 / distances) / (1 / distances).sum())
    row, mark = np.arange(o.samples), o.length - 2 - distance_of
    ids[row, mark] = MARK
    ids[:, -2], ids[:, -1] = MARK, ids[row, mark + 1]
    distance = np.zeros_like(ids)
    distance[:, -1] = distance_of
    return Samples(ids, distance)


# The function of each task, and the options that it does not have.
TASKS: dict[str, tuple[Callable[[str, Options, np.random.Generator], Samples], tuple[str, ...]]] = {
    "mqar": (_mqar, ("items",)),
    "copying": (_copying, ("pairs",)),
    "induction": (_induction, ("pairs", "items")),
}
