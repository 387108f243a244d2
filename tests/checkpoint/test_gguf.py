"""GGUF files read back by the `gguf` package; tests/peers runs them in llama.cpp."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from mamba2.checkpoint.__main__ import main
from mamba2.checkpoint.convert import convert
from mamba2.checkpoint.gguf import describe_tokenizer
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer
from mamba2.tokenizer_reader import LLAMA3_SPLIT, QWEN2_SPLIT
from tests.decoding.test_decoding import make_model
from tests.test_model import small_config
from tests.test_tokenizer_reader import GPT4O_SPLIT, added, split


def read(file) -> tuple[dict, dict]:
    """Values by key, and tensors by name, in numpy's shapes."""
    reader = GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def saved(folder, **changes) -> Mamba2LM:
    model = make_model(**changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("groups", "tied", "conv_bias"), [(1, True, True), (2, False, False), (8, False, True)])
def test_every_tensor_and_shape_key_is_in_the_file(tmp_path, groups, tied, conv_bias):
    model = saved(tmp_path / "a", n_groups=groups, tie_word_embeddings=tied, use_conv_bias=conv_bias)
    convert(tmp_path / "a", tmp_path / "deep/er/a.gguf", "gguf")
    keys, tensors = read(tmp_path / "deep/er/a.gguf")
    shape = {"conv_kernel": 4, "inner_size": 64, "state_size": 14, "time_step_rank": 8, "group_count": groups}
    expected = {f"mamba2.ssm.{key}": value for key, value in shape.items()}
    expected |= {"general.architecture": "mamba2", "mamba2.block_count": 3, "mamba2.embedding_length": 32}
    expected |= {"mamba2.vocab_size": 61, "tokenizer.ggml.model": "none", "mamba2.feed_forward_length": 0}
    assert expected.items() <= keys.items()
    assert math.isclose(keys["mamba2.attention.layer_norm_rms_epsilon"], 1e-5, rel_tol=1e-6)

    values = {name: torch.from_numpy(np.array(t.data)) for name, t in tensors.items()}
    ours = model.state_dict()
    assert len(values) == 2 + (not tied) + 9 * 3
    assert torch.equal(values["token_embd.weight"], ours["backbone.embeddings.weight"])
    assert torch.equal(values["output_norm.weight"], ours["backbone.norm_f.weight"])
    assert tied or torch.equal(values["output.weight"], ours["lm_head.weight"])
    for i, block in enumerate(model.backbone.layers):
        mixer = block.mixer
        bias = mixer.conv1d.bias if conv_bias else torch.zeros(model.config.conv_dim)
        layer = {"attn_norm.weight": block.norm.weight, "ssm_in.weight": mixer.in_proj.weight}
        layer |= {"ssm_conv1d.weight": mixer.conv1d.weight[:, 0], "ssm_conv1d.bias": bias, "ssm_dt.bias": mixer.dt_bias}
        layer |= {"ssm_a": mixer.A()[:, None], "ssm_d": mixer.D[:, None], "ssm_out.weight": mixer.out_proj.weight}
        layer |= {"ssm_norm.weight": mixer.norm.weight.view(groups, -1)}
        for name, tensor in layer.items():
            assert torch.equal(values[f"blk.{i}.{name}"], tensor), name


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_matrices_are_stored_in_half_precision_and_all_else_in_float32(tmp_path, name):
    dtype = getattr(torch, name)
    model = saved(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "a.gguf", "gguf", dtype=dtype)
    keys, tensors = read(tmp_path / "a.gguf")
    assert keys["general.file_type"] == {"float16": 1, "bfloat16": 32}[name]
    halves = {key for key, t in tensors.items() if t.tensor_type.name != "F32"}
    assert len(halves) == 2 + 2 * 3
    for key in halves:
        assert tensors[key].tensor_type.name == {"float16": "F16", "bfloat16": "BF16"}[name]
    stored = torch.from_numpy(np.array(tensors["blk.1.ssm_in.weight"].data)).view(dtype)
    assert torch.equal(stored, model.backbone.layers[1].mixer.in_proj.weight.to(dtype))
    assert tensors["blk.1.ssm_in.weight"].shape.tolist() == [32, model.config.d_in_proj]


def test_the_vocabulary_is_padded_to_the_rows_of_the_model(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "a", vocab_size=260)
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--to", "gguf", "--tokenizer", "bytes"]
    monkeypatch.setattr(sys, "argv", ["checkpoint", *arguments])
    main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.gguf'}, tokenizer bytes\n"
    keys, _ = read(tmp_path / "a.gguf")
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    assert keys["tokens"][254:] == ["þ", "ÿ", "<|endoftext|>", "[PAD257]", "[PAD258]", "[PAD259]"]
    assert keys["token_type"] == [1] * 256 + [3, 5, 5, 5] and len(set(keys["tokens"])) == 260
    assert (keys["model"], keys["pre"], keys["merges"]) == ("gpt2", "gpt-2", ["À Á"])
    assert keys["bos_token_id"] == keys["eos_token_id"] == 256
    assert not keys["add_bos_token"] and not keys["add_eos_token"]


