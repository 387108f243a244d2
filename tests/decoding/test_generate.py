"""Generation: what is drawn and how often, what is printed and when it ends."""

import argparse
import io
import sys

import pytest
import torch
from scipy.stats import chi2
from transformers import Mamba2ForCausalLM
from transformers.generation import logits_process

import eval as evaluation_script
from mamba2 import decoding
from mamba2 import generate as command
from mamba2.decoding.compiled import CompiledDecoder
from mamba2.decoding.sampling import Sampling
from mamba2.generate import TextStream, TokenStream, generate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer, save_tokenizer
from tests.decoding.test_decoding import make_model, random_ids
from tests.test_model import small_config


def test_greedy_text_equals_transformers_token_by_token(tmp_path):
    ours = make_model(seed=2)
    theirs = Mamba2ForCausalLM.from_pretrained(ours.save_pretrained(tmp_path))
    ids = random_ids(ours, 1, 12)
    expected = theirs.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert expected.shape == (1, 212) and len(expected[0].unique()) > 5
    assert torch.equal(generate(ours, ids, 200, temperature=0), expected)


def test_the_continuation_of_a_batch_is_that_of_each_prompt():
    model = make_model()
    ids, lengths = random_ids(model, 3, 9), [9, 4, 1]
    result = generate(model, ids, 20, temperature=0, lengths=lengths, eos_token_id=None)
    assert result.shape == (3, 29)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, :length], 20, temperature=0)[0]
        assert torch.equal(result[row, : length + 20], alone)
        assert not result[row, length + 20 :].any()


def test_rows_end_with_the_end_of_text():
    model = make_model()
    ids = random_ids(model, 2, 6)
    free = generate(model, ids, 30, temperature=0)
    eos = int(free[0, 6 + 10])
    first = int((free[0, 6:] == eos).nonzero()[0])
    ended = generate(model, ids, 30, temperature=0, eos_token_id=eos)
    assert torch.equal(ended[0, : 6 + first + 1], free[0, : 6 + first + 1])
    assert (ended[0, 6 + first :] == eos).all()
    assert ended.shape == free.shape


def test_a_seed_draws_the_same_again_and_no_new_tokens_are_none():
    model = make_model()
    ids = random_ids(model, 2, 6)
    a, b, c = (generate(model, ids, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(generate(model, ids, 0), ids)


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def allowed(**options) -> list[int]:
    return Sampling(**options).probabilities(LOGITS[None])[0].nonzero().flatten().tolist()


def test_filters_keep_what_they_say():
    p = LOGITS.softmax(0)
    assert allowed() == [0, 1, 2, 3, 4, 5]
    assert allowed(top_k=2) == [0, 1]
    assert allowed(top_k=100) == [0, 1, 2, 3, 4, 5]
    assert allowed(top_p=float(p[0]) - 0.01) == [0]
    assert allowed(top_p=float(p[0]) + 0.01) == [0, 1]
    assert allowed(top_p=float(p[:3].sum()) + 0.01) == [0, 1, 2, 3]
    assert allowed(min_p=float(p[2] / p[0]) - 0.01) == [0, 1, 2]
    assert allowed(min_p=1.0) == [0]
    # one after the other: of the two that top_k leaves, the first alone has three quarters at this temperature
    assert allowed(temperature=0.8, top_k=2, top_p=0.7) == [0]


def test_the_filters_of_transformers_leave_the_same():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(1))
    theirs = logits.clone()
    for step in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(20),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.05),
    ):
        theirs = step(ids, theirs)
    sampling = Sampling(repetition_penalty=1.3, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    counts = torch.zeros(4, 50)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2000):
        counts.scatter_add_(1, sampling.draw(logits, seen, generator)[:, None], torch.ones(4, 1))
    expected = theirs.softmax(-1)
    assert not counts[expected == 0].any()
    assert (counts / 2000 - expected).abs().max() < 0.05


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_those_of_the_softmax(temperature):
    """Chi-square of the first token of a model's continuation, 20 000 draws; the generator is seeded."""
    model = make_model(vocab_size=17)
    ids = random_ids(model, 1, 8)
    logits, _ = model.prefill(ids)
    expected = (logits[0] / temperature).double().softmax(-1) * 20_000
    sampling = Sampling(temperature=temperature)
    stream = TokenStream(model, ids, sampling, torch.Generator().manual_seed(5), samples=20_000)
    counts = torch.bincount(next(stream), minlength=17).double()
    statistic = ((counts - expected).square() / expected).sum().item()
    assert 0.001 < chi2.sf(statistic, df=16) < 0.999


def test_samples_of_one_prompt_and_its_own_copies_are_the_same_draws():
    model = make_model()
    ids = random_ids(model, 2, 7)
    once = TokenStream(model, ids, Sampling(), torch.Generator().manual_seed(1), samples=3)
    copied = TokenStream(model, ids.repeat_interleave(3, 0), Sampling(), torch.Generator().manual_seed(1))
    assert all(torch.equal(next(once), next(copied)) for _ in range(10))


def test_a_stream_goes_on_from_its_state_as_if_it_had_never_stopped():
    model = make_model()
    ids = random_ids(model, 1, 7)
    whole = generate(model, ids, 30, temperature=0)
    stream = TokenStream(model, ids, Sampling(temperature=0))
    drawn = [int(next(stream)) for _ in range(10)]
    again = TokenStream(model, torch.tensor([drawn[-1:]]), Sampling(temperature=0), state=stream.state())
    drawn += [int(next(again)) for _ in range(20)]
    assert drawn == whole[0, 7:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"min_p": 2}, "min_p must be from 0 to 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), torch.tensor([[1]]), **{"max_new_tokens": 1, **options})


