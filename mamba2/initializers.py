"""Initialisations of dt_bias, which sets how fast each head forgets before training.

A head steps by `dt = softplus(W_dt x + dt_bias)`, keeps `exp(-dt·A)` of its state per token and writes `dt·B x` to it:
its half-life is `ln 2 / (dt·A)` tokens. Each function below gives dt for all layers and heads at once; `make_dt_bias`
turns a name into the dt_bias tensor and a record of what was applied.

Each is a function `(shape, A, p, generator) -> dt`:
    shape      (n_layers, nheads)
    A          float64, broadcastable to shape, positive: exp(A_log)
    p          DtParams; each initializer names the ones it reads, and those go into the record
    generator  its only source of randomness, seeded by (seed, stream), so no other tensor depends on the choice
    dt         float64, shape (n_layers, nheads), in units of the recurrence's time

In the formulas l is the layer of L, h the head of H, λ = l/(L-1) (0 if L = 1), η = h/(H-1) (0 if H = 1), u ~ U(0, 1).
The second half sets a *rate* of forgetting per token and divides by A. Where such a rate depends on the head, heads are
shuffled within each layer: A = 1..H also rises with the head, and the two would be confounded. No floor applies there.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Shape = tuple[int, int]


@dataclass(frozen=True)
class DtParams:
    """Numbers that initializers read. Raises ValueError, naming the one that is out of its domain."""

    t_min: float = 1e-3
    t_max: float = 0.1
    dt_floor: float = 1e-4  # of log_uniform alone
    value: float | None = None  # of constant; None: √(t_min t_max)
    half_life_min: float = 1.0  # of halflife, in tokens: from one token ...
    half_life_max: float = 1024.0  # ... to the length that the study trains on
    chrono_max: float = 1024.0  # of chrono, in tokens: the longest dependency expected
    length: float | None = None  # of a window of training, in tokens
    eigenvalue: float | None = None  # of autocorrelation: λ of mamba2.data.correlation

    @classmethod
    def read(cls, settings: list[str], length: int | None = None, **defaults: float) -> "DtParams":
        """Parse settings such as half_life_max=256, over `defaults`. With `length`, the tokens of a training window, a
        half-life or chrono_max may be a share of it: half_life_max=0.5L. Raises ValueError naming a wrong setting."""
        values: dict[str, float] = {}
        for setting in settings:
            key, _, text = setting.partition("=")
            if key not in cls.__dataclass_fields__ or key == "length":
                known = ", ".join(key for key in cls.__dataclass_fields__ if key != "length")
                raise ValueError(f"{setting} sets no parameter of an initialisation: give {known}, as in value=0.01")
            if key in values:
                raise ValueError(f"{key} is set twice")
            unit = 1
            if text.endswith("L"):
                if key not in LENGTHS:
                    raise ValueError(f"{setting}: {key} is no length; a share of L is for {', '.join(LENGTHS)}")
                if length is None:
                    raise ValueError(f"{setting}: how long L is, --length says, or max_length in [train] of a study")
                text, unit = text[:-1], length
            try:
                values[key] = float(text) * unit
            except ValueError:
                raise ValueError(f"{setting}: {text!r} is no number") from None
        return cls(**{**defaults, "length": length, **values})

    def __post_init__(self) -> None:
        if not 0 < self.t_min <= self.t_max < math.inf:
            raise ValueError(f"t_min is {self.t_min} and t_max is {self.t_max}, and must satisfy 0 < t_min <= t_max")
        if not 0 <= self.dt_floor < math.inf:
            raise ValueError(f"dt_floor is {self.dt_floor}, and must be at least 0")
        if self.value is not None and not 0 < self.value < math.inf:
            raise ValueError(f"value is {self.value}, and must be above 0")
        if not 0 < self.half_life_min <= self.half_life_max < math.inf:
            raise ValueError(
                f"half_life_min is {self.half_life_min} and half_life_max is {self.half_life_max}, "
                "and must satisfy 0 < half_life_min <= half_life_max"
            )
        if not 2 < self.chrono_max < math.inf:
            raise ValueError(f"chrono_max is {self.chrono_max}, and must be above 2")
        for name in ("length", "eigenvalue"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, and must be above 0")

    @property
    def constant(self) -> float:
        return math.sqrt(self.t_min * self.t_max) if self.value is None else self.value


LENGTHS = ("half_life_min", "half_life_max", "chrono_max")  # in tokens


@dataclass(frozen=True)
class Initializer:
    """A named function (see the module's docstring; for other parameters than dt_bias, `mamba2.factors`), the
    DtParams it reads and the random stream it draws from."""

    function: Callable
    parameters: tuple[str, ...]
    stream: str
    after_dt_bias: bool = False  # whether it reads dt_bias

    def record(self, p: DtParams) -> dict[str, float]:
        """The parameters that it reads, as models record them. Raises ValueError naming one that is not given."""
        values = {key: getattr(p, key) for key in self.parameters}
        if missing := [key for key, value in values.items() if value is None]:
            raise ValueError(f"{self.function.__name__} needs {missing[0]}, which is not given")
        return values

    @property
    def reads(self) -> set[str]:
        """The fields of DtParams that change its result."""
        return {"value", "t_min", "t_max"} if "constant" in self.parameters else set(self.parameters)


# By parameter and name. Those of dt_bias are below; `mamba2.factors` adds the others.
INITIALIZERS: dict[str, dict[str, Initializer]] = {"dt_bias": {}}


def _register(*parameters: str, stream: str = "dt_bias") -> Callable:
    def register(function: Callable) -> Callable:
        INITIALIZERS["dt_bias"][function.__name__] = Initializer(function, parameters, stream)
        return function

    return register


def seed_stream(seed: int, name: str) -> Generator:
    """A CPU generator that depends on (seed, name) alone: draws from one stream do not change another."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits: manual_seed is signed


# ----------------------------------------------------------------------------------------------- dt <-> bias, half-life


def inverse_softplus(dt: Tensor) -> Tensor:
    """x with softplus(x) = dt, as dt + log(1 - exp(-dt)) in float64: neither small nor large dt loses digits."""
    dt = dt.double()
    return dt + torch.log(-torch.expm1(-dt))


def half_life(dt: Tensor, A: Tensor) -> Tensor:
    """Tokens after which half of the state is left: exp(-dt·A·t) = 1/2. A is positive, exp(A_log)."""
    return math.log(2) / (dt * A)


# ---------------------------------------------------------------------------------------------------------- coordinates


def _fraction(index: Tensor, count: int) -> Tensor:
    return index.double() / max(count - 1, 1)


def _depth(shape: Shape) -> Tensor:
    """λ, float64, repeated for each head: (n_layers, nheads)."""
    return _fraction(torch.arange(shape[0]), shape[0])[:, None].expand(shape)


def _shuffled_heads(shape: Shape, generator: Generator) -> Tensor:
    """A random order of 0..nheads-1 for each layer: int64 (n_layers, nheads)."""
    return torch.stack([torch.randperm(shape[1], generator=generator) for _ in range(shape[0])])


def _shuffled_eta(shape: Shape, generator: Generator) -> Tensor:
    return _fraction(_shuffled_heads(shape, generator), shape[1])


def _rand(shape: Shape, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- dt itself, in [t_min, t_max]


@_register("t_min", "t_max")
def uniform(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min + u_l (t_max - t_min): one draw per layer, shared by its heads."""
    return p.t_min + _rand((shape[0], 1), generator).expand(shape) * (p.t_max - p.t_min)


@_register("t_min", "t_max")
def linear_decay(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min + (t_max - t_min) λ: dt grows with depth, so memory decays with depth."""
    return p.t_min + (p.t_max - p.t_min) * _depth(shape)


@_register("t_min", "t_max")
def linear_decay_reverse(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_max - (t_max - t_min) λ: dt falls with depth, deeper layers remember longer."""
    return p.t_max - (p.t_max - p.t_min) * _depth(shape)


@_register("t_min", "t_max", "dt_floor")
def log_uniform(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min (t_max/t_min)^u_lh, at least dt_floor: Mamba-2's own default, the baseline.

    As in mamba_ssm/modules/mamba2.py; the floor acts only where t_min is below it.
    """
    return (p.t_min * (p.t_max / p.t_min) ** _rand(shape, generator)).clamp(min=p.dt_floor)


@_register("t_min", "t_max", stream="dt_bias_shuffle")
def log_linspace(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min (t_max/t_min)^η, heads shuffled per layer: log_uniform, evenly spaced (S4's `deterministic` option)."""
    return p.t_min * (p.t_max / p.t_min) ** _shuffled_eta(shape, generator)


@_register("t_min", "t_max")
def uniform_per_head(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min + u_lh (t_max - t_min): one draw per head, even in dt (Lingua's Mamba)."""
    return p.t_min + _rand(shape, generator) * (p.t_max - p.t_min)


@_register("t_min", "t_max", stream="dt_bias_shuffle")
def linear_shuffle(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """linear_decay's values, given to the layers in random order: a control for depth."""
    return linear_decay(shape, A, p, generator)[torch.randperm(shape[0], generator=generator)]


@_register("t_min", "t_max")
def geometric_decay(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min (t_max/t_min)^λ: linear_decay, but even in log time."""
    return p.t_min * (p.t_max / p.t_min) ** _depth(shape)


@_register("t_min", "t_max")
def geometric_decay_reverse(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """t_min (t_max/t_min)^(1-λ): deeper layers remember longer, even in log time."""
    return p.t_min * (p.t_max / p.t_min) ** (1 - _depth(shape))


@_register("constant")
def constant(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """One value everywhere, √(t_min t_max) unless given: a control for spread."""
    return torch.full(shape, p.constant, dtype=torch.float64)


@_register("length")
def inverse_length(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """1 / length everywhere: with A = 1, a window's first token has 1/e left at its end."""
    return torch.full(shape, 1 / p.length, dtype=torch.float64)


@_register("length", "eigenvalue")
def autocorrelation(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """1/√(length λ) everywhere, λ measured in the data (after Liu & Li 2024).

    From 1/√length for independent tokens to 1/length for constant ones. λ is the largest eigenvalue of the tokens'
    autocorrelation, see `mamba2.data.correlation`; init.py measures it.
    """
    return torch.full(shape, 1 / math.sqrt(p.length * p.eigenvalue), dtype=torch.float64)


@_register()
def ones(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """dt_bias = 1, so dt = softplus(1) = 1.31: a negative control, and what a model left uninitialised gets.

    transformers and flash-linear-attention both shipped it: dt_bias was created as ones and never initialised.
    """
    return F.softplus(torch.ones(shape, dtype=torch.float64))


# -------------------------------------------------------------------------- a rate of forgetting per token, dt = rate/A


@_register("half_life_min", "half_life_max", stream="dt_bias_shuffle")
def halflife(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """ln 2 / (τ A), half-life τ = τ_min (τ_max/τ_min)^η tokens: memory chosen directly, whatever A is."""
    tau = p.half_life_min * (p.half_life_max / p.half_life_min) ** _shuffled_eta(shape, generator)
    return math.log(2) / tau / A


@_register(stream="dt_bias_shuffle")
def retnet(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """-ln γ / A, decay γ = 1 - exp(lerp(ln 1/32, ln 1/512, η)) (RetNet; Sun et al. 2023)."""
    forgotten = 2 ** -(5 + 4 * _shuffled_eta(shape, generator))  # 1 - γ: geometric from 1/32 to 1/512
    return -torch.log1p(-forgotten) / A


@_register(stream="dt_bias_shuffle")
def rwkv(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """exp(-6 + 5 η^(0.7 + 1.3 λ)) / A: fewer fast heads with depth (RWKV-5/6, `time_decay`; Peng et al. 2024)."""
    return torch.exp(-6 + 5 * _shuffled_eta(shape, generator) ** (0.7 + 1.3 * _depth(shape))) / A


@_register("chrono_max")
def chrono(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """ln(1 + 1/v) / A, v ~ U(1, T-1): the forget gate v/(1+v) of chrono initialisation.

    Tallec & Ollivier 2018: the gate's bias is ln v, and sigmoid(ln v) of the state is kept per token.
    """
    v = 1 + _rand(shape, generator) * (p.chrono_max - 2)
    return torch.log1p(1 / v) / A


@_register()
def hgrn(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """-ln((1 + l/L)/2) / A: retention from 1/2 in the first layer towards 1 in the last (HGRN; Qin et al. 2023)."""
    retention = (1 + torch.arange(shape[0], dtype=torch.float64) / shape[0]) / 2
    return -torch.log(retention)[:, None] / A


@_register(stream="dt_bias_shuffle")
def lightning(shape: Shape, A: Tensor, p: DtParams, generator: Generator) -> Tensor:
    """2^(-8(h+1)/H) (1 - λ + 1e-5) / A: ALiBi's slopes, close to 0 in the last layer (Lightning attention)."""
    slope = 2 ** (-8 * (_shuffled_heads(shape, generator) + 1).double() / shape[1])
    return slope * (1 - _depth(shape) + 1e-5) / A


# ----------------------------------------------------------------------------------------------------- what others call


def make_dt_bias(
    name: str, shape: Shape, A: Tensor, seed: int, params: DtParams | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """dt_bias of every layer by the named initializer, and a record of what was applied.

    Args:
        name: a key of INITIALIZERS.
        shape: (n_layers, nheads).
        A: positive, broadcastable to shape; exp(A_log).
        seed: the model's seed; draws come from a stream of their own.
        params: defaults to DtParams().

    Returns:
        dt_bias: float32 (n_layers, nheads); softplus(dt_bias) = dt.
        record: name, seed, the parameters that the initializer reads, and sha256 of dt_bias: JSON-ready.

    Raises:
        ValueError: unknown name (the message lists them), empty shape, an A that is not positive and finite, or a dt
            or half-life that float32 does not hold.
    """
    if name not in INITIALIZERS["dt_bias"]:
        raise ValueError(f"unknown initialization {name!r}: choose from {', '.join(INITIALIZERS['dt_bias'])}")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape is {tuple(shape)}, and must be (n_layers, nheads), both at least 1")
    A = torch.as_tensor(A).detach().cpu().double()
    if A.dim() > 2 or any(a not in (1, s) for a, s in zip(reversed(A.shape), reversed(shape))):
        raise ValueError(f"A has shape {tuple(A.shape)}, and must broadcast to (n_layers, nheads) = {tuple(shape)}")
    if not (A.isfinite() & (A > 0)).all():
        raise ValueError(f"A goes from {A.min():g} to {A.max():g}, and must be positive and finite: pass exp(A_log)")
    params = DtParams() if params is None else params
    initializer = INITIALIZERS["dt_bias"][name]
    parameters = initializer.record(params)
    generator = seed_stream(seed, initializer.stream)
    dt = initializer.function(shape, A.expand(shape), params, generator)  # (n_layers, nheads) float64
    dt_bias = inverse_softplus(dt).float()
    given = ", ".join(f"{key} = {value:g}" for key, value in parameters.items())
    given = f" with {given}" if given else ""
    require_normal(f"dt of {name}{given}", dt.float(), positive=True)
    require_normal(f"dt_bias of {name}{given}", dt_bias)
    require_normal(f"the half-life of {name}{given}", half_life(dt, A).float(), positive=True)
    return dt_bias, {"name": name, "seed": seed, **parameters, "sha256": dt_bias_sha256(dt_bias)}


def require_normal(name: str, tensor: Tensor, positive: bool = False) -> None:
    """Raise ValueError where a value is not finite or is subnormal in float32; zero is allowed unless `positive`."""
    limits = torch.finfo(torch.float32)
    for part in tensor.detach().flatten().split(2**20):
        wrong = ~part.isfinite() | ((part.abs() < limits.tiny) & (positive | (part != 0)))
        if wrong.any():
            raise ValueError(
                f"{name} would hold {part[wrong][0]:g}, and float32 holds numbers from {limits.tiny:.3g} to "
                f"{limits.max:.3g}"
            )


def dt_bias_sha256(dt_bias: Tensor) -> str:
    """Hex sha256 of the values as little-endian float32, layer by layer: ties a record to the tensor it describes."""
    return hashlib.sha256(dt_bias.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def dt_table(dt_bias: Tensor, A: Tensor) -> str:
    """Text table, a line per layer: dt and half-life (min, median, max over heads), share of heads that remember.

    `dt_bias` is (n_layers, nheads), `A` positive and broadcastable to it. "> 16" is the share of heads whose half-life
    is above 16 tokens. These are nominal values, at W_dt x = 0.
    """
    dt = F.softplus(dt_bias.detach().cpu().double())
    tau = half_life(dt, A.detach().cpu().double())
    # float32 dt_bias changes a half-life by a relative 1e-6: a head set to 1024 tokens must not count as above.
    remembers = [(tau > tokens * (1 + 1e-5)).double().mean(1) for tokens in (16, 128, 1024)]
    lines = [
        f"{'':5} | {'dt':^26} | {'half-life, tokens':^26} | {'heads that remember':^20}",
        f"layer | {'min':>8} {'median':>8} {'max':>8} | {'min':>8} {'median':>8} {'max':>8} | "
        f"{'> 16':>6} {'> 128':>6} {'> 1024':>6}",
    ]
    for layer, (dt_l, tau_l) in enumerate(zip(dt, tau)):
        spread = [_short(q) for x in (dt_l, tau_l) for q in (x.min(), x.quantile(0.5), x.max())]
        shares = [f"{share[layer]:6.0%}" for share in remembers]
        lines.append(f"{layer:5} | {' '.join(spread[:3])} | {' '.join(spread[3:])} | {' '.join(shares)}")
    return "\n".join(lines)


def _short(value: Tensor) -> str:
    """In 8 columns: a whole number from 1000 to 1e7, else three significant digits."""
    return f"{value:8.0f}" if 1000 <= value < 1e7 else f"{value:8.3g}"