def test_gpt_neox_has_its_merges_and_runs_of_spaces_that_are_found_before_them():
    pre, tokens, types, merges = describe_tokenizer(get_tokenizer("gpt-neox-20b"), 50280)
    assert pre == "gpt-2" and len(merges) == 50009 and merges[0] == "Ġ Ġ"
    assert len(set(tokens)) == len(types) == 50280
    assert list(zip(tokens, types))[:2] == [("<|endoftext|>", "CONTROL"), ("<|padding|>", "USER_DEFINED")]
    assert tokens[50254:50277] == [" " * n for n in range(24, 1, -1)]
    assert types[50254:] == ["USER_DEFINED"] * 23 + ["UNUSED"] * 3


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias is True, and llama.cpp's Mamba-2 has no bias"),
        ({"time_step_limit": (0.0, 0.5)}, r"time_step_limit is \[0.0, 0.5\], and llama.cpp's Mamba-2 has no limits"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, and llama.cpp has at most 3"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True}}, r"attn_layer_idx is \[1\], and the"),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_refused_by_name(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("mamba2.checkpoint.gguf.MOST_LAYERS", 3)
    Mamba2LM(small_config(n_groups=1, **changes)).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a", tmp_path / "a.gguf", "gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_an_existing_file_and_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight[1, 2] = 70000
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"blk.0.ssm_out.weight holds NaN or infinity in float16"):
        convert(tmp_path / "a", tmp_path / "a.gguf", "gguf", dtype=torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    convert(tmp_path / "a", tmp_path / "a.gguf", "gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(FileExistsError, match="exists already and is not overwritten"):
        convert(tmp_path / "a", tmp_path / "a.gguf", "gguf")
    assert (tmp_path / "a.gguf").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path / "a")
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", lambda self: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        convert(tmp_path / "a", tmp_path / "a.gguf", "gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def description() -> dict:
    """A tokenizer.json with bytes, one merge and an end-of-text token."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"ab": 256}
    library = Library(models.BPE(vocabulary, [("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return json.loads(library.to_str()) | {"added_tokens": [added(257, "<|endoftext|>", special=True)]}


def test_of_a_tokenizer_that_normalises_text_it_is_said_that_llama_cpp_does_not(
    tmp_path, monkeypatch, capsys, description
):
    saved(tmp_path / "a", vocab_size=270)
    description["normalizer"] = {"type": "NFC"}
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(description))
    monkeypatch.setattr(
        sys, "argv", ["checkpoint", "convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "gguf"]
    )
    main()
    assert "llama.cpp does not normalise text: it finds the ids of this tokenizer for text that is in NFC" in (
        capsys.readouterr().out
    )


def convert_with(folder, description: dict) -> dict:
    """The keys of a tiny model's file with this tokenizer.json."""
    Mamba2LM(small_config(vocab_size=270)).save_pretrained(folder / "a")
    (folder / "a/tokenizer.json").write_text(json.dumps(description))
    convert(folder / "a", folder / "a.gguf", "gguf")
    return read(folder / "a.gguf")[0]


@pytest.mark.parametrize(("pattern", "pre"), [(None, "gpt-2"), (QWEN2_SPLIT, "qwen2"), (LLAMA3_SPLIT, "dbrx")])
def test_a_tokenizer_json_keeps_its_merges_and_the_name_of_its_split(tmp_path, description, pattern, pre):
    if pattern:
        description["pre_tokenizer"] = split(pattern)
    description["model"]["merges"] = [["a", "b"], ["b", "a"], "a b"]
    description["model"]["vocab"] |= {"ba": 258, "ab": 259, "<|endoftext|>": 260}
    description["added_tokens"] = [added(260, "<|endoftext|>", special=True), added(261, "   ")]
    keys = convert_with(tmp_path, description)
    assert keys["tokenizer.ggml.pre"] == pre
    assert keys["tokenizer.ggml.merges"] == ["b a", "a b"]  # the last of two counts
    assert keys["tokenizer.ggml.tokens"][255:263] == [
        "Ń",
        "[PAD256]",
        "[PAD257]",
        "ba",
        "ab",
        "<|endoftext|>",
        "   ",
        "[PAD262]",
    ]
    assert keys["tokenizer.ggml.token_type"][255:263] == [1, 5, 5, 1, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(pre_tokenizer=split(GPT4O_SPLIT)),
            "splits text by .* and llama.cpp knows the splits of GPT-2",
        ),
        (lambda d: d["model"].update(ignore_merges=True), "has ignore_merges true"),
        (lambda d: d["added_tokens"].append(added(258, "<x>")), "has the added token '<x>', and llama.cpp finds other"),
        (lambda d: d["added_tokens"].append(added(258, " \n")), r"has the added token ' \\n', and"),
        (
            lambda d: d["added_tokens"].extend([added(258, "  "), added(259, "   ", normalized=True)]),
            "finds some added tokens before it normalises text and others after",
        ),
        (
            lambda d: d["added_tokens"].append(added(258, "<|message|>", special=True)),
            r"has the special token '<\|message\|>', which llama.cpp finds in text",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_by_name(tmp_path, description, change, message):
    change(description)
    with pytest.raises(ValueError, match=f"tokenizer .*tokenizer.json {message}"):
        convert_with(tmp_path, description)
    assert not (tmp_path / "a.gguf").exists()
