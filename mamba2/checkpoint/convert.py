"""Any layout that `read_model` takes, written as transformers or mamba-ssm read it."""

import json
import os
from pathlib import Path

import torch

from mamba2.checkpoint.foreign import read_config, to_mamba_ssm
from mamba2.checkpoint.model_folder import read_model, write_model
from mamba2.checkpoint.weights import EMBEDDINGS
from mamba2.files import atomic_folder
from mamba2.model import SHAPES
from mamba2.tokenizer import Tokenizer, find_tokenizer, get_tokenizer, save_tokenizer
from mamba2.tokenizer_json import write_tokenizer_json

LAYOUTS = ("transformers", "mamba-ssm")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str,
    tokenizer: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tokenizer | None:
    """Write the model of the folder `source` into the new folder `target`, whole or not at all.

    Arguments: `layout` is one of LAYOUTS; `tokenizer` a name or a tokenizer.json for a source that carries none.
    Returns the tokenizer that was written along, None if there is none. In transformers' layout that is a
    tokenizer.json for its AutoTokenizer.

    Raises FileExistsError when `target` exists, ValueError when the source, or what the layout can say, does not fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose {', '.join(LAYOUTS)}")
    chosen = find_tokenizer(source) if tokenizer is None else get_tokenizer(tokenizer)
    config = read_config(Path(source))
    if layout == "transformers" and config.attn_layer_idx:
        raise ValueError(
            f"attn_layer_idx is {list(config.attn_layer_idx)}, and transformers' Mamba2 has no layers of attention"
        )
    if chosen is not None and chosen.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer {chosen.name} has {chosen.vocab_size} ids and the model only {config.vocab_size} rows"
        )
    with atomic_folder(target) as folder:
        theirs = to_mamba_ssm(config) if layout == "mamba-ssm" else None
        config, tensors = read_model(source, SHAPES, dtype)
        if theirs is None:
            write_model(folder, config, tensors, dtype)
        else:
            renamed = {key.replace(EMBEDDINGS, "backbone.embedding.weight"): t for key, t in tensors.items()}
            torch.save(renamed, folder / "pytorch_model.bin")
            (folder / "config.json").write_text(json.dumps(theirs, indent=4) + "\n", encoding="utf-8")
        if chosen is not None:
            save_tokenizer(chosen, folder)
            if layout == "transformers":
                write_tokenizer_json(chosen, folder)
    return chosen
