"""Model folders: `model.safetensors` (float32) beside `config.json`, in the layout of `transformers.Mamba2ForCausalLM`.

    backbone.embeddings.weight                        (v, d)
    backbone.layers.N.norm.weight                     (d,)
    backbone.layers.N.mixer.in_proj.weight            (2 d_inner + 2 g n + h, d)     rows: z, x, B, C, dt
    backbone.layers.N.mixer.conv1d.{weight, bias}     (d_inner + 2 g n, 1, K), (d_inner + 2 g n,)
    backbone.layers.N.mixer.{dt_bias, A_log, D}       (h,)
    backbone.layers.N.mixer.norm.weight               (d_inner,)
    backbone.layers.N.mixer.out_proj.weight           (d, d_inner)
    backbone.norm_f.weight                            (d,)
    lm_head.weight                                    (v, d), left out when tied to the embeddings

The file appears whole or not at all, and config.json after it.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mamba2.checkpoint.files import flush, save_tensors
from mamba2.config import Mamba2Config

WEIGHTS = "model.safetensors"
EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"
# Wrappers that put their own name in front of every key: torch.compile, DistributedDataParallel.
PREFIXES = ("_orig_mod.", "module.", "model.")


def read_model(path: str | os.PathLike) -> tuple[Mamba2Config, dict[str, torch.Tensor]]:
    """Read a model folder: config, and the tensors in float32 under the names above (lm_head also when tied).

    Accepts the spelling `backbone.embedding.weight` and keys under `_orig_mod.`, `module.` or `model.`.

    Raises FileNotFoundError when the folder or a file is missing, ValueError naming the file when it is damaged or
    does not hold exactly the tensors, in the shapes, that the config asks for.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder at {path}")
    config = Mamba2Config.from_json(path)
    file = path / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {path}")
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                tensors[_our_name(key)] = opened.get_tensor(key).to(torch.float32)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file, perhaps cut short: {error}") from error
    if config.tie_word_embeddings and EMBEDDINGS in tensors:
        tensors[HEAD] = tensors[EMBEDDINGS]
    _check_tensors(file, config, tensors)
    return config, tensors


def write_model(path: str | os.PathLike, config: Mamba2Config, tensors: dict[str, torch.Tensor]) -> Path:
    """Write `tensors` (a Mamba2LM's state_dict) and `config` into the folder `path`, made if absent. Returns it.

    Raises OSError naming the file when it cannot be written; what was there before is then still there.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    stored = {
        key: tensor.detach().to("cpu", torch.float32).contiguous()
        for key, tensor in tensors.items()
        if not (config.tie_word_embeddings and key == HEAD)
    }
    temporary = path / f".{WEIGHTS}.{os.getpid()}.tmp"
    try:
        save_tensors(temporary, stored, metadata={"format": "pt"})
        flush(temporary)
        os.replace(temporary, path / WEIGHTS)
    except OSError as error:
        raise OSError(f"cannot write {path / WEIGHTS}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    config.save(path)
    return path


def _our_name(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return EMBEDDINGS if key == "backbone.embedding.weight" else key


def _check_tensors(file: Path, config: Mamba2Config, tensors: dict[str, torch.Tensor]) -> None:
    wanted = tensor_shapes(config)
    problems = [
        f"{word} {', '.join(sorted(keys))}"
        for word, keys in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys()))
        if keys
    ]
    problems += [
        f"{key} has shape {tuple(tensor.shape)} instead of {wanted[key]}"
        for key, tensor in tensors.items()
        if key in wanted and tuple(tensor.shape) != wanted[key]
    ]
    if problems:
        raise ValueError(f"{file} does not fit its config.json: {'; '.join(problems)}")


def tensor_shapes(config: Mamba2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, lm_head included when tied."""
    d, h, inner = config.hidden_size, config.num_heads, config.d_inner
    shapes = {EMBEDDINGS: (config.vocab_size, d), "backbone.norm_f.weight": (d,), HEAD: (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        layer = f"backbone.layers.{i}."
        shapes[layer + "norm.weight"] = (d,)
        shapes[layer + "mixer.in_proj.weight"] = (config.d_in_proj, d)
        shapes[layer + "mixer.conv1d.weight"] = (config.conv_dim, 1, config.conv_kernel)
        shapes[layer + "mixer.norm.weight"] = (inner,)
        shapes[layer + "mixer.out_proj.weight"] = (d, inner)
        for name in ("dt_bias", "A_log", "D"):
            shapes[layer + "mixer." + name] = (h,)
        if config.use_conv_bias:
            shapes[layer + "mixer.conv1d.bias"] = (config.conv_dim,)
        if config.use_bias:
            shapes[layer + "mixer.in_proj.bias"] = (config.d_in_proj,)
            shapes[layer + "mixer.out_proj.bias"] = (d,)
    return shapes
