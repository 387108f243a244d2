"""Factors beside dt_bias: initialisations of A, D, the convolution, B and C, out_proj and the embeddings.

An initialisation is written `log_uniform`, or as a product with these, `log_uniform+A=ones+conv=identity`. Each
function takes what the model drew, for all layers at once, DtParams, and a generator of the stream (seed, factor); it
gives the values to use. All other tensors stay bit-identical.

    A          log of A, and dt_bias to read, (L, h) each
    D          (L, h)
    conv       weights (L, channels, k) of x, B and C, the last tap for the current token, and their biases
    BC         the rows of in_proj that make B and those that make C, (L, g n, d) each
    out_proj   weight (L, d, d_inner)
    embedding  weight (v, d), shared with lm_head if tied
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mamba2.initializers import INITIALIZERS, DtParams, Initializer, halflife, seed_stream


def _register(factor: str, *parameters: str, after_dt_bias: bool = False) -> Callable:
    def register(function: Callable) -> Callable:
        name = function.__name__.removeprefix(f"{factor}_")
        INITIALIZERS.setdefault(factor, {})[name] = Initializer(function, parameters, factor, after_dt_bias)
        return function

    return register


@_register("A")
def arange(A_log: Tensor, dt_bias: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """A = 1..nheads in every layer, S4D-Real's (Gu et al. 2022), as in transformers."""
    return torch.arange(1.0, A_log.shape[1] + 1).log().expand_as(A_log)


@_register("A")
def uniform_1_16(A_log: Tensor, dt_bias: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """A ~ U(1, 16) for each head, as in mamba-ssm."""
    return torch.empty_like(A_log).uniform_(1.0, 16.0, generator=generator).log()


@_register("A")
def A_ones(A_log: Tensor, dt_bias: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """A = 1 everywhere: memory then depends on dt alone."""
    return torch.zeros_like(A_log)


@_register("A")
def slow(A_log: Tensor, dt_bias: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """A = 0.01 everywhere: a decay near 1, as mimetic initialisation asks for (Trockman et al. 2024)."""
    return torch.full_like(A_log, math.log(0.01))


@_register("A", "half_life_min", "half_life_max", after_dt_bias=True)
def A_halflife(A_log: Tensor, dt_bias: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """ln 2 / (τ dt), half-lives τ as of dt_bias's `halflife`: memory is set by A, and dt says what is written."""
    dt = F.softplus(dt_bias.double())
    return halflife(tuple(dt.shape), dt, p, generator).log().float()


@_register("D")
def D_ones(D: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """D = 1: every head adds its input to its output."""
    return torch.ones_like(D)


@_register("D")
def zeros(D: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """D = 0: a head's output comes from its state alone."""
    return torch.zeros_like(D)


@_register("conv")
def identity(weight: Tensor, bias: Tensor | None, p: DtParams, generator: Generator) -> tuple[Tensor, Tensor | None]:
    """A tenth of the drawn weights, plus 1 at the last tap: nearly no convolution (Trockman et al. 2024)."""
    weight = weight / 10
    weight[..., -1] += 1
    return weight, None if bias is None else bias / 10


@_register("BC")
def tied(B: Tensor, C: Tensor, p: DtParams, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows of C = rows of B + C/10: a token reads what similar tokens wrote, as in linear attention.
    Trockman et al. 2024, arXiv:2410.11135 ("mimetic"), with conv=identity and A=slow."""
    return B, B + C / 10


@_register("out_proj")
def rescaled(weight: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """Divided by √(number of Mamba-2 layers): the residual stream then does not grow with depth (GPT-2)."""
    return weight / math.sqrt(len(weight))


@_register("out_proj")
def out_proj_zeros(weight: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """0: every layer begins as the identity."""
    return torch.zeros_like(weight)


@_register("embedding")
def small(weight: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """A standard deviation of 0.02, whatever initializer_range is (GPT-2)."""
    return weight * (0.02 / weight.std())


# --------------------------------------------------------------------------------------------------- names, application


def parse_initialization(text: str) -> tuple[str, dict[str, str]]:
    """Split `log_uniform+A=ones+D=zeros` into dt_bias's name and factors. Raises ValueError naming an unknown one."""
    name, *products = text.split("+")
    if name not in INITIALIZERS["dt_bias"]:
        raise ValueError(f"unknown initialization {name!r}: choose from {', '.join(INITIALIZERS['dt_bias'])}")
    factors: dict[str, str] = {}
    for product in products:
        factor, _, choice = product.partition("=")
        if factor == "dt_bias" or choice not in INITIALIZERS.get(factor, {}):
            known = ", ".join(f"{f}={c}" for f, choices in INITIALIZERS.items() if f != "dt_bias" for c in choices)
            raise ValueError(f"unknown factor {product!r} of the initialization {text!r}: choose from {known}")
        if factor in factors:
            raise ValueError(f"the initialization {text!r} names {factor} twice")
        factors[factor] = choice
    return name, factors


@torch.no_grad()
def apply_factor(
    factor: str, choice: str, seed: int, layers: list[tuple[Tensor | None, ...]], p: DtParams
) -> dict[str, Any]:
    """Set one factor in place; `layers` holds the tensors of each layer (views, or None). Returns its record: name,
    seed, the parameters that it reads, and sha256 of the float32 values, layer by layer."""
    initializer = INITIALIZERS[factor][choice]
    drawn = [None if parts[0] is None else torch.stack(parts).float().cpu() for parts in zip(*layers)]
    made = initializer.function(*drawn, p, seed_stream(seed, factor))
    digest = hashlib.sha256()
    for values, *of_layers in zip(made if isinstance(made, tuple) else (made,), *layers):
        if values is not None:
            digest.update(values.contiguous().numpy().astype("<f4").tobytes())
            for tensor, value in zip(of_layers, values):
                tensor.copy_(value)
    return {"name": choice, "seed": seed, **initializer.record(p), "sha256": digest.hexdigest()}
