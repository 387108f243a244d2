"""Every protocol against an implementation of its own kind, and the identities between them."""

import functools
import importlib.util
import math
from pathlib import Path

import datasets
import lm_eval
import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import Mamba2ForCausalLM

from mamba2.evaluation.corpus import Corpus, detokenize, load_corpus
from mamba2.evaluation.perplexity import PROTOCOLS, evaluate, plan
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer
from tests.test_model import small_config

BYTES = get_tokenizer("bytes")
TEXTS = ["The first text.", "Another, a little longer than the first.", "x", "né ☃"]
LINES = [
    "",
    " = First Title = \n",
    "",
    ' He said " it is 3 @,@ 000 kg " ( or 2 @.@ 5 ) ; then left . \n',
    " = = Part = = \n",
    "",
    " Some one 's words : well @-@ known , J. N Smith ! \n",
    "",
    " = Second = \n",
    "",
    " A line at 30 ° C [ sic ] , ' quoted ' { x } ? \n",
]


@pytest.fixture(scope="module")
def ours():
    return Mamba2LM(small_config(vocab_size=257, chunk_size=8), seed=4)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """The same model in transformers."""
    return Mamba2ForCausalLM.from_pretrained(ours.save_pretrained(tmp_path_factory.mktemp("model"))).eval()


@pytest.fixture(scope="module")
def score(ours):
    return functools.partial(evaluate, ours, BYTES)


