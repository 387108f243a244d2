"""One file for llama.cpp: GGUF in its architecture `mamba2`, with the tokenizer.

Names, shapes and keys are those that llama.cpp reads in src/models/mamba2.cpp, and what is refused is what its
src/models/mamba-base.cpp (the layer) and src/llama-vocab.cpp (the tokenizer) do not compute; read in the version that
llama-cpp-python 0.3.36 carries.
"""

import json
from pathlib import Path
from typing import Any

import torch

from mamba2.checkpoint.weights import EMBEDDINGS, HEAD
from mamba2.config import NO_LIMIT, Mamba2Config
from mamba2.files import atomic_file
from mamba2.tokenizer import Tokenizer
from mamba2.tokenizer_json import describe
from mamba2.tokenizer_reader import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT

MODEL = {EMBEDDINGS: "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight", HEAD: "output.weight"}
LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_out.weight")
MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
CONTEXT = 2**20  # a default for programs that ask; the state has one size at every length

# llama.cpp does not read regular expressions: it knows these under the names of models that use them.
SPLITS = {GPT2_SPLIT: "gpt-2", QWEN2_SPLIT: "qwen2", LLAMA3_SPLIT: "dbrx"}
# Special tokens of OpenAI's models, which llama.cpp finds in text whatever the file says.
FOUND_IN_TEXT = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>"}
# llama.cpp wants merges, and GGUF's writer writes no empty list: one of two bytes that UTF-8 does not have.
NO_MERGES = ["\u00c0 \u00c1"]


def write_gguf(
    file: Path,
    config: Mamba2Config,
    tensors: dict[str, torch.Tensor],
    tokenizer: Tokenizer | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `tensors` (a Mamba2LM's state_dict, float32) into the new `file`, matrices in `dtype`, all else in float32.

    Without a tokenizer llama.cpp runs the model on ids. Raises FileExistsError, and ValueError naming what llama.cpp
    cannot run or `dtype` cannot hold.
    """
    import gguf

    if file.exists():
        raise FileExistsError(f"{file} exists already and is not overwritten; remove it, or choose another place")
    _check_model(config)
    writer = gguf.GGUFWriter(None, "mamba2")
    writer.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        pre, tokens, types, merges = describe_tokenizer(tokenizer, config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([int(gguf.TokenType[kind]) for kind in types])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(tokenizer.eot_id)
        writer.add_eos_token_id(tokenizer.eot_id)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
    for name, tensor in rename_tensors(config, tensors).items():
        stored = tensor.to(dtype if name.endswith(MATRICES) else torch.float32).contiguous()
        if not torch.stack(stored.aminmax()).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity in {str(stored.dtype).removeprefix('torch.')}")
        if stored.dtype == torch.bfloat16:  # which numpy does not have
            writer.add_tensor(name, stored.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, stored.numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _check_model(config: Mamba2Config) -> None:
    """Raise ValueError naming what llama.cpp's layer does not have."""
    if config.use_bias:
        raise ValueError("use_bias is True, and llama.cpp's Mamba-2 has no bias in in_proj and out_proj")
    if config.time_step_limit != NO_LIMIT:
        raise ValueError(
            f"time_step_limit is {list(config.time_step_limit)}, and llama.cpp's Mamba-2 has no limits of dt: only "
            f"{list(NO_LIMIT)} can be converted"
        )
    if config.num_hidden_layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, and llama.cpp has at most {MOST_LAYERS}")


def rename_tensors(config: Mamba2Config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under llama.cpp's names and in its shapes. A tied head is left out: it takes the embeddings then."""
    renamed = {name: tensors[key] for key, name in MODEL.items() if key != HEAD or not config.tie_word_embeddings}
    for layer in range(config.num_hidden_layers):
        for key, name in LAYER.items():
            tensor = tensors.get(f"backbone.layers.{layer}.{key}")
            if key == "mixer.conv1d.weight":
                tensor = tensor.squeeze(1)  # (d_inner + 2 g n, K)
            elif key == "mixer.conv1d.bias" and tensor is None:
                tensor = torch.zeros(config.conv_dim)  # without use_conv_bias: llama.cpp always adds one
            elif key == "mixer.A_log":
                tensor = -tensor.exp().unsqueeze(1)  # (h, 1)
            elif key == "mixer.D":
                tensor = tensor.unsqueeze(1)  # (h, 1)
            elif key == "mixer.norm.weight":
                tensor = tensor.unflatten(0, (config.n_groups, -1))  # (g, d_inner / g)
            renamed[f"blk.{layer}.{name}"] = tensor
    return renamed


def describe_tokenizer(tokenizer: Tokenizer, rows: int) -> tuple[str, list[str], list[str], list[str]]:
    """What llama.cpp's byte-level BPE needs: the name of its split, and token, type and merges of a vocabulary of
    `rows` ids. Without parsing special tokens it then gives NFC text the ids that `tokenizer` gives.

    Raises ValueError naming what it would do otherwise.
    """
    file = tokenizer.file
    description = json.loads(file.read_text(encoding="utf-8")) if file else describe(tokenizer)
    model, added = description["model"], description.get("added_tokens", [])
    # Of pairs that are there twice the last one counts, as in the tokenizers library; in llama.cpp it is the first.
    places = {pair if isinstance(pair, str) else " ".join(pair): i for i, pair in enumerate(model["merges"])}
    merges = sorted(places, key=places.__getitem__)
    pre = SPLITS.get(tokenizer.pattern) if merges else "gpt-2"  # without merges it does not matter where pieces end
    why = None
    if pre is None:
        why = f"splits text by {tokenizer.pattern!r}, and llama.cpp knows the splits of GPT-2, Llama 3 and Qwen 2"
    elif model.get("ignore_merges"):
        why = "has ignore_merges true, which llama.cpp has for some names of models only; false can be converted"
    elif file and (problem := _wrong_added_token(added)):
        why = problem
    if why:
        raise ValueError(f"tokenizer {tokenizer.name} {why}")
    texts = {i: text for text, i in model["vocab"].items()} | {token["id"]: token["content"] for token in added}
    kinds = {token["id"]: "CONTROL" for token in added} | dict.fromkeys(tokenizer.extra.values(), "USER_DEFINED")
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [kinds.get(i, "NORMAL" if i in texts else "UNUSED") for i in range(rows)]
    return pre, tokens, types, merges or NO_MERGES


def _wrong_added_token(added: list[dict[str, Any]]) -> str | None:
    """What of the added tokens of a file llama.cpp finds in text otherwise. It takes out the longest token first,
    wherever it is, the tokenizers library the one that begins first: for runs of one character they are the same."""
    plain = [token for token in added if not token.get("special")]
    for token in plain:
        content = token["content"].encode()
        if not content.isspace() or len(set(content)) > 1:
            return (
                f"has the added token {token['content']!r}, and llama.cpp finds other tokens in text than this one's "
                "rules do, unless they are special or runs of one white-space character"
            )
    if len({token.get("normalized", False) for token in plain}) > 1:
        return "finds some added tokens before it normalises text and others after, and llama.cpp all at once"
    if found := sorted(FOUND_IN_TEXT & {token["content"] for token in added}):
        return f"has the special token {found[0]!r}, which llama.cpp finds in text"
    return None
