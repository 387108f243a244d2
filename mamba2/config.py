"""Hyper-parameters of a model: a frozen dataclass, read from and written to `config.json`, checked in `_check`.

The file is Hugging Face's: the same keys and, where a key is absent, the same default as `transformers.Mamba2Config`,
so that a folder written by either opens in the other. Keys that this code does not use stay in `extra` and are written
back unchanged and in their place. Six more keys are written only when they are set: `weight_init`, `mup_base_width`,
`dt_bias_init` and `factors_init` of this package, and mamba-ssm's `attn_layer_idx` and `attn_cfg` for attention layers.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from mamba2.files import write_text

NO_LIMIT = (0.0, math.inf)
# The smallest normal number of float32, and the largest.
FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
INT64 = 2**63 - 1

# A named choice sets these keys; it also decides how A is drawn (see Mamba2Config.weight_init).
WEIGHT_INITS: dict[str, dict[str, Any]] = {
    "transformers": {"initializer_range": 0.1, "rescale_prenorm_residual": False},
    "mamba_ssm": {"initializer_range": 0.02, "rescale_prenorm_residual": True},
}


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Hyper-parameters of a Mamba-2 language model; an inconsistent set cannot be constructed.

    Raises ValueError: one sentence naming the key, its value and what would be accepted.
    """

    model_type: ClassVar[str] = "mamba2"

    # No default for these three: a file that lacks them is some other format, not a 2.7-billion-parameter model.
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int

    expand: int = 2
    head_dim: int = 64
    num_heads: int = 128
    n_groups: int = 8
    state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 256
    hidden_act: str = "silu"
    use_bias: bool = False
    use_conv_bias: bool = True
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False

    # dt, in units of the recurrence's time: the range that dt_bias is initialised to, and the clamp of dt at run time.
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = NO_LIMIT

    # Weights: embeddings are N(0, initializer_range²), linear and convolution layers U(±1/√fan_in) (PyTorch's default),
    # D and the norms 1; rescale_prenorm_residual divides out_proj by √num_hidden_layers.
    initializer_range: float = 0.1
    rescale_prenorm_residual: bool = False
    # "transformers": A = 1..num_heads in every layer. "mamba_ssm": A ~ U(1, 16) per head.
    weight_init: str = "transformers"
    # Initial scales and rates follow muP from this hidden_size on, see `width_multiple`; None: they do not.
    mup_base_width: int | None = None
    # What `initializers.make_dt_bias` recorded (name, parameters, seed, sha256); None: dt_bias has no recorded origin.
    dt_bias_init: dict[str, Any] | None = None
    # By factor, what `factors.apply_factor` recorded (name, seed, sha256); None: all as `weight_init` has it.
    factors_init: dict[str, Any] | None = None

    # Layers whose mixer is attention, and its shape; see AttentionConfig.
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: dict[str, Any] = field(default_factory=dict)

    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 1

    extra: dict[str, Any] = field(default_factory=dict)
    # Keys in the order of the file that this came from, so that writing it back moves nothing.
    key_order: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_step_limit", _read_limit(self.time_step_limit))
        if isinstance(self.attn_layer_idx, list):
            object.__setattr__(self, "attn_layer_idx", tuple(self.attn_layer_idx))
        self._check()

    # ----------------------------------------------------------------------------------------------- derived quantities

    @property
    def d_inner(self) -> int:
        """Width of the mixer, nheads * headdim."""
        return self.expand * self.hidden_size

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.n_groups * self.state_size

    @property
    def d_in_proj(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.num_heads

    @property
    def width_multiple(self) -> float:
        """m = hidden_size / mup_base_width, by which muP scales initial weights and AdamW's rates; 1 without muP.

        The maximal update parametrisation keeps activations and their changes in a step the same size while
        hidden_size grows, and with it num_heads; vocabulary, depth, expand, head_dim, state_size and n_groups stay.
        Its condition: the spectral norms of a weight and of its update are as √(fan_out / fan_in). Independent weights
        of deviation σ have σ (√fan_in + √fan_out); an update of AdamW, with entries of about ± the rate and of low
        rank, has rate √(fan_in fan_out). Beside the model of the base width, which stays as it is:

                               fan_in  fan_out   initial weights        AdamW's rate
            in_proj: z, x, dt    m        m      as without (1/√fan_in)     1/m
            in_proj: B, C        m        1      1/√m of that               1/m
            out_proj             m        m      as without                 1/m
            lm_head              m        1      1/√m of that               1/m
            embeddings           1        m      as without                 1
            all others           1        1      as without                 1

        So nothing in the forward pass changes. Rows of B and C are like lm_head's: each reads the whole width and is
        one of state_size, over which C·B sums. A state that grew with the width would need another rule (Vankadara et
        al. 2024, On Feature Learning in Structured State Space Models, NeurIPS).

        References: Yang et al. 2022, arXiv:2203.03466, table 3; the condition: Yang, Simon & Bernstein 2023,
        arXiv:2310.17813.
        """
        return 1.0 if self.mup_base_width is None else self.hidden_size / self.mup_base_width

    @property
    def initialization(self) -> str | None:
        """The recorded initialisation with its factors, "log_uniform+A=ones"; None if dt_bias has no record."""
        if self.dt_bias_init is None:
            return None
        factors = (f"{factor}={record['name']}" for factor, record in (self.factors_init or {}).items())
        return "+".join([self.dt_bias_init["name"], *factors])

    def with_weight_init(self, name: str) -> Self:
        """This config with the named scheme ("transformers" or "mamba_ssm") and the keys that belong to it."""
        return dataclasses.replace(self, weight_init=name, **WEIGHT_INITS.get(name, {}))

    # ----------------------------------------------------------------------------------------------------- JSON in, out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the contents of a config.json; unknown keys go to `extra`."""
        if not isinstance(values, dict):
            raise ValueError(f"a config must be a JSON object of keys and values, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra", "key_order"}
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type is {model_type!r}, and only {cls.model_type!r} can be read")
        missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key not in values]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} missing: a Mamba2 config in Hugging Face's keys gives a value to each"
            )
        return cls(
            **{key: value for key, value in values.items() if key in known},
            extra={key: value for key, value in values.items() if key not in known and key != "model_type"},
            key_order=tuple(values),
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json: keys of the file this came from first, in their order, then the others."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["extra"], values["key_order"]
        # (0, inf) is the default, and transformers' versions disagree about how infinity is spelt: 4.x writes a bare
        # Infinity, which is not JSON; 5.x the object below. So the default is not written at all.
        if self.time_step_limit == NO_LIMIT:
            del values["time_step_limit"]
        else:
            values["time_step_limit"] = [
                {"__float__": "Infinity"} if v == math.inf else v for v in self.time_step_limit
            ]
        if self.weight_init == "transformers":
            del values["weight_init"]
        for key in ("mup_base_width", "dt_bias_init", "factors_init"):
            if values[key] is None:
                del values[key]
        if self.attn_layer_idx:
            values["attn_layer_idx"] = list(self.attn_layer_idx)
        else:
            del values["attn_layer_idx"], values["attn_cfg"]
        values = {"model_type": self.model_type, **values, **self.extra}
        return {key: values[key] for key in (*self.key_order, *values) if key in values}

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Self:
        """Read a folder that holds a config.json, or one .json file of any name.

        Raises FileNotFoundError if there is none, ValueError naming the file if it is not a valid config.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"no config at {path}: give a folder that holds a config.json, or one .json file")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: line {error.lineno}: {error.msg}") from error
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply to be a config") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> Path:
        """Write to `path` if it ends in .json, else to `path`/config.json; atomic. Returns the file written."""
        path = Path(path)
        if path.suffix != ".json":
            path = path / "config.json"
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    # ------------------------------------------------------------------------------------------------------------ rules

    def _check(self) -> None:
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "expand", "head_dim", "num_heads", "n_groups"):
            check_int(key, getattr(self, key))
        for key in ("state_size", "chunk_size"):
            check_int(key, getattr(self, key))
        check_int("conv_kernel", self.conv_kernel, high=8)
        for key in ("use_bias", "use_conv_bias", "residual_in_fp32", "tie_word_embeddings", "rescale_prenorm_residual"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}, and must be true or false")
        for key in ("layer_norm_epsilon", "initializer_range", "time_step_min", "time_step_max", "time_step_floor"):
            _check_positive(key, getattr(self, key))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, key)
            for i in ids if isinstance(ids, list) and key == "eos_token_id" else [ids]:
                if i is not None:
                    check_int(key, i, low=0, high=self.vocab_size - 1)

        if self.num_heads * self.head_dim != self.d_inner:
            raise ValueError(
                f"num_heads * head_dim is {self.num_heads} * {self.head_dim} = {self.num_heads * self.head_dim}, "
                f"and must equal expand * hidden_size = {self.expand} * {self.hidden_size} = {self.d_inner}"
            )
        if self.num_heads % self.n_groups:
            raise ValueError(f"n_groups is {self.n_groups}, and must divide num_heads = {self.num_heads}")
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"time_step_min is {self.time_step_min}, and must be at most time_step_max = {self.time_step_max}"
            )
        low, high = self.time_step_limit
        held = [limit in (0, math.inf) or FLOAT32[0] <= limit <= FLOAT32[1] for limit in (low, high)]
        if not 0 <= low < high or not all(held):
            raise ValueError(
                f"time_step_limit is [{low}, {high}], and must be [low, high] with 0 <= low < high that float32 holds"
            )

        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}, and only 'silu' (or its other name 'swish') is implemented"
            )
        # Files of transformers 4 also say norm_before_gate, which its models ignore: it stays in `extra`.
        if self.extra.get("rms_norm", True) is not True:
            raise ValueError(
                f"rms_norm is {self.extra['rms_norm']!r}, and only true (the gated RMSNorm) is implemented"
            )
        if self.weight_init not in list(WEIGHT_INITS):
            raise ValueError(f"weight_init is {self.weight_init!r}, and must be one of {', '.join(WEIGHT_INITS)}")
        for key in ("dt_bias_init", "factors_init"):
            if not isinstance(getattr(self, key), dict | None):
                raise ValueError(f"{key} is {getattr(self, key)!r}, and must be an object or null")
        for factor, record in (self.factors_init or {}).items():
            if not isinstance(record, dict) or not isinstance(record.get("name"), str):
                raise ValueError(f"factors_init.{factor} is {record!r}, and must be an object with a name")
        layers = self.attn_layer_idx
        wanted = f"a list of different layers below num_hidden_layers = {self.num_hidden_layers}, not of all"
        if not isinstance(layers, tuple) or len(layers) >= self.num_hidden_layers or len(set(layers)) < len(layers):
            raise ValueError(f"attn_layer_idx is {layers!r}, and must be {wanted}")
        for layer in layers:
            check_int("a layer in attn_layer_idx", layer, low=0, high=self.num_hidden_layers - 1)
        if layers:
            AttentionConfig.of(self)
        elif self.attn_cfg:
            raise ValueError(f"attn_cfg is {self.attn_cfg!r}, and attn_layer_idx names no layer that it is for")
        if self.mup_base_width is not None:
            check_int("mup_base_width", self.mup_base_width)
            A = (self.factors_init or {}).get("A", {}).get("name", self.weight_init)
            needs = {
                "tie_word_embeddings false, for it scales lm_head and not the embeddings": not self.tie_word_embeddings,
                "layers without attention (attn_layer_idx), for which it has no rule here": not layers,
                "weight_init mamba_ssm without A=arange, for A = 1..num_heads is another range at every width": (
                    self.weight_init == "mamba_ssm" and A != "arange"
                ),
            }
            for what, given in needs.items():
                if not given:
                    raise ValueError(f"mup_base_width is {self.mup_base_width}, and needs {what}")
        name = "" if self.dt_bias_init is None else self.dt_bias_init.get("name")
        if not isinstance(name, str):
            raise ValueError(f"dt_bias_init.name is {name!r}, and must be the name of an initialisation")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """`attn_cfg`: shape and options of the attention mixers, with the names and defaults of mamba-ssm's `MHA`. Options
    that are not implemented accept one value only (see `of`)."""

    num_heads: int
    num_heads_kv: int | None = None  # heads of keys and values; None: num_heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    qkv_proj_bias: bool = True
    out_proj_bias: bool = True
    d_conv: int = 0  # width of a convolution over q, k and v; 0: none
    rotary_emb_dim: int = 0  # how many channels of a head are rotated
    rotary_emb_base: float = 10000.0
    softmax_scale: float | None = None  # None: 1 / √head_dim
    causal: bool = False
    rotary_emb_interleaved: bool = False
    mlp_dim: int = 0

    @classmethod
    def of(cls, config: Mamba2Config) -> Self:
        """The attn_cfg of a config, with defaults. Raises ValueError naming key, value and what would be accepted."""
        values = config.attn_cfg
        if not isinstance(values, dict) or "num_heads" not in values:
            raise ValueError(f"attn_cfg is {values!r}, and must be an object with num_heads, for attn_layer_idx")
        if unknown := sorted(values.keys() - {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(f"attn_cfg holds keys that are not known: {', '.join(unknown)}")
        shape = cls(**values)
        for key, wanted in (("causal", True), ("rotary_emb_interleaved", False), ("mlp_dim", 0)):
            if getattr(shape, key) != wanted:
                raise ValueError(f"attn_cfg.{key} is {getattr(shape, key)!r}, and only {wanted!r} is implemented")
        for key in ("qkv_proj_bias", "out_proj_bias"):
            if not isinstance(getattr(shape, key), bool):
                raise ValueError(f"attn_cfg.{key} is {getattr(shape, key)!r}, and must be true or false")
        check_int("attn_cfg.num_heads", shape.num_heads)
        if shape.head_dim is None and config.hidden_size % shape.num_heads:
            raise ValueError(
                f"attn_cfg.num_heads is {shape.num_heads}, and must divide hidden_size = {config.hidden_size} where "
                "attn_cfg has no head_dim"
            )
        shape = dataclasses.replace(
            shape,
            num_heads_kv=shape.num_heads if shape.num_heads_kv is None else shape.num_heads_kv,
            head_dim=config.hidden_size // shape.num_heads if shape.head_dim is None else shape.head_dim,
        )
        check_int("attn_cfg.num_heads_kv", shape.num_heads_kv)
        check_int("attn_cfg.head_dim", shape.head_dim)
        check_int("attn_cfg.d_conv", shape.d_conv, low=0, high=8)
        check_int("attn_cfg.rotary_emb_dim", shape.rotary_emb_dim, low=0, high=shape.head_dim)
        _check_positive("attn_cfg.rotary_emb_base", shape.rotary_emb_base)
        if shape.softmax_scale is not None:
            _check_positive("attn_cfg.softmax_scale", shape.softmax_scale)
        if shape.num_heads % shape.num_heads_kv:
            raise ValueError(
                f"attn_cfg.num_heads_kv is {shape.num_heads_kv}, and must divide num_heads = {shape.num_heads}"
            )
        if shape.rotary_emb_dim % 2:
            raise ValueError(f"attn_cfg.rotary_emb_dim is {shape.rotary_emb_dim}, and must be even")
        return shape


def check_int(key: str, value: Any, low: int = 1, high: int = INT64) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        wanted = (
            f"an integer of at least {low} that int64 holds" if high == INT64 else f"an integer from {low} to {high}"
        )
        raise ValueError(f"{key} is {value!r}, and must be {wanted}")


def _check_positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not FLOAT32[0] <= value <= FLOAT32[1]:
        raise ValueError(
            f"{key} is {value!r}, and must be a finite number above 0 that float32 holds, "
            f"from {FLOAT32[0]:.3g} to {FLOAT32[1]:.3g}"
        )


def _read_limit(limit: Any) -> tuple[float, float]:
    """time_step_limit in any of its spellings; null and Infinity (as number, text or object) mean no limit."""
    if limit is None:
        return NO_LIMIT
    infinities = (None, "Infinity", "inf", {"__float__": "Infinity"})
    try:
        low, high = limit
        high = math.inf if high in infinities else high
        if isinstance(limit, str) or not all(type(v) in (int, float) for v in (low, high)):
            raise TypeError
        return float(low), float(high)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"time_step_limit is {limit!r}, and must be two numbers [low, high] or null") from error
