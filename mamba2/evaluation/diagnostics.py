"""Diagnostics that explain an initialisation's effect: half-life of every head, and sizes of activations and gradients.

The functions compute in float32 and do not change the model. Arrays returned are numpy's.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mamba2.device import widen
from mamba2.evaluation.perplexity import token_nats
from mamba2.initializers import DtParams, dt_bias_sha256, half_life
from mamba2.mixer import Mamba2Mixer, MixerState
from mamba2.model import Mamba2LM
from mamba2.ops import ssd

REMEMBERED = (1, 16, 128, 1024)  # tokens


@dataclass(frozen=True)
class LayerTrace:
    """What `trace` records of one layer."""

    dt: torch.Tensor  # (b, l, h), after bias, softplus and limit
    output_rms: float  # of the mixer's output
    residual_rms: float  # of the residual stream before the mixer
    ssm_to_skip: np.ndarray  # (h,), rms of the SSM's output without D x over rms of D x


@torch.no_grad()
def trace(model: Mamba2LM, ids: torch.Tensor) -> list[LayerTrace]:
    """Record every Mamba-2 layer, by hooks, in one forward pass over ids (b, l) from an empty state."""
    traces: list[LayerTrace] = []

    def read(block: nn.Module, projected: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...]) -> None:
        mixer, (_, xBC, dt) = block.mixer, projected
        dt = F.softplus(dt + mixer.dt_bias).clamp(*model.config.time_step_limit)
        (x, B, C), _ = mixer.convolve(xBC, None, None, return_state=False)
        from_state = ssd(x, dt, mixer.A(), B, C, model.config.chunk_size)  # (b, l, h, p), without D x
        ratio = _rms(from_state, (0, 1, 3)) / _rms(mixer.D[:, None] * x, (0, 1, 3)).clamp(min=1e-30)
        output, stream, _ = results
        traces.append(LayerTrace(dt, _rms(output).item(), _rms(stream).item(), ratio.numpy(force=True)))

    projections: list[tuple[torch.Tensor, ...]] = []
    with contextlib.ExitStack() as hooks:
        for block in model.backbone.layers:
            if isinstance(block.mixer, Mamba2Mixer):
                keep = block.mixer.in_proj.register_forward_hook(lambda _, __, pieces: projections.append(pieces))
                after = block.register_forward_hook(lambda block, _, results: read(block, projections.pop(), results))
                hooks.callback(keep.remove)
                hooks.callback(after.remove)
        model.backbone(ids, return_state=False)
    return traces


def _rms(x: torch.Tensor, dims: tuple[int, ...] | None = None) -> torch.Tensor:
    return widen(x).square().mean(dim=dims).sqrt()


# ------------------------------------------------------------------------------------------------------------ half-life


def nominal_half_life(model: Mamba2LM) -> np.ndarray:
    """Half-life of every head in tokens, (L, h), for W_dt x = 0."""
    return half_life(F.softplus(widen(model.dt_bias())), model.A()).numpy(force=True)


def effective_half_life(model: Mamba2LM, traces: list[LayerTrace]) -> np.ndarray:
    """Half-life of every head in tokens, (L, h), for the mean dt over the data: the state decays by exp(-A Σ dt)."""
    dt = torch.stack([widen(layer.dt).mean(dim=(0, 1)) for layer in traces])
    return half_life(dt, model.A()).numpy(force=True)


def shares_remembering(tau: np.ndarray) -> dict[int, float]:
    """Share of all heads whose half-life is above 1, 16, 128, 1024 tokens."""
    # The rounding of dt_bias to float32 changes a half-life by 1e-6: a head set to 1024 tokens must not count as above.
    return {tokens: float((tau > tokens * (1 + 1e-5)).mean()) for tokens in REMEMBERED}


def decay_mask(dt: torch.Tensor, A: float) -> np.ndarray:
    """How much of token j is left at token i: exp(-A Σ_{j<k≤i} dt_k), nan for j > i. dt is (l,), the result (l, l)."""
    total = (widen(dt) * A).cumsum(0)
    mask = torch.exp(-(total[:, None] - total[None, :]))
    return mask.masked_fill(torch.ones_like(mask).triu(1).bool(), math.nan).numpy(force=True)


# -------------------------------------------------------------------------------------------- before and after training


def initial_model(model: Mamba2LM) -> Mamba2LM:
    """The model before training, initialised again as its config records.

    Raises ValueError when there is no record, or when dt_bias differs from the recorded one.
    """
    record, config = model.config.dt_bias_init, model.config
    if record is None or not {"seed", "sha256"} <= record.keys():
        raise ValueError(
            "the model's config.json has no dt_bias_init with seed and sha256: models made by init.py have"
        )
    recorded: dict = {}
    for of_parameter in (record, *(config.factors_init or {}).values()):
        recorded |= {key: of_parameter[key] for key in DtParams.__dataclass_fields__ if key in of_parameter}
    recorded |= {"value": record["constant"]} if "constant" in record else {}
    ranges = {"t_min": config.time_step_min, "t_max": config.time_step_max, "dt_floor": config.time_step_floor}
    dt = DtParams(**{**recorded, **ranges})
    name = config.initialization
    initial = Mamba2LM(config, record["seed"], name, dt)
    if initial.config.factors_init != config.factors_init:
        raise ValueError(f"{name}, seed {record['seed']}, has other factors than recorded when made again")
    if dt_bias_sha256(initial.dt_bias()) != record["sha256"]:
        raise ValueError(f"dt_bias of {record['name']}, seed {record['seed']}, is not the recorded one when made again")
    return initial


def drift(before: Mamba2LM, after: Mamba2LM) -> dict[str, float]:
    """How far training moved dt_bias: mean and largest distance over heads, and Spearman's rank correlation."""
    from scipy import stats

    a, b = (widen(model.dt_bias()).flatten().numpy(force=True) for model in (before, after))
    moved = np.abs(b - a)
    constant = np.ptp(a) == 0 or np.ptp(b) == 0  # ranks are undefined
    correlation = math.nan if constant else float(stats.spearmanr(a, b).statistic)
    return {"mean": float(moved.mean()), "largest": float(moved.max()), "rank_correlation": correlation}


