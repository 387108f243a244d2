"""Perplexity, always under the name of the protocol that it was measured by.

    stateful     every document from an empty state after one end-of-text, all of its tokens scored, the state carried
                 from window to window: the exact probability of the document
    windows      disjoint windows of T tokens, each from an empty state; every token but the first scored
    hf_evaluate  the mean over texts of exp(mean loss of the text), no start token, texts of at least two tokens: the
                 `evaluate` library's metric, without the padding that it runs through the model

The first two weigh every token alike. Each document's sums are kept, so that any aggregate can be computed from them.
"""

import math
from dataclasses import dataclass

import torch

from mamba2.model import Mamba2LM
from mamba2.ops import IGNORE_INDEX
from mamba2.tokenizer import Tokenizer

PROTOCOLS = ("stateful", "windows", "hf_evaluate")


@dataclass(frozen=True)
class DocumentLoss:
    """What one document adds."""

    nats: float
    tokens: int  # scored
    bytes: int  # of UTF-8 behind the scored tokens
    words: int  # separated by white space, of the whole text


@dataclass(frozen=True)
class Perplexity:
    """Result of one model under one protocol."""

    protocol: str
    documents: list[DocumentLoss]

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all scored tokens."""
        return sum(d.nats for d in self.documents) / sum(d.tokens for d in self.documents)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return sum(d.nats for d in self.documents) / math.log(2) / sum(d.bytes for d in self.documents)

    @property
    def per_document(self) -> list[float]:
        """Perplexity of each document by itself."""
        return [math.exp(d.nats / d.tokens) for d in self.documents]

    @property
    def perplexity(self) -> float:
        """exp(nats per token); under hf_evaluate the mean of the documents' perplexities."""
        if self.protocol == "hf_evaluate":
            return sum(self.per_document) / len(self.documents)
        return math.exp(self.nats_per_token)

    @property
    def standard_error(self) -> float:
        """Of nats_per_token, clustered by document: sqrt(D/(D-1) Σ_d (S_d - μ N_d)²) / N; nan for one document."""
        count, mean = len(self.documents), self.nats_per_token
        if count < 2:
            return math.nan
        squares = sum((d.nats - mean * d.tokens) ** 2 for d in self.documents)
        return math.sqrt(count / (count - 1) * squares) / sum(d.tokens for d in self.documents)


def encode_documents(texts: list[str], tokenizer: Tokenizer, max_tokens: int | None = None) -> list[list[int]]:
    """Ids of each text that is not empty; with `max_tokens` the first texts, as many as begin within that many tokens.

    Raises ValueError when nothing is left.
    """
    documents, total = [], 0
    for text in texts:
        if max_tokens is not None and total >= max_tokens:
            break
        ids = tokenizer.encode(text)
        if max_tokens is not None:
            ids = ids[: max_tokens - total]
        if ids:
            documents.append(ids)
            total += len(ids)
    if not documents:
        raise ValueError("the data set is empty: not one document with text")
    return documents


def evaluate(
    model: Mamba2LM,
    tokenizer: Tokenizer,
    documents: list[list[int]],
    protocol: str,
    context: int,
    batch_size: int = 1,
) -> Perplexity:
    """Score `documents` (lists of ids) by a protocol, in windows of `context` tokens, `batch_size` rows at a time.

    The result does not depend on the batch size, beyond rounding. Raises ValueError for an unknown protocol, or when no
    document is long enough to be scored.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; choose {', '.join(PROTOCOLS)}")
    if protocol == "stateful":
        sequences = [(number, [tokenizer.eot_id, *ids]) for number, ids in enumerate(documents)]
    elif protocol == "windows":
        starts = [(number, start) for number, ids in enumerate(documents) for start in range(0, len(ids), context)]
        sequences = [(number, documents[number][start : start + context]) for number, start in starts]
    else:
        sequences = list(enumerate(documents))
    sequences = [(number, ids) for number, ids in sequences if len(ids) >= 2]
    if not sequences:
        raise ValueError(f"no document has the two tokens that the protocol {protocol} needs")
    largest = max(max(ids) for _, ids in sequences)
    if largest >= model.config.vocab_size:
        raise ValueError(f"the data hold the id {largest}, outside the model's vocabulary of {model.config.vocab_size}")

    # Sequences of like length side by side: little is computed on rows that have ended.
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][1]))
    nats = [0.0] * len(sequences)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        for row, loss in zip(rows, _sequence_losses(model, [sequences[i][1] for i in rows], context)):
            nats[row] = loss

    sums: dict[int, list] = {}
    for (number, ids), loss in zip(sequences, nats):
        entry = sums.setdefault(number, [0.0, 0, 0])
        entry[0] += loss
        entry[1] += len(ids) - 1
        entry[2] += len(tokenizer.decode_bytes(ids[1:]))
    results = [
        DocumentLoss(*entry, words=len(tokenizer.decode(documents[number]).split()))
        for number, entry in sorted(sums.items())
    ]
    return Perplexity(protocol, results)


@torch.no_grad()
def _sequence_losses(model: Mamba2LM, sequences: list[list[int]], context: int) -> list[float]:
    """Loss in nats of each sequence after its first token; windows of `context` with the state carried between them."""
    device = next(model.parameters()).device
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    targets = torch.full((len(sequences), length - 1), IGNORE_INDEX)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        targets[row, : len(sequence) - 1] = ids[row, 1 : len(sequence)]
    total = torch.zeros(len(sequences), dtype=torch.float64)
    state = None
    for start in range(0, length - 1, context):
        stop = min(start + context, length - 1)
        chosen = ids[:, start:stop].to(device), targets[:, start:stop].to(device)
        losses, state = model.token_losses(*chosen, state=state)
        total += losses.double().sum(dim=1).cpu()
    return total.tolist()
