"""Perplexity under named protocols, with windows of T tokens:

    stateful     each document after one end-of-text, all its tokens scored, the state carried from window to window:
                 the exact probability of the document
    windows      each document in disjoint windows, each from an empty state, all its tokens but the first scored
    strided      all lines joined by empty lines, in windows that move by `stride`, each scoring the tokens that are new
                 in it (the rule in transformers' documentation)
    lm_eval      each document detokenised, after one end-of-text, in windows that score T tokens after one token of
                 context (the last window has more context, to be as long); divided by the words and bytes of the
                 original page (lm-evaluation-harness)
    hf_evaluate  the mean over lines, of at least two tokens and without end-of-text, of exp(mean loss of the line): the
                 metric of the library `evaluate`, without its padding

All but the last weight every token equally. The sums of each document (under strided and hf_evaluate of each line) are
kept, so that other aggregates can be computed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from mamba2.cli import json_ready
from mamba2.evaluation.corpus import Corpus, detokenize
from mamba2.model import Mamba2LM, State
from mamba2.ops import IGNORE_INDEX
from mamba2.study.statistics import Interval, clustered_interval
from mamba2.tokenizer import Tokenizer

# Each protocol, and where the state is reset.
PROTOCOLS = {
    "stateful": "at each document",
    "windows": "at each window",
    "strided": "at each window",
    "lm_eval": "at each window",
    "hf_evaluate": "at each line",
}


@dataclass
class DocumentLoss:
    """The sums over one document, or one of its lines."""

    document: int  # its number; intervals are clustered by document
    nats: float = 0.0
    tokens: int = 0  # scored
    bytes: int = 0  # UTF-8 bytes of the scored tokens; of the original page under lm_eval
    words: int = 0  # separated by white space, in the whole text


@dataclass(frozen=True)
class Perplexity:
    """The result of one model under one protocol."""

    protocol: str
    documents: list[DocumentLoss]

    def _sum(self, key: str) -> float:
        return math.fsum(getattr(d, key) for d in self.documents)

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all scored tokens."""
        return self._sum("nats") / self._sum("tokens")

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self._sum("nats") / math.log(2) / self._sum("bytes")

    @property
    def word_perplexity(self) -> float:
        """exp(nats per word)."""
        return exp(self._sum("nats") / self._sum("words"))

    @property
    def byte_perplexity(self) -> float:
        """exp(nats per byte) = 2^bits_per_byte."""
        return exp(self._sum("nats") / self._sum("bytes"))

    @property
    def per_document(self) -> list[float]:
        """Perplexity of each document, or line."""
        return [exp(d.nats / d.tokens) for d in self.documents if d.tokens]

    @property
    def perplexity(self) -> float:
        """exp(nats per token); under hf_evaluate the mean of the lines' perplexities."""
        if self.protocol == "hf_evaluate":
            return math.fsum(self.per_document) / len(self.per_document)
        return exp(self.nats_per_token)

    @property
    def interval(self) -> Interval:
        """95 % interval of nats_per_token, clustered by document; under hf_evaluate of the mean perplexity."""
        documents = [d for d in self.documents if d.tokens]
        clusters = [d.document for d in documents]
        if self.protocol == "hf_evaluate":
            return clustered_interval(self.per_document, [1] * len(documents), clusters)
        return clustered_interval([d.nats for d in documents], [d.tokens for d in documents], clusters)

    def summary(self) -> dict:
        """Every quantity, JSON-ready. Undefined values, such as the interval of a single document, are None."""
        means = ("nats_per_token", "perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        sums = ("document", "nats", "tokens", "bytes", "words")
        values = {
            **{key: getattr(self, key) for key in means},
            "standard_error": self.interval.standard_error,
            "interval_95": [self.interval.low, self.interval.high],
            "clusters": self.interval.clusters,
            **{key: int(self._sum(key)) for key in ("tokens", "bytes", "words")},
            "documents": {key: [getattr(d, key) for d in self.documents] for key in sums},
        }
        return json_ready(values)


def exp(nats: float) -> float:
    """e^nats, or infinity where that overflows a float, as for a diverged model."""
    return math.inf if nats >= 709 else math.exp(nats)


# --------------------------------------------------------------------------------------- from a protocol to sequences


class Scored(NamedTuple):
    """A sequence to run through the model from an empty state."""

    ids: list[int]
    first: int  # ids from here on are scored; at least 1
    units: int | np.ndarray  # index of the DocumentLoss of all scored ids, or of each


def plan(corpus: Corpus, tokenizer: Tokenizer, protocol: str, context: int, stride: int | None = None):
    """The sequences of a protocol, and a DocumentLoss per document or line with only its words and bytes filled in.

    Raises ValueError for an unknown protocol, a stride outside 1..context, or when there is nothing to score.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; choose {', '.join(PROTOCOLS)}")
    stride = context // 2 if stride is None else stride
    if protocol == "strided" and not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}, and must be from 1 to the context of {context}")
    if protocol == "strided":
        sequences, losses = _strided(corpus, tokenizer, context, stride)
    else:
        sequences, losses = [], []
        for document, text, words, n_bytes in _texts(corpus, protocol):
            ids = tokenizer.encode(text)
            losses.append(DocumentLoss(document, words=words, bytes=n_bytes))
            parts = cut(ids, protocol, context, tokenizer.eot_id)
            sequences += [Scored(part, first, len(losses) - 1) for part, first in parts]
    sequences = [sequence for sequence in sequences if len(sequence.ids) > sequence.first]
    if not sequences:
        raise ValueError(f"no document has the two tokens that the protocol {protocol} needs")
    if protocol != "lm_eval":
        lengths = np.zeros(1 + max(max(sequence.ids) for sequence in sequences), dtype=np.int64)
        for token in {i for sequence in sequences for i in sequence.ids}:
            lengths[token] = len(tokenizer.decode_bytes([token]))
        for sequence in sequences:
            scored = lengths[sequence.ids[sequence.first :]]
            for unit, value in _sums(scored, sequence.units):
                losses[unit].bytes += int(value)
    return sequences, losses


def _texts(corpus: Corpus, protocol: str) -> Iterator[tuple[int, str, int, int]]:
    """(number of the document, text, its words, its bytes or 0 if those of the scored ids are to be counted)."""
    if protocol == "lm_eval":
        for number, page in enumerate(corpus.pages()):
            # As the harness counts: white space at the start or end of a page adds an empty word.
            yield number, detokenize(page) if corpus.of_lines else page, len(re.split(r"\s+", page)), len(page.encode())
        return
    for number, lines in enumerate(corpus.documents):
        for text in lines if protocol == "hf_evaluate" else ["".join(lines)]:
            yield number, text, len(text.split()), 0


def cut(ids: list[int], protocol: str, context: int, eot: int) -> list[tuple[list[int], int]]:
    """(ids, first one to score) of each sequence of one document."""
    if protocol == "stateful":
        return [([eot, *ids], 1)]
    if protocol == "windows":
        return [(ids[start : start + context], 1) for start in range(0, len(ids), context)]
    if protocol == "lm_eval":
        ids, sequences = [eot, *ids], []
        for done in range(0, max(1, len(ids) - 1), context):
            stop = min(done + context, len(ids) - 1)
            start = max(0, stop - context)  # the last window gets more left context, to be as long as the others
            sequences.append((ids[start : stop + 1], done - start + 1))
        return sequences
    return [(ids, 1)]


def _strided(
    corpus: Corpus, tokenizer: Tokenizer, context: int, stride: int
) -> tuple[list[Scored], list[DocumentLoss]]:
    lines = [(number, line) for number, document in enumerate(corpus.documents) for line in document]
    ids = tokenizer.encode("\n\n".join(line for _, line in lines))
    losses = [DocumentLoss(number, words=len(line.split())) for number, line in lines]
    # A token belongs to the line in which it begins. Lengths are of the decoded text, since encoding may normalise it.
    ends = np.cumsum([len(tokenizer.decode_bytes(tokenizer.encode(line))) + 2 for _, line in lines])
    begins = np.cumsum([0, *(len(tokenizer.decode_bytes([i])) for i in ids[:-1])])
    unit = np.minimum(np.searchsorted(ends, begins, side="right"), len(lines) - 1)
    sequences, done = [], 0
    for start in range(0, len(ids), stride):
        stop = min(start + context, len(ids))
        first = max(done - start, 1)
        sequences.append(Scored(ids[start:stop], first, unit[start + first : stop]))
        done = stop
        if stop == len(ids):
            break
    return sequences, losses


def _sums(values: np.ndarray, units: int | np.ndarray) -> list[tuple[int, float]]:
    """(unit, sum of its values)."""
    if isinstance(units, int):
        return [(units, values.sum())]
    sums = np.bincount(units, weights=values)
    return [(int(unit), sums[unit]) for unit in np.unique(units)]


# ------------------------------------------------------------------------------------------------------------- scoring


def evaluate(
    model: Mamba2LM,
    tokenizer: Tokenizer,
    corpus: Corpus,
    protocol: str,
    context: int,
    batch_size: int = 1,
    stride: int | None = None,
) -> Perplexity:
    """Score a corpus by a protocol, in windows of `context` tokens, `batch_size` rows at a time.

    `stride` is for the protocol strided, by default half the context. The batch size changes the result only by
    rounding. Raises ValueError as `plan` does, or for ids outside the model's vocabulary.
    """
    sequences, losses = plan(corpus, tokenizer, protocol, context, stride)
    largest = max(max(sequence.ids) for sequence in sequences)
    if largest >= model.config.vocab_size:
        raise ValueError(f"the data hold the id {largest}, outside the model's vocabulary of {model.config.vocab_size}")
    for number, nats in token_nats(model, [sequence.ids for sequence in sequences], context, batch_size):
        sequence = sequences[number]
        scored = nats[sequence.first - 1 :]
        for unit, value in _sums(scored.astype(np.float64), sequence.units):
            losses[unit].nats += float(value)
        for unit, count in _sums(np.ones(len(scored)), sequence.units):
            losses[unit].tokens += int(count)
    if protocol == "hf_evaluate":
        losses = [loss for loss in losses if loss.tokens]
    return Perplexity(protocol, losses)


@torch.no_grad()
def token_nats(
    model: Mamba2LM, sequences: list[list[int]], context: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, loss of each id after the first, float32 nats) of every sequence, longest first.

    A sequence starts from an empty state, which is carried between windows of `context` tokens. Sequences of similar
    length form a batch, and rows that have ended leave it.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        lengths = [len(sequences[i]) - 1 for i in rows]  # decreasing
        nats = [np.empty(length, np.float32) for length in lengths]
        state: list[State] | None = None
        for start in range(0, lengths[0], context):
            active = sum(length > start for length in lengths)
            stop = min(start + context, lengths[0])
            ids = torch.zeros(active, stop - start, dtype=torch.int64)
            targets = torch.full((active, stop - start), IGNORE_INDEX)
            for row in range(active):
                part = torch.tensor(sequences[rows[row]][start : stop + 1])
                ids[row, : len(part) - 1], targets[row, : len(part) - 1] = part[:-1], part[1:]
            if state is not None:
                state = [layer.rows(slice(active)) for layer in state]
            losses, state = model.token_losses(ids.to(device), targets.to(device), state=state)
            losses = losses.float().cpu().numpy()
            for row in range(active):
                nats[row][start:stop] = losses[row, : min(stop, lengths[row]) - start]
        yield from zip(rows, nats)
