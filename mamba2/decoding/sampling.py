"""From logits to the next id."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next id is drawn; the filters apply in the order in which they are listed.

    Raises ValueError naming a value out of range.
    """

    repetition_penalty: float = 1.0  # logits of ids seen before: divided by it if positive, multiplied if negative
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely id
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # the fewest most likely ids whose probabilities sum to at least p
    min_p: float = 0.0  # only ids at least p times as likely as the most likely
    vocab_size: int | None = None  # only ids below it: a model may have more rows than its tokenizer has ids

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("vocab_size", self.vocab_size is None or self.vocab_size > 0, "above 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")

    def draw(
        self, logits: torch.Tensor, seen: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """One id for each row of logits (b, v): (b,) int64. `seen` (b, v) bool is what repetition_penalty needs."""
        if self.vocab_size is not None:
            logits = logits[:, : self.vocab_size]
        if self.repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen[:, : logits.shape[1]], penalised, logits)
        if self.temperature == 0:
            return logits.float().argmax(dim=-1)  # in half precision argmax takes five times as long
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What is drawn from, (b, v) float32, for a temperature above 0; the penalty is taken to be in the logits."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            p = ordered.softmax(dim=-1)
            before = p.cumsum(dim=-1) - p  # of all more likely ids: 0 for the first, which always stays
            logits = torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(before >= self.top_p, -torch.inf))
        p = logits.softmax(dim=-1)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        return p
