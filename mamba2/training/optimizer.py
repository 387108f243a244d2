"""AdamW with its groups, and the learning rate of every step."""

import math
from dataclasses import dataclass

import torch

from mamba2.model import Mamba2LM

# Which parameters weight decay reaches. `all_but_biases` is what the replaced trainer did: A_log, D and norms too.
DECAYS = ("matrices", "all_but_biases")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def make_optimizer(
    model: Mamba2LM,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
    decay: str = "matrices",
) -> torch.optim.AdamW:
    """AdamW. Decay `matrices`: not on dt_bias, A_log, D, norms, biases, convolution; `all_but_biases`: see DECAYS."""

    def decays(name: str, parameter: torch.Tensor) -> bool:
        return parameter.dim() == 2 if decay == "matrices" else "bias" not in name

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    # Fused: one pass over weights and moments, where the step is bound by memory.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """The learning rate's share of its peak, by step.

    Attributes:
        kind: how it falls from the peak to `floor` after the warm-up: `cosine` or `linear` over all steps, `constant`
            not at all, `wsd` (warm-up, stable, decay) linearly over the last `decay_steps`.
        warmup_steps: linear, from 1/warmup_steps, or from 0 with `warmup_from_zero` (as transformers does).
        floor: share of the peak at the end.
    """

    kind: str
    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    floor: float = 0.0
    warmup_from_zero: bool = False

    def factor(self, step: int) -> float:
        """Share of the peak for the update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + (not self.warmup_from_zero)) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        start = self.steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        passed = min(1.0, max(0, step - start) / max(1, self.steps - start))
        left = 0.5 * (1.0 + math.cos(math.pi * passed)) if self.kind == "cosine" else 1.0 - passed
        return self.floor + (1.0 - self.floor) * left

    def same_until(self, other: "Schedule", step: int) -> bool:
        """Whether the updates before `step` have the same rates under both."""
        return all(self.factor(i) == other.factor(i) for i in range(step))
