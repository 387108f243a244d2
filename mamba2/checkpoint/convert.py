"""Convert a model folder of any layout into one that transformers or mamba-ssm loads, or a file for llama.cpp."""

import json
import os
import shutil
from pathlib import Path

import torch

from mamba2.checkpoint.card import CARD, MARK
from mamba2.checkpoint.foreign import read_config, to_mamba_ssm
from mamba2.checkpoint.gguf import write_gguf
from mamba2.checkpoint.model_folder import read_model, write_model
from mamba2.checkpoint.weights import EMBEDDINGS
from mamba2.files import atomic_folder
from mamba2.model import SHAPES
from mamba2.tokenizer import Tokenizer, find_tokenizer, get_tokenizer, save_tokenizer
from mamba2.tokenizer_json import write_tokenizer_json

LAYOUTS = ("transformers", "mamba-ssm", "gguf")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str,
    tokenizer: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tokenizer | None:
    """Write the model of the folder `source` into the new folder `target`, stored in `dtype`; in the layout gguf into
    the new file `target`.

    Arguments: `layout` is one of LAYOUTS; `tokenizer` a name or a tokenizer.json, for a source without one.
    Returns the tokenizer, which is written too (for transformers as the tokenizer.json of its AutoTokenizer), or None.

    Raises FileExistsError when `target` exists, ValueError when the source is invalid or the layout cannot express it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose {', '.join(LAYOUTS)}")
    chosen = find_tokenizer(source) if tokenizer is None else get_tokenizer(tokenizer)
    config = read_config(Path(source))
    if layout != "mamba-ssm" and config.attn_layer_idx:
        raise ValueError(
            f"attn_layer_idx is {list(config.attn_layer_idx)}, and the Mamba-2 of {layout} has no layers of attention"
        )
    if chosen is not None and chosen.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer {chosen.name} has {chosen.vocab_size} ids and the model only {config.vocab_size} rows"
        )
    if layout == "gguf":
        write_gguf(Path(target), *read_model(source, SHAPES), chosen, dtype)
        return chosen
    with atomic_folder(target) as folder:
        if layout == "transformers":
            write_model(folder, *read_model(source, SHAPES, dtype), dtype)
            card = Path(source) / CARD
            if card.is_file() and MARK in card.read_text(encoding="utf-8"):  # it says how the model was trained
                shutil.copyfile(card, folder / CARD)
        else:
            theirs = to_mamba_ssm(config)
            tensors = read_model(source, SHAPES, dtype)[1]
            renamed = {key.replace(EMBEDDINGS, "backbone.embedding.weight"): t for key, t in tensors.items()}
            torch.save(renamed, folder / "pytorch_model.bin")
            (folder / "config.json").write_text(json.dumps(theirs, indent=4) + "\n", encoding="utf-8")
        if chosen is not None:
            save_tokenizer(chosen, folder)
            if layout == "transformers":
                write_tokenizer_json(chosen, folder)
    return chosen