# ------------------------------------------------------------------------------------------- over distance and position


def gradient_against_distance(model: Mamba2LM, ids: torch.Tensor) -> np.ndarray:
    """Norm of d loss / d (embedding of a token) by the token's distance from the predicted one, mean over b: (l - 1,).

    The loss is that of the last id of each row of ids (b, l) alone; entry 0 is the token just before it.
    """
    inputs = []

    def keep(_, arguments: tuple) -> tuple:
        x, *others = arguments
        inputs.append(x.detach().requires_grad_())
        return inputs[0], *others

    targets = torch.full_like(ids[:, 1:], -100)
    targets[:, -1] = ids[:, -1]
    handle = model.backbone.layers[0].register_forward_pre_hook(keep)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model(ids[:, :-1], targets), inputs)  # (b, l-1, d)
    finally:
        handle.remove()
    return widen(gradient).norm(dim=-1).mean(0).flip(0).numpy(force=True)


@torch.no_grad()
def state_rms(model: Mamba2LM, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Positions 1, 2, 4, … (k,), and the rms of every Mamba-2 layer's state after that many tokens (k, L)."""
    positions = [2**k for k in range(int(math.log2(ids.shape[1])) + 1)]
    rows, state, done = [], None, 0
    for position in positions:
        _, state = model.backbone(ids[:, done:position], state=state)
        rows.append([_rms(layer.ssm).item() for layer in state if isinstance(layer, MixerState)])
        done = position
    return np.array(positions), np.array(rows)


def loss_by_position(
    model: Mamba2LM, ids: torch.Tensor, context: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss in nats in bins of positions (1, 2], (2, 4], (4, 8], …: right ends (k,) and losses (k,).

    Position p has p tokens before it. ids (b, l) are read in windows of `context` with the state carried along.
    """
    total = np.zeros(ids.shape[1] - 1)  # entry i has i + 1 tokens before it
    for _, nats in token_nats(model, ids.tolist(), context, batch_size):
        total += nats
    ends, losses = log_bins(total / len(ids))
    return ends[1:], losses[1:]


def log_bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of values (n,), which belong to 1, 2, 3, …, in bins 1, 2, 3–4, 5–8, …: right ends and means."""
    ends = [2**k for k in range(int(math.log2(len(values))) + 1)]
    return np.array(ends), np.array([values[end // 2 : end].mean() for end in ends])


# ------------------------------------------------------------------------------------------------------------ summaries


def gradient_norms(model: Mamba2LM, ids: torch.Tensor) -> list[float]:
    """Norm of the gradient of the mean loss with respect to all weights of each layer, (L,)."""
    parameters = [list(block.parameters()) for block in model.backbone.layers]
    with torch.enable_grad():
        loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        gradients = iter(torch.autograd.grad(loss, [p for layer in parameters for p in layer]))
    return [math.sqrt(sum(widen(next(gradients)).square().sum().item() for _ in layer)) for layer in parameters]


def signals(model: Mamba2LM, ids: torch.Tensor) -> dict[str, list[float]]:
    """For each layer: rms of the residual stream and of the mixer's output, gradient norm, median SSM/skip ratio."""
    traces = trace(model, ids)
    return {
        "residual_rms": [layer.residual_rms for layer in traces],
        "output_rms": [layer.output_rms for layer in traces],
        "gradient_norm": gradient_norms(model, ids),
        "ssm_to_skip": [float(np.median(layer.ssm_to_skip)) for layer in traces],
    }


def batches(documents: Iterator[list[int]], length: int, count: int) -> torch.Tensor:
    """At most `count` sequences of `length` ids (b, l), evenly spread over the concatenated documents.

    Raises ValueError when the data are shorter than one sequence.
    """
    flat = [i for ids in documents for i in ids]
    whole = len(flat) // length
    if whole == 0:
        raise ValueError(f"the data has {len(flat)} tokens, and the diagnostics need {length} at a stretch")
    chosen = [i * whole // min(count, whole) for i in range(min(count, whole))]
    return torch.tensor([flat[i * length : (i + 1) * length] for i in chosen])


def diagnose(model: Mamba2LM, ids: torch.Tensor, context: int, batch_size: int, positions: bool = True) -> dict:
    """All diagnostics of a trained model and of its initial state, JSON-ready. ids (b, l), of any length l.

    `positions`: also the loss by position, which is meaningful for text only.
    """
    short = ids[:4, : min(context + 1, ids.shape[1])]
    result: dict = {"context": context, "tokens": list(ids.shape)}
    initial = initial_model(model).to(ids.device).eval()
    for when, which in (("before", initial), ("after", model)):
        traces = trace(which, short[:, :-1])
        after, rms = state_rms(which, short)
        distances, gradient = log_bins(gradient_against_distance(which, short))
        result[when] = {
            "nominal": nominal_half_life(which).tolist(),
            "effective": effective_half_life(which, traces).tolist(),
            "positions": after.tolist(),
            "state_rms": rms.tolist(),
            "distances": distances.tolist(),
            "gradient": gradient.tolist(),
            "signals": signals(which, short),
        }
    result["drift"] = drift(initial, model)
    # The decay masks of the head with the longest memory, in the first, middle and last layer.
    head = int(np.argmax(np.max(result["after"]["effective"], axis=0)))
    layers = len(traces)
    result["mask_head"] = head
    result["masks"] = {
        str(i): decay_mask(traces[i].dt[0, :64, head], model.A()[i, head].item()).round(4).tolist()
        for i in sorted({0, layers // 2, layers - 1})
    }
    if positions:
        ends, losses = loss_by_position(model, ids, context, batch_size)
        result |= {"position_ends": ends.tolist(), "position_losses": losses.tolist()}
    return result
