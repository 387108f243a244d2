"""Perplexity, always under the name of the protocol that it was measured by.

    stateful     every document from an empty state after one end-of-text, all of its tokens scored, the state carried
                 from window to window: the exact probability of the document
    windows      disjoint windows of T tokens in each document, each from an empty state; every token but the first
    strided      lines joined by empty lines into one text, windows of T tokens that move by `stride`, in each only the
                 tokens that no earlier window had (the rule of transformers' documentation)
    lm_eval      documents detokenised, windows of T tokens to score with one token of left context (the last window
                 with more, to be as long), end-of-text first; words and bytes of the original page
                 (lm-evaluation-harness)
    hf_evaluate  the mean over lines of exp(mean loss of the line), no start token, lines of at least two tokens: the
                 `evaluate` library's metric, without the padding that it runs through the model

All but the last weigh every token alike. The sums of every document (of every line under strided and hf_evaluate) are
kept, so that any aggregate can be computed from them.
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

# Each protocol, and where the state is emptied.
PROTOCOLS = {
    "stateful": "at each document",
    "windows": "at each window",
    "strided": "at each window",
    "lm_eval": "at each window",
    "hf_evaluate": "at each line",
}


@dataclass
class DocumentLoss:
    """What one document, or one line of one, adds."""

    document: int  # number of the document: what is clustered by
    nats: float = 0.0
    tokens: int = 0  # scored
    bytes: int = 0  # of UTF-8 behind the scored tokens; of the original page under lm_eval
    words: int = 0  # separated by white space, of the whole text


@dataclass(frozen=True)
class Perplexity:
    """Result of one model under one protocol."""

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
        """Comparable between tokenizers."""
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
        """Perplexity of each document, or line, by itself."""
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
        """Every quantity, JSON-ready: what is not defined (the interval of one document) is None."""
        values = {
            key: getattr(self, key)
            for key in ("nats_per_token", "perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        }
        values |= {
            "standard_error": self.interval.standard_error,
            "interval_95": [self.interval.low, self.interval.high],
            "clusters": self.interval.clusters,
            **{key: int(self._sum(key)) for key in ("tokens", "bytes", "words")},
            "documents": {
                key: [getattr(d, key) for d in self.documents]
                for key in ("document", "nats", "tokens", "bytes", "words")
            },
        }
        return json_ready(values)


def exp(nats: float) -> float:
    """e^nats, infinite where a float ends: a diverged model has a perplexity, too."""
    return math.inf if nats >= 709 else math.exp(nats)


# --------------------------------------------------------------------------------------------- protocols as sequences


class Scored(NamedTuple):
    """Ids that are run through the model from an empty state, and what of it counts."""

    ids: list[int]
    first: int  # the first id that is scored, at least 1
    units: int | np.ndarray  # which DocumentLoss the scored ids belong to: one for all, or one each


def plan(corpus: Corpus, tokenizer: Tokenizer, protocol: str, context: int, stride: int | None = None):
    """The sequences of a protocol, and one empty DocumentLoss per document or line, with its words and bytes.

    Bytes are those behind the scored ids, but under lm_eval. Raises ValueError for an unknown protocol, a stride
    outside 1..context, or when nothing can be scored.
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
            parts = _cut(ids, protocol, context, tokenizer.eot_id)
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
    """(number of the document, text, its words, bytes known beforehand)."""
    if protocol == "lm_eval":
        for number, page in enumerate(corpus.pages()):
            # Counted as the harness does: white space at the ends of a page makes a word of its own.
            yield number, detokenize(page) if corpus.of_lines else page, len(re.split(r"\s+", page)), len(page.encode())
        return
    for number, lines in enumerate(corpus.documents):
        for text in lines if protocol == "hf_evaluate" else ["".join(lines)]:
            yield number, text, len(text.split()), 0


def _cut(ids: list[int], protocol: str, context: int, eot: int) -> list[tuple[list[int], int]]:
    """Sequences of one document, and the first id in each that is scored."""
    if protocol == "stateful":
        return [([eot, *ids], 1)]
    if protocol == "windows":
        return [(ids[start : start + context], 1) for start in range(0, len(ids), context)]
    if protocol == "lm_eval":
        # The last window is filled up with left context, so that it is as long as the others.
        ids = [eot, *ids]
        stops = [*range(context, len(ids) - 1, context), len(ids) - 1]
        starts = [max(0, stop - context) for stop in stops]
        return [
            (ids[start : stop + 1], number * context - start + 1)
            for number, (start, stop) in enumerate(zip(starts, stops))
        ]
    return [(ids, 1)]


def _strided(
    corpus: Corpus, tokenizer: Tokenizer, context: int, stride: int
) -> tuple[list[Scored], list[DocumentLoss]]:
    lines = [(number, line) for number, document in enumerate(corpus.documents) for line in document]
    ids = tokenizer.encode("\n\n".join(line for _, line in lines))
    losses = [DocumentLoss(number, words=len(line.split())) for number, line in lines]
    # A token belongs to the line in which it begins. Encoding may normalise, so a line is as long as it decodes to.
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

    `stride` is of the protocol strided, by default half the context. The result does not depend on the batch size,
    beyond rounding. Raises ValueError as `plan` does, or for ids that the model has no row for.
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
    """(number, loss of each id after the first, float32 nats) of every sequence, from an empty state, in any order.

    Windows of `context` tokens with the state carried on; sequences of like length go side by side, and rows that have
    ended are left out.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        lengths = [len(sequences[i]) - 1 for i in rows]  # falling
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
