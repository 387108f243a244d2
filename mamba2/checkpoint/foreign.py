"""Configs of other projects: mamba-ssm's `config.json` (state-spaces' models) and mistral-inference's `params.json`.

mamba-ssm's keys map to ours as below. A missing key has the default of mamba-ssm's `Mamba2` class. mamba-ssm rounds the
vocabulary up to a multiple when it builds the model (50 277 to 50 288), and the tensors have the rounded size.
"""

import json
from pathlib import Path
from typing import Any

from mamba2.config import NO_LIMIT, Mamba2Config, check_int

# Key in mamba-ssm's ssm_cfg: our key, and the default
SSM_KEYS = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "chunk_size": ("chunk_size", 256),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "dt_limit": ("time_step_limit", NO_LIMIT),
}
# Keys for which only this value is implemented.
FIXED = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None}
# Keys about initialisation and speed, irrelevant for trained weights.
IGNORED = {"layer", "A_init_range", "conv_init", "use_mem_eff_path"}
# Fields of `MambaConfig`, then those that Hugging Face's tools add.
FIELDS = {"d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm"}
FIELDS |= {"residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"}
FIELDS |= {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
NORM_EPSILON = 1e-5  # fixed in mamba-ssm's code, not in its config
GPT_NEOX_IDS = 50277


def read_config(folder: Path) -> Mamba2Config:
    """The config of a model folder of any layout.

    Raises FileNotFoundError when there is none, ValueError naming the file and the key that is not supported.
    """
    own, params = folder / "config.json", folder / "params.json"
    file = params if params.is_file() and not own.is_file() else own
    if not file.is_file():
        return Mamba2Config.from_json(folder)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return Mamba2Config.from_json(file)  # raises the error that names what is wrong
    if not isinstance(values, dict) or not {"d_model", "dim"} & values.keys():
        return Mamba2Config.from_json(file)
    try:
        return from_mamba_ssm(values) if "d_model" in values else from_codestral(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def from_mamba_ssm(values: dict[str, Any]) -> Mamba2Config:
    """Our config from the fields of mamba-ssm's `MambaConfig`. Raises ValueError for what is not supported."""
    if unknown := sorted(values.keys() - FIELDS):
        raise ValueError(f"a config of mamba-ssm with keys that are not known: {', '.join(unknown)}")
    ssm = values.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise ValueError(f"ssm_cfg is {ssm!r}, and must be an object")
    if ssm.get("layer", "Mamba1") != "Mamba2":
        raise ValueError(f"ssm_cfg.layer is {ssm.get('layer', 'Mamba1')!r}, and only 'Mamba2' is implemented")
    for key, wanted in (("d_intermediate", 0), ("rms_norm", True)):
        if values.get(key) not in (None, wanted):
            raise ValueError(f"{key} is {values[key]!r}, and only {wanted!r} is implemented")
    for key, wanted in FIXED.items():
        if ssm.get(key, wanted) != wanted:
            raise ValueError(f"ssm_cfg.{key} is {ssm[key]!r}, and only {wanted!r} is implemented")
    if unknown := sorted(ssm.keys() - SSM_KEYS.keys() - FIXED.keys() - IGNORED):
        raise ValueError(f"ssm_cfg holds keys that are not known: {', '.join(unknown)}")
    missing = [key for key in ("d_model", "n_layer", "vocab_size") if key not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing from a config of mamba-ssm")
    ours = {key: ssm.get(theirs, default) for theirs, (key, default) in SSM_KEYS.items()}
    ids, multiple = values["vocab_size"], values.get("pad_vocab_size_multiple", 8)
    arithmetic = {key: values[key] for key in ("d_model", "n_layer", "vocab_size")}
    arithmetic |= {"pad_vocab_size_multiple": multiple, "ssm_cfg.headdim": ours["head_dim"]}
    for key, value in {**arithmetic, "ssm_cfg.expand": ours["expand"]}.items():
        check_int(key, value)
    attention = values.get("attn_layer_idx") or []
    eot = 0 if ids == GPT_NEOX_IDS else None
    return Mamba2Config(
        vocab_size=-(-ids // multiple) * multiple,
        hidden_size=values["d_model"],
        num_hidden_layers=values["n_layer"],
        num_heads=ours["expand"] * values["d_model"] // ours["head_dim"],
        residual_in_fp32=values.get("residual_in_fp32", True),
        tie_word_embeddings=values.get("tie_embeddings", True),
        layer_norm_epsilon=NORM_EPSILON,
        attn_layer_idx=attention,
        attn_cfg=(values.get("attn_cfg") or {}) if attention else {},
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
        **ours,
    ).with_weight_init("mamba_ssm")


def from_codestral(values: dict[str, Any]) -> Mamba2Config:
    """Our config from mistral-inference's `MambaArgs`. Its model is mamba-ssm's, with all other options at default."""
    missing = [key for key in ("dim", "n_layers", "vocab_size", "n_groups") if key not in values]
    if missing or values.get("model_type", "mamba") != "mamba":
        raise ValueError(
            f"not the parameters of a Mamba model: model_type {values.get('model_type')!r}, missing {missing}"
        )
    renamed = {"dim": "d_model", "n_layers": "n_layer"}
    theirs = {renamed.get(key, key): value for key, value in values.items() if key not in ("n_groups", "model_type")}
    theirs["ssm_cfg"] = {"layer": "Mamba2", "ngroups": values["n_groups"]}
    return from_mamba_ssm(theirs)


def to_mamba_ssm(config: Mamba2Config) -> dict[str, Any]:
    """The fields of mamba-ssm's `MambaConfig` for our config. Raises ValueError if the epsilon is not mamba-ssm's."""
    if config.layer_norm_epsilon != NORM_EPSILON:
        raise ValueError(
            f"layer_norm_epsilon is {config.layer_norm_epsilon}, and mamba-ssm's config cannot say other than 1e-05"
        )
    ssm = {theirs: getattr(config, key) for theirs, (key, _) in SSM_KEYS.items()}
    if config.time_step_limit == NO_LIMIT:
        del ssm["dt_limit"]
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **ssm},
        "attn_layer_idx": list(config.attn_layer_idx),
        "attn_cfg": config.attn_cfg,
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
