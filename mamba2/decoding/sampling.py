"""Draw the next id from logits."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next id is drawn. The options apply in the order listed, vocab_size first.

    Raises ValueError naming a value out of range.
    """

    vocab_size: int | None = None  # only ids below it: a model may have more rows than its tokenizer has ids
    repetition_penalty: float = 1.0  # positive logits of ids seen before are divided by it, negative ones multiplied
    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely id
    top_k: int = 0  # only the k most likely ids; 0: all
    top_p: float = 1.0  # the smallest set of most likely ids whose probabilities sum to at least p
    min_p: float = 0.0  # only ids at least p times as likely as the most likely

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
        """One id for each row of logits (b, v): (b,) int64. `seen` (b, v) bool marks the ids to penalise."""
        if self.vocab_size is not None:
            logits = logits[:, : self.vocab_size]
        if self.repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen[:, : logits.shape[1]], penalised, logits)
        if self.temperature == 0:
            return logits.float().argmax(dim=-1)  # argmax in half precision is five times slower
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution to draw from, (b, v) float32, for temperature > 0 and logits with the penalty applied."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            p = ordered.softmax(dim=-1)
            before = p.cumsum(dim=-1) - p  # probability of all more likely ids; 0 for the first, which always stays
            logits = torch.empty_like(logits).scatter_(1, order, ordered.masked_fill(before >= self.top_p, -torch.inf))
        p = logits.softmax(dim=-1)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), 0.0)
        return p