def test_ids_past_the_tokenizers_are_never_drawn():
    model = make_model()
    ids = generate(model, random_ids(model, 4, 3) % 10, 50, temperature=5.0, vocab_size=10)
    assert ids.max() == 9


@pytest.mark.parametrize(
    ("ids", "stop", "pieces", "rest"),
    [
        (b"a", (), ["a"], ""),
        ("é漢!".encode(), (), ["", "é", "", "", "漢", "!"], ""),
        (b"a\xe6", (), ["a", ""], "\ufffd"),
        (b"one STOP two", ("STOP", "zzz"), ["o", "n", "e", " ", "", "", "", ""], None),
        (b"one STO", ("STOP",), ["o", "n", "e", " ", "", "", ""], "STO"),
        (b"STSTOP", ("STOP",), ["", "", "ST", "", "", ""], None),
        ([97, 98, 256, 65], (), ["a", "b", ""], None),
    ],
)
def test_text_comes_in_whole_characters_and_ends_before_a_stop_string_or_with_the_end_of_text(ids, stop, pieces, rest):
    """`rest`: what is held back when no more ids come; None where the text has ended by itself."""
    stream = TextStream(get_tokenizer("bytes"), stop)
    out = []
    for token_id in ids:
        out.append(stream.push(token_id))
        if stream.ended:
            break
    assert out == pieces and stream.ended == (rest is None)
    assert stream.finish() == (rest or "") and stream.push(65) == stream.finish() == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    Mamba2LM(small_config(vocab_size=260, num_hidden_layers=2), seed=4).save_pretrained(path)
    save_tokenizer(get_tokenizer("bytes"), path)
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        command.main()
        return capsys.readouterr().out

    return call


def test_the_command_prints_the_prompt_and_its_continuation(folder, call):
    model, tokenizer = Mamba2LM.from_pretrained(folder), get_tokenizer("bytes")
    ids = torch.tensor([tokenizer.encode("héllo")])
    drawn = generate(model, ids, 40, temperature=0, vocab_size=257, eos_token_id=256)[0].tolist()
    expected = tokenizer.decode(drawn) + "\n"
    assert call(folder, "héllo", "--greedy", "--max-new-tokens", 40) == expected
    assert call(folder, "--greedy", "--max-new-tokens", 40, stdin="héllo") == expected
    assert call(folder, "héllo", "--temperature", 0, "--max-new-tokens", 40) == expected


def test_the_command_compiles_when_told_and_prints_the_same(folder, call, monkeypatch):
    made = []
    monkeypatch.setattr(decoding, "CompiledDecoder", lambda *args: made.append(CompiledDecoder(*args)) or made[-1])
    plain = (folder, "héllo", "--greedy", "--max-new-tokens", 20)
    expected = call(*plain)
    assert not made and call(*plain, "--compile") == expected and len(made) == 1
    interactive = (folder, "--interactive", *plain[2:])
    assert "\n" in call(*interactive, "--compile", stdin="a\nb\n") and len(made) == 3


def test_the_options_of_the_command_change_the_text(folder, call):
    base = (folder, "a", "--max-new-tokens", 60, "--seed", 1)
    plain = call(*base)
    assert call(*base) == plain
    for options in (
        ("--seed", 2),
        ("--temperature", 0.3),
        ("--top-k", 2),
        ("--top-p", 0.3),
        ("--min-p", 0.9),
        ("--repetition-penalty", 20),
        ("--stop", plain[5]),
        ("--dtype", "bfloat16", "--seed", 3),
    ):
        assert call(*base, *options) != plain, options
    samples = call(*base, "--samples", 3)
    assert [f"--- sample {i}" in samples for i in (1, 2, 3, 4)] == [True, True, True, False]


def test_the_interactive_mode_carries_the_text_on_and_forgets_when_told(folder, call):
    def greedy(stdin):
        return call(folder, "--interactive", "--greedy", "--max-new-tokens", 12, stdin=stdin)

    one, two = greedy("hello\n"), greedy("hello\nhello\n")
    assert two.startswith(one) and two != one + one
    assert greedy("hello\n/reset\nhello\n") == one + one
    model, tokenizer = Mamba2LM.from_pretrained(folder), get_tokenizer("bytes")
    ids = [256, *tokenizer.encode("hello")]
    for line in (None, "\nhello"):
        ids += tokenizer.encode(line) if line else []
        before = len(ids)
        ids = generate(model, torch.tensor([ids]), 12, temperature=0, vocab_size=257)[0].tolist()
        assert tokenizer.decode(ids[before:]) in two
    with pytest.raises(ValueError, match="--samples must be 1"):
        call(folder, "--interactive", "--samples", 2)


def test_a_model_that_is_not_finite_draws_nothing_and_is_refused_by_name(tmp_path, monkeypatch):
    model = make_model()
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = float("nan")
    for options in ({"temperature": 0}, {}, {"max_new_tokens": 1, "top_k": 3}):
        with pytest.raises(ValueError, match="the model gives logits that are not finite"):
            generate(model, random_ids(model, 2, 5), **{"max_new_tokens": 4, **options})
    folder = model.save_pretrained(tmp_path / "model")
    named = "model.safetensors: backbone.norm_f.weight holds NaN or infinity"
    save_tokenizer(get_tokenizer("bytes"), folder)
    monkeypatch.setattr(sys, "argv", ["generate", str(folder), "text"])
    with pytest.raises(ValueError, match=named):
        command.main()
    with pytest.raises(ValueError, match=named):
        evaluation_script.measure(folder, None, [], [], argparse.Namespace(device="cpu"))