def corpus(texts=TEXTS) -> Corpus:
    return Corpus([[text] for text in texts], "texts", None, "test", "1")


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory):
    """A folder laid out as the hub's."""
    folder = tmp_path_factory.mktemp("data") / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": LINES})
    rows.to_parquet(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    return load_corpus(str(folder), "test", "wikitext-2-raw-v1")


@functools.cache
def brute_force(model, ids: tuple[int, ...]) -> float:
    """Loss after the first id, one whole forward pass in front of each token."""
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            logits = model(torch.tensor([ids[:i]]))[0, -1].double()
            total -= torch.log_softmax(logits, dim=-1)[ids[i]].item()
    return total


@torch.no_grad()
def transformers_nats(model, ids: list[int], labels: list[int]) -> tuple[float, int]:
    """(sum, number of tokens) that transformers computes from labels, -100 where they do not count."""
    output = model(torch.tensor([ids]), labels=torch.tensor([labels]))
    count = sum(label != -100 for label in labels[1:])
    return output.loss.item() * count, count


@pytest.mark.parametrize(("context", "batch_size"), [(10, 1), (10, 3), (1, 4), (512, 4)])
def test_stateful_equals_a_loop_over_single_tokens(score, ours, context, batch_size):
    result = score(corpus(), "stateful", context, batch_size)
    for measured, text in zip(result.documents, TEXTS, strict=True):
        assert measured.nats == pytest.approx(brute_force(ours, (256, *text.encode())), rel=1e-5)


def test_windows_equal_transformers(score, theirs):
    result = score(corpus(), "windows", 10, 2)
    for measured, text in zip(result.documents, TEXTS, strict=True):
        ids = list(text.encode())
        windows = [ids[i : i + 10] for i in range(0, len(ids), 10)]
        sums = [transformers_nats(theirs, w, w) for w in windows if len(w) > 1]
        assert measured.tokens == sum(count for _, count in sums)
        assert measured.nats == pytest.approx(sum(nats for nats, _ in sums), rel=1e-5)


@pytest.mark.parametrize("stride", [2, 7, 20])
def test_strided_equals_the_published_rule(score, theirs, wikitext, stride):
    """The loop of transformers' documentation on perplexity, with every token counted once."""
    length, ids = 20, list("\n\n".join(LINES).encode())
    nats, tokens, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        new = end - previous_end
        part = ids[begin:end]
        labels = [-100] * (len(part) - new) + part[len(part) - new :]
        value, count = transformers_nats(theirs, part, labels)
        nats, tokens, previous_end = nats + value, tokens + count, end
        if end == len(ids):
            break
    result = score(wikitext, "strided", length, 16, stride)
    assert sum(d.tokens for d in result.documents) == tokens
    assert sum(d.nats for d in result.documents) == pytest.approx(nats, rel=1e-5)
    assert result.interval.clusters == 2  # articles, not lines


def test_a_strided_token_belongs_to_the_line_in_which_it_begins(score, wikitext):
    result = score(wikitext, "strided", 500, 1, 1)
    lengths = [len(line.encode()) + 2 for line in LINES]
    lengths[0] -= 1  # the very first token has nothing before it
    lengths[-1] -= 2
    assert [d.tokens for d in result.documents] == [d.bytes for d in result.documents] == lengths


def harness():
    """lm-evaluation-harness' wikitext task, without what its package would import."""
    file = Path(lm_eval.__file__).parent / "tasks/wikitext/preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("context", [8, 1024])
def test_lm_eval_equals_the_harness(score, theirs, wikitext, context):
    """Its own page rule, windows, detokenizer and counts; log-likelihoods by transformers."""
    task, log_likelihood, words, n_bytes = harness(), 0.0, 0, 0
    for page in wikitext.pages():
        doc = {"page": page}
        ids = list(task.wikitext_detokenizer(doc).encode())
        windows = get_rolling_token_windows(ids, prefix_token=256, max_seq_len=context, context_len=1)
        for left, predicted in map(make_disjoint_window, windows):
            inputs = (left + predicted)[:-1]
            with torch.no_grad():
                logits = theirs(torch.tensor([inputs])).logits[0, -len(predicted) :].double()
            log_likelihood += logits.log_softmax(-1)[range(len(predicted)), predicted].sum().item()
        counted = task.process_results(doc, (0.0,))
        words, n_bytes = words + counted["word_perplexity"][1], n_bytes + counted["bits_per_byte"][1]
    result = score(wikitext, "lm_eval", context, 3)
    assert result.word_perplexity == pytest.approx(math.exp(-log_likelihood / words), rel=1e-5)
    assert result.byte_perplexity == pytest.approx(math.exp(-log_likelihood / n_bytes), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(-log_likelihood / n_bytes / math.log(2), rel=1e-5)


def test_pages_are_those_of_the_raw_file(wikitext):
    """The file has a space where the hub's rows are empty, and ends with a line break."""
    raw = "".join(line or " \n" for line in LINES)
    assert "\n".join(wikitext.pages()) == raw.removeprefix(" \n")
    assert [page.splitlines()[0] for page in wikitext.pages()] == [" = First Title = ", " = Second = "]


def test_detokenizing_follows_the_harness():
    pages = [
        "".join(LINES),
        " = = = = Deep = = = = \n = = = x = = = \n",
        "boys ' /' 9/ ( a ( b ) ) \" c \" { d } '  e '",
    ]
    for page in pages:
        assert detokenize(page) == harness().wikitext_detokenizer({"page": page})
        assert detokenize(page) != page


def test_hf_evaluate_is_the_mean_of_the_lines_perplexities(score, ours, wikitext):
    result = score(corpus(), "hf_evaluate", 512)
    expected = [math.exp(brute_force(ours, tuple(t.encode())) / (len(t.encode()) - 1)) for t in TEXTS if len(t) > 1]
    assert len(expected) == 3  # one text has a single token
    assert result.per_document == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert result.interval.mean == pytest.approx(result.perplexity)
    lines = score(wikitext, "hf_evaluate", 512)
    assert len(lines.documents) == sum(len(line) > 1 for line in LINES) and lines.interval.clusters == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_depends_on_the_batch_size(score, wikitext, protocol):
    results = [score(wikitext, protocol, 12, size) for size in (1, 3, 64)]
    for other in results[1:]:
        assert [d.tokens for d in other.documents] == [d.tokens for d in results[0].documents]
        nats = [[d.nats for d in result.documents] for result in (results[0], other)]
        assert nats[1] == pytest.approx(nats[0], rel=1e-5)


def test_quantities_follow_from_the_sums(score):
    result = score(corpus(), "stateful", context=16)
    lengths = [len(text.encode()) for text in TEXTS]
    assert [d.bytes for d in result.documents] == [d.tokens for d in result.documents] == lengths
    assert [d.words for d in result.documents] == [len(text.split()) for text in TEXTS]
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert result.byte_perplexity == pytest.approx(2**result.bits_per_byte) == pytest.approx(result.perplexity)
    assert result.word_perplexity == pytest.approx(result.perplexity ** (sum(lengths) / 13))
    summary = result.summary()
    assert summary["nats_per_token"] == sum(summary["documents"]["nats"]) / summary["tokens"]
    assert summary["interval_95"][0] < summary["nats_per_token"] < summary["interval_95"][1]
    single = score(corpus(TEXTS[:1]), "stateful", context=16).summary()
    assert single["interval_95"] == [None, None] and single["standard_error"] is None


def test_bytes_are_those_behind_the_scored_tokens():
    """GPT-NeoX normalises, and its tokens are several bytes long."""
    neox = get_tokenizer("gpt-neox-20b")
    text = "café    naïve ☃"
    for protocol, missing in (("stateful", 0), ("windows", len(neox.decode_bytes(neox.encode(text)[:1])))):
        _, losses = plan(corpus([text]), neox, protocol, 1024)
        assert losses[0].bytes == len(text.encode()) - missing


def test_bad_input_is_one_sentence(score):
    with pytest.raises(ValueError, match="protocol 'sliding' is unknown; choose stateful, windows"):
        score(corpus(), "sliding", 10)
    with pytest.raises(ValueError, match="the id 256, outside the model's vocabulary of 61"):
        evaluate(Mamba2LM(small_config()), BYTES, corpus(), "stateful", 10)
    with pytest.raises(ValueError, match="no document has the two tokens"):
        score(corpus(["x"]), "windows", 10)
    with pytest.raises(ValueError, match="stride is 11, and must be from 1 to the context of 10"):
        score(corpus(), "strided", 10, stride=11)


def test_a_corpus_says_what_it_is(wikitext, tmp_path):
    assert wikitext.config == "wikitext-2-raw-v1" and wikitext.label.endswith("wikitext:wikitext-2-raw-v1, test")
    (tmp_path / "a.txt").write_text("text")
    plain = load_corpus(str(tmp_path / "a.txt"), "train", "wikitext-2-raw-v1")
    assert plain.config is None and plain.texts() == ["text"] and plain.revision
    for row, message in (
        ('{"text": ""}', "the data set is empty"),
        ('{"input_ids": [1, 2]}', "holds ids and not text"),
    ):
        (tmp_path / "b.jsonl").write_text(row + "\n")
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / "b.jsonl"), "train")


def test_a_limit_on_tokens_cuts_the_last_document_at_a_character(wikitext):
    assert corpus(["abcd", "ef☃gh", "ij"]).first_tokens(BYTES, 8).documents == [["abcd"], ["ef"]]
    cut = wikitext.first_tokens(BYTES, 30)
    assert "".join(cut.texts()) == "".join(LINES)[:30] and len(cut.documents[0]) == 2
