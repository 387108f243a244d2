"""The optimizers by name, the parameter groups they get, and the learning rate of every step."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mamba2.distributed import full
from mamba2.model import Mamba2LM


class Group(NamedTuple):
    """Parameters that are treated alike: those whose name fits the pattern, and none before it."""

    pattern: str
    decay: bool  # whether --decay matrices reaches them
    muon: bool  # whether --optimizer muon makes their updates orthogonal; it leaves the others to AdamW
    rate: str = ""  # the name under which `rates` has a multiple of the learning rate for them
    wide: bool = False  # whether they read the whole width, so that muP divides their rate by `width_multiple`


GROUPS = (
    Group("*_proj.weight", decay=True, muon=True, wide=True),  # the matrices of mixers
    Group("*embeddings.weight", decay=True, muon=False),
    Group("lm_head.weight", decay=True, muon=False, wide=True),
    Group("*.dt_bias", decay=False, muon=False, rate="dt"),
    Group("*.A_log", decay=False, muon=False, rate="A"),
    Group("*", decay=False, muon=False),  # D, norms, biases, convolution
)
# Which parameters weight decay applies to. `all_but_biases` is what the previous trainer did: A_log, D and norms too.
DECAYS = ("matrices", "all_but_biases")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def grouped(
    model: Mamba2LM, learning_rate: float, weight_decay: float, decay: str, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """The parameter groups: one for each of GROUPS, two where weight decay applies to some of its parameters only.
    `peak` is the rate that the schedule multiplies. Where muP lowers it, weight decay rises, for AdamW multiplies the
    one by the other: a weight's share that decays in a step is the same at every width (as microsoft/mup has it)."""
    multiple = 1.0, model.config.width_multiple  # by Group.wide
    groups: dict[tuple[Group, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        group = next(group for group in GROUPS if fnmatch(name, group.pattern))
        decayed = group.decay if decay == "matrices" else "bias" not in name
        groups.setdefault((group, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay * decayed * multiple[group.wide],
            "peak": learning_rate * rates.get(group.rate, 1.0) / multiple[group.wide],
            "muon": group.muon,
        }
        for (group, decayed), parameters in groups.items()
    ]


class Muon(torch.optim.Muon):
    """torch's Muon, but each part of a fused projection (z, x, B, C, dt) is orthogonalised as a matrix of its own, and
    a sharded matrix is gathered first. The update is scaled to AdamW's size, so that one rate fits both
    (`match_rms_adamw`).

    Reference: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], rows: dict[nn.Parameter, tuple[int, ...]], lr: float):
        """`rows`: for each fused parameter, how many rows each of its parts has."""
        super().__init__(groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.rows = rows

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"]
                average.lerp_(parameter.grad, 1 - momentum)
                update = full(parameter.grad.lerp(average, momentum))  # nesterov
                parts = update.split(self.rows.get(parameter, (len(update),)))
                update = torch.cat([0.2 * math.sqrt(max(part.shape)) * self._orthogonal(part, group) for part in parts])
                if isinstance(parameter, DTensor):
                    update = distribute_tensor(update, parameter.device_mesh, parameter.placements)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr)

    @staticmethod
    def _orthogonal(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The nearest matrix with singular values near 1, in bfloat16, by Newton and Schulz's iteration."""
        x = matrix.bfloat16()
        wide = x.shape[0] <= x.shape[1]
        x = x if wide else x.T
        x = x / x.norm().clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x if wide else x.T).to(matrix.dtype)


class Both:
    """Several optimizers, each with its own parameters, used as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = defaultdict(dict)
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def make_optimizer(
    model: Mamba2LM,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-8,
    decay: str = "matrices",
    name: str = "adamw",
    rates: dict[str, float] | None = None,
) -> torch.optim.Optimizer | Both:
    """One of OPTIMIZERS. `betas` and `eps` are AdamW's, `decay` is one of DECAYS, `rates` has multiples of the learning
    rate by the names in GROUPS; 0 leaves these parameters as they are."""
    groups = grouped(model, learning_rate, weight_decay, decay, rates or {})
    return OPTIMIZERS[name](model, groups, learning_rate, betas, eps)


def _adamw(model: Mamba2LM, groups: list[dict], lr: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """for all parameters"""
    # Fused: one pass over weights and moments. The step is limited by memory bandwidth.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _muon(model: Mamba2LM, groups: list[dict], lr: float, betas: tuple[float, float], eps: float) -> Both:
    """for the matrices of mixers, with AdamW for the rest"""
    if (base := model.config.mup_base_width) is not None:
        raise ValueError(f"muon does not go with the model's mup_base_width {base}, whose rates are AdamW's: use adamw")
    mixers = [layer.mixer for layer in model.backbone.layers]
    muon = Muon([group for group in groups if group["muon"]], {m.in_proj.weight: m.in_proj_rows() for m in mixers}, lr)
    return Both(muon, _adamw(model, [group for group in groups if not group["muon"]], lr, betas, eps))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer | Both]] = {"adamw": _adamw, "muon": _muon}


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, as a fraction of the peak.

    Attributes:
        kind: how the rate falls to `floor` after the warm-up. `cosine` and `linear`: over all remaining steps;
            `constant`: not at all; `wsd` (warm-up, stable, decay): linearly over the last `decay_steps`.
        warmup_steps: linear warm-up from 1/warmup_steps, or with `warmup_from_zero` from 0, as in transformers.
        floor: the fraction at the end.
    """

    kind: str
    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    floor: float = 0.0
    warmup_from_zero: bool = False

    def factor(self, step: int) -> float:
        """The fraction for update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + (not self.warmup_from_zero)) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        start = self.steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        passed = min(1.0, max(0, step - start) / max(1, self.steps - start))
        left = 0.5 * (1.0 + math.cos(math.pi * passed)) if self.kind == "cosine" else 1.0 - passed
        return self.floor + (1.0 - self.floor) * left

    def same_until(self, other: "Schedule", step: int) -> bool:
        """Whether both give the same rates to all updates before `step`."""
        return all(self.factor(i) == other.factor(i) for i in range(step))
