"""Perplexity protocols against a loop over single tokens, and the identities between them."""

import functools
import math

import pytest
import torch

from mamba2.evaluation.perplexity import PROTOCOLS, encode_documents, evaluate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer
from tests.test_model import small_config

TEXTS = ["The first text.", "Another, a little longer than the first.", "x", "né ☃"]


@pytest.fixture(scope="module")
def model():
    return Mamba2LM(small_config(vocab_size=257, chunk_size=8), seed=4)


@pytest.fixture(scope="module")
def documents():
    return encode_documents(TEXTS, get_tokenizer("bytes"))


@functools.cache
def brute_force(model, ids: tuple[int, ...]) -> float:
    """Loss after the first id, one whole forward pass in front of each token."""
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            logits = model(torch.tensor([ids[:i]]))[0, -1].double()
            total -= torch.log_softmax(logits, dim=-1)[ids[i]].item()
    return total


def expected_nats(model, document: list[int], protocol: str, context: int) -> float:
    if protocol == "stateful":
        return brute_force(model, (256, *document))
    if protocol == "windows":
        return sum(brute_force(model, tuple(document[i : i + context])) for i in range(0, len(document), context))
    return brute_force(model, tuple(document))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_document_equals_a_loop_over_its_tokens(model, documents, protocol, batch_size):
    result = evaluate(model, get_tokenizer("bytes"), documents, protocol, context=10, batch_size=batch_size)
    scored = [d for d in documents if len(d) >= 2 or protocol == "stateful"]
    for measured, document in zip(result.documents, scored, strict=True):
        assert measured.nats == pytest.approx(expected_nats(model, document, protocol, 10), rel=1e-5)


def test_stateful_does_not_depend_on_the_window(model, documents):
    values = [
        evaluate(model, get_tokenizer("bytes"), documents, "stateful", context).nats_per_token
        for context in (1, 7, 512)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_quantities_follow_from_the_sums(model, documents):
    result = evaluate(model, get_tokenizer("bytes"), documents, "stateful", context=16)
    assert [d.bytes for d in result.documents] == [len(text.encode()) for text in TEXTS]
    assert [d.tokens for d in result.documents] == [len(text.encode()) for text in TEXTS]
    assert [d.words for d in result.documents] == [len(text.split()) for text in TEXTS]
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert 2**result.bits_per_byte == pytest.approx(result.perplexity)  # one token is one byte here
    nats, tokens = ([getattr(d, key) for d in result.documents] for key in ("nats", "tokens"))
    mean = sum(nats) / sum(tokens)
    squares = sum((s - mean * n) ** 2 for s, n in zip(nats, tokens))
    assert result.standard_error == pytest.approx(math.sqrt(4 / 3 * squares) / sum(tokens))


def test_hf_evaluate_is_the_mean_of_the_texts_perplexities(model, documents):
    result = evaluate(model, get_tokenizer("bytes"), documents, "hf_evaluate", context=512)
    assert len(result.documents) == 3  # one text has a single token
    expected = [math.exp(brute_force(model, tuple(d)) / (len(d) - 1)) for d in documents if len(d) > 1]
    assert result.perplexity == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert result.per_document == pytest.approx(expected, rel=1e-5)


def test_bad_input_is_one_sentence(model, documents):
    tokenizer = get_tokenizer("bytes")
    with pytest.raises(ValueError, match="protocol 'sliding' is unknown; choose stateful, windows"):
        evaluate(model, tokenizer, documents, "sliding", 10)
    with pytest.raises(ValueError, match="the id 256, outside the model's vocabulary of 61"):
        evaluate(Mamba2LM(small_config()), tokenizer, documents, "stateful", 10)
    with pytest.raises(ValueError, match="no document has the two tokens"):
        evaluate(model, tokenizer, [[5]], "windows", 10)
    with pytest.raises(ValueError, match="the data set is empty"):
        encode_documents(["", ""], tokenizer)


def test_a_limit_on_tokens_cuts_the_last_document():
    assert encode_documents(["abcd", "efgh", "ij"], get_tokenizer("bytes"), max_tokens=6) == [
        [97, 98, 99, 100],
        [101, 102],
    ]
