"""llama.cpp runs our GGUF files: its logits, tokens and greedy generation are ours. `make test-peers` installs it."""

import json
import random
import sysconfig
import unicodedata
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch

from mamba2.checkpoint.convert import convert
from mamba2.config import Mamba2Config
from mamba2.generate import generate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer
from mamba2.tokenizer_reader import LLAMA3_SPLIT, QWEN2_SPLIT
from tests.decoding.test_decoding import make_model
from tests.test_model import relative_error
from tests.test_tokenizer import random_texts
from tests.test_tokenizer_reader import description, split, texts, trained  # noqa: F401

CONFIGS = Path(__file__).parents[2] / "configs"
ODD = {"hidden_size": 31, "expand": 3, "head_dim": 31, "num_heads": 3, "n_groups": 3, "vocab_size": 67}
# Relative error at the worst position. Measured: 1.2e-6, 6e-3 and 3.3e-2, two thirds of it from rounding the weights.
PRECISION = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def load(file: Path, **options) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(file), verbose=False, n_threads=1, n_gpu_layers=0, **options)


def convert_and_load(model: Mamba2LM, folder: Path, dtype=torch.float32, tokenizer: str | None = None):
    model.save_pretrained(folder / "a")
    convert(folder / "a", folder / "a.gguf", "gguf", tokenizer, dtype)
    return load(folder / "a.gguf", logits_all=True, n_ctx=512, n_batch=64)


def their_logits(theirs: llama_cpp.Llama, ids: list[int]) -> torch.Tensor:
    """At every position, (length, vocab)."""
    theirs.reset()
    theirs.eval(ids)
    return torch.from_numpy(np.array(theirs.scores[: len(ids)]))


def assert_equal_logits(ours: Mamba2LM, theirs: llama_cpp.Llama, dtype: torch.dtype, lengths=(1, 2, 37, 150)) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(ours.config.vocab_size, (1, length), generator=generator)
        with torch.no_grad():
            expected = ours(ids)[0]
        actual = their_logits(theirs, ids[0].tolist())
        assert actual.shape == expected.shape
        for position in range(length):
            assert relative_error(actual[position], expected[position]) < PRECISION[dtype], (length, position)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    "changes",
    [{"n_groups": 1, "tie_word_embeddings": True}, {"n_groups": 2}, {"n_groups": 8, "tie_word_embeddings": True}, ODD],
)
def test_logits_at_every_position_are_ours(tmp_path, changes, dtype):
    ours = make_model(**changes)
    assert_equal_logits(ours, convert_and_load(ours, tmp_path, dtype), dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_conv_bias": False},
        *({"conv_kernel": kernel} for kernel in (1, 2, 3, 8)),
        *({"state_size": size} for size in (1, 3, 16, 128, 200)),
        {"head_dim": 1, "num_heads": 64},
        {"head_dim": 64, "num_heads": 1, "n_groups": 1},
        ODD,
        {"hidden_size": 8, "expand": 1, "num_heads": 1, "n_groups": 1},
        {"layer_norm_epsilon": 1e-2},
        {"num_hidden_layers": 1, "vocab_size": 3},
        {"residual_in_fp32": False},
    ],
    ids=str,
)
def test_every_shape_that_is_converted_has_our_logits(tmp_path, changes):
    ours = make_model(**changes)
    assert_equal_logits(ours, convert_and_load(ours, tmp_path), torch.float32, lengths=(1, 37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_of_40_million_parameters_has_our_logits(tmp_path, dtype):
    ours = Mamba2LM(Mamba2Config.from_json(CONFIGS / "config.json"), seed=1)
    theirs = convert_and_load(ours, tmp_path, dtype)
    assert_equal_logits(ours, theirs, dtype, lengths=(1, 100))


def test_greedy_generation_is_ours(tmp_path):
    ours = make_model(vocab_size=257)
    theirs = convert_and_load(ours, tmp_path, tokenizer="bytes")
    for prompt in ("def main", "é\n\n", "😀 "):
        ids = get_tokenizer("bytes").encode(prompt)
        expected = generate(ours, torch.tensor([ids]), 40, temperature=0.0)[0].tolist()
        theirs.reset()
        actual = [token for token, _ in zip(theirs.generate(ids, temp=0.0, repeat_penalty=1.0), range(40))]
        assert ids + actual == expected


# ---------------------------------------------------------------------------------------------------------- tokenizers


def samples() -> list[str]:
    """Random text, code, and every character that Unicode has, a few hundred at a time."""
    generator = random.Random(1)
    code = [Path(sysconfig.get_paths()["stdlib"], name).read_text(encoding="utf-8") for name in ("ast.py", "string.py")]
    characters = [chr(c) for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    every = ["".join(characters[i : i + 500]) for i in range(0, len(characters), 500)]
    mixed = ["".join(chr(generator.randint(1, 0x2FFF)) for _ in range(20)) for _ in range(500)]
    runs = [f"x{' ' * n}y{' ' * n}" for n in range(60)] + ["\t" * n + "z\n" * n for n in range(5)]
    return [*random_texts(2000), *texts(1, 1000), *code, *mixed, *runs, *every, "", "<|endoftext|>", "a\0b"]


def assert_equal_tokens(ours, theirs: llama_cpp.Llama, samples: list[str]) -> None:
    for k, text in enumerate(samples):
        text = unicodedata.normalize("NFC", text) if ours.nfc else text
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == ours.encode(text), ascii(text)
        assert k > 1000 or theirs.detokenize(ids, special=True) == text.encode(), ascii(text)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_llama_cpp_gives_text_the_ids_of_our_tokenizers(tmp_path, name):
    ours = get_tokenizer(name)
    model = make_model(vocab_size=ours.vocab_size + 3, hidden_size=8, num_heads=2, n_groups=1, num_hidden_layers=1)
    theirs = convert_and_load(model, tmp_path, tokenizer=name)
    assert theirs.n_vocab() == ours.vocab_size + 3 and theirs.token_eos() == ours.eot_id
    assert theirs.tokenize(b"<|endoftext|>", add_bos=True, special=True) == [ours.eot_id]
    assert_equal_tokens(ours, theirs, samples())


@pytest.mark.parametrize("pattern", [None, LLAMA3_SPLIT, QWEN2_SPLIT])
def test_llama_cpp_gives_text_the_ids_of_a_trained_tokenizer_json(tmp_path, description, pattern):  # noqa: F811
    if pattern:
        description["pre_tokenizer"] = split(pattern)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    ours = get_tokenizer(tmp_path)
    model = make_model(vocab_size=ours.vocab_size, num_hidden_layers=1)
    theirs = convert_and_load(model, tmp_path, tokenizer=str(tmp_path))
    assert_equal_tokens(ours, theirs, samples())
