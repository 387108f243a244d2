"""Our model class for lm-evaluation-harness against the harness' own for transformers, on the same folder and tasks."""

import functools
import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest import mock

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mamba2.checkpoint.convert import convert
from mamba2.evaluation.__main__ import main
from mamba2.evaluation.corpus import Corpus
from mamba2.evaluation.harness import HarnessLM
from mamba2.evaluation.perplexity import evaluate
from mamba2.generate import generate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer, load_tokenizer
from tests.test_model import small_config

LENGTH = 24  # of windows: some contexts below are longer
LONG = "One text after another, and each of them goes on for more tokens than there is room for in a window. " * 2
TEXTS = ["A short text.", LONG, "é ☃", "", LONG + "  The end.\n\n"]
CHOICES = [
    {"context": "The cat sat on", "choices": [" the mat", " a", " a much longer answer of many words"], "answer": 0},
    {"context": "The cat sat on", "choices": [" the moon", " mat"], "answer": 1},
    {"context": "Trailing space ", "choices": ["one", "two"], "answer": 0},
    {"context": "", "choices": ["nothing came before", "x"], "answer": 1},
    {"context": LONG, "choices": [" cut", " cut at the beginning"], "answer": 0},
]
PROMPTS = ["I think that", "def", LONG, "x = 1\n"]
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\nmetric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
    "  - {metric: word_perplexity}\n  - {metric: byte_perplexity}\n  - {metric: bits_per_byte}\n",
    "until": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{target}}'\n"
    "metric_list:\n  - {metric: exact_match}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that transformers opens, too, with more rows than its tokenizer has ids."""
    root = tmp_path_factory.mktemp("model")
    config = small_config(vocab_size=50280, num_hidden_layers=2, chunk_size=8)
    Mamba2LM(config, seed=5, initialization="log_uniform").save_pretrained(root / "ours")
    convert(root / "ours", root / "both", "transformers", "gpt-neox-20b")
    return str(root / "both")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def continuations(folder, tokenizer):
    """The greedy texts of 10 tokens after PROMPTS, row by row."""
    model, texts = Mamba2LM.from_pretrained(folder), []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)[10 - LENGTH :]])
        texts.append(tokenizer.decode(generate(model, ids, 10, temperature=0.0)[0, ids.shape[1] :].tolist()))
    return texts


@pytest.fixture(scope="module")
def local(tokenizer, continuations, tmp_path_factory):
    """Folder of the tasks of TASKS. One choice is what the model would say; a stop string is in one greedy text."""
    root = tmp_path_factory.mktemp("tasks")
    said = tokenizer.decode(tokenizer.encode(continuations[0])[:3])
    documents = {
        "choice": [*CHOICES, {"context": PROMPTS[0], "choices": [said, LONG[:40], "!"], "answer": 0}],
        "rolling": [{"text": text} for text in TEXTS],
        "until": [{"prompt": p, "target": text} for p, text in zip(PROMPTS, continuations)],
    }
    options = {"until": [continuations[1][4:9], "never"], "max_gen_toks": 10, "do_sample": False}
    for name, text in TASKS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents[name]))
        files = {"data_files": {"test": f"{root}/{name}.jsonl"}, "cache_dir": f"{root}/cache"}
        text += f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(files)}\n"
        text += f"generation_kwargs: {json.dumps(options)}\n" if name == "until" else ""
        (root / f"{name}.yaml").write_text(text)
    return root


def answers(lm, local) -> dict:
    """The numbers of all tasks under "results", and by task what the model answered to each request."""
    manager = TaskManager(include_path=str(local), include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # asks pip for all that is installed, which takes seconds
        result = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    given = {"results": result["results"]}
    for name in TASKS:
        rows = sorted(result["samples"][name], key=lambda row: row["doc_id"])
        given[name] = [response for row in rows for (response,) in row["resps"]]
    return given


@pytest.fixture(scope="module")
def hf(folder):
    return HFLM(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(hf, local):
    hf._max_length = LENGTH
    return answers(hf, local)


@pytest.fixture(scope="module")
def ours(folder, local):
    return {
        size: answers(HarnessLM(folder, device="cpu", max_length=LENGTH, batch_size=size), local) for size in (1, 3)
    }


def test_a_window_is_as_long_as_transformers_has_it(hf, folder):
    assert hf.max_length == HarnessLM(folder).max_length == 2048
    assert hf.max_gen_toks == HarnessLM(folder).max_gen_toks


@pytest.mark.parametrize("size", [1, 3])
def test_log_likelihoods_and_greedy_flags_equal_transformers(ours, theirs, size):
    for (got, got_greedy), (expected, greedy) in zip(ours[size]["choice"], theirs["choice"], strict=True):
        assert got == pytest.approx(expected, abs=1e-4) and got_greedy == greedy
    assert sum(greedy for _, greedy in theirs["choice"]) == 1
    assert ours[size]["rolling"] == pytest.approx(theirs["rolling"], abs=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_texts_equal_transformers_up_to_the_stop_string(ours, theirs, continuations, size):
    assert ours[size]["until"] == theirs["until"]
    assert ours[size]["until"] == [continuations[0], continuations[1][:4], *continuations[2:]]


@pytest.mark.parametrize("size", [1, 3])
def test_the_tables_of_the_harness_are_equal(ours, theirs, size):
    for name, numbers in theirs["results"].items():
        sums = {
            key: pytest.approx(numbers[key], rel=1e-6)
            for key in numbers
            if key.endswith(("perplexity,none", "byte,none"))
        }
        assert ours[size]["results"][name] == {**numbers, **sums}
    assert theirs["results"]["until"]["exact_match,none"] == 0.75


def test_rolling_is_our_protocol_lm_eval(ours, folder, tokenizer):
    corpus = Corpus([[text] for text in TEXTS], "texts", None, "test", "1")
    result = evaluate(Mamba2LM.from_pretrained(folder), tokenizer, corpus, "lm_eval", LENGTH, batch_size=2)
    assert ours[3]["rolling"] == pytest.approx([-document.nats for document in result.documents], rel=1e-6)
    table = ours[3]["results"]["rolling"]
    for key in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert table[f"{key},none"] == pytest.approx(getattr(result, key), rel=1e-6)


def test_the_command_is_the_harness_own_with_our_model(ours, folder, local, tmp_path, monkeypatch, capsys):
    # its own tasks are thousands of files
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    options = ["--model_args", f"pretrained={folder},max_length={LENGTH}", "--include_path", str(local)]
    options += ["--batch_size", "3", "--device", "cpu", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", "--model", "mamba2", "--tasks", "choice", *options])
    main()
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["choice"]["acc,none"] == ours[3]["results"]["choice"]["acc,none"]
    assert "|choice|" in capsys.readouterr().out


def test_the_entry_point_that_newer_versions_read_names_our_class():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["lm_eval.models"].items()
    assert entry[0] == "mamba2" and EntryPoint(*entry, "lm_eval.models").load() is HarnessLM


# ----------------------------------------------------------------------------- of models of bytes, without the harness


def of_bytes(root: Path, size: int = 3, length: int = 40, **changes) -> HarnessLM:
    config = small_config(vocab_size=257, chunk_size=8, **changes)
    Mamba2LM(config, seed=3).save_pretrained(root)
    return HarnessLM(str(root), tokenizer="bytes", device="cpu", batch_size=size, max_length=length)


def request(*arguments) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)


PAIRS = [("abc", "d"), ("abc", "def"), ("x", "0123456789"), ("", "no context"), ("abcdefgh" * 9, "long"), ("abc", "zz")]


@pytest.mark.parametrize("changes", [{}, {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True}}])
def test_log_likelihoods_are_those_of_a_pass_over_context_and_continuation(tmp_path, changes):
    lm = of_bytes(tmp_path, **changes)
    for (context, continuation), (value, _) in zip(PAIRS, lm.loglikelihood([request(*pair) for pair in PAIRS])):
        ids = [*(context.encode() or [256]), *continuation.encode()][-41:]
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids]))[0].log_softmax(-1)
        scored = range(len(ids) - len(continuation), len(ids))
        assert value == pytest.approx(sum(log_p[i - 1, ids[i]].item() for i in scored), abs=1e-4)


def tokens_read(lm: HarnessLM) -> list[int]:
    """A list to which every pass from now on adds its number of tokens."""
    read = []
    lm.model.backbone.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].numel()))
    return read


def test_a_context_is_read_once_for_all_its_continuations(tmp_path):
    lm = of_bytes(tmp_path, size=8)
    read = tokens_read(lm)
    lm.loglikelihood([request("a context of 22 bytes,", end) for end in ("one", "two", "six", "ten")])
    assert read == [22, 4 * 2]  # the last token of a continuation is only predicted


def test_a_context_that_is_too_long_loses_its_beginning_with_a_warning(tmp_path, capsys):
    lm = of_bytes(tmp_path)
    read = tokens_read(lm)
    full, cut = lm.loglikelihood([request("x" * 50 + "y" * 36, "four!"), request("y" * 36, "four!")])
    assert full == cut
    assert "warning: 1 of 2 contexts lose their beginning" in capsys.readouterr().err
    lm.generate_until([request("x" * 50, {"max_gen_toks": 10})])
    assert read == [36, 2 * 4, 30]
    assert "warning: 1 of 1 contexts lose their beginning" in capsys.readouterr().err


def text_of(lm: HarnessLM, **options) -> str:
    return lm.generate_until([request("abc", {"max_gen_toks": 20, **options})])[0]


def test_options_of_generation_have_the_meaning_of_transformers(tmp_path):
    lm = of_bytes(tmp_path)
    greedy = text_of(lm)
    assert text_of(lm, do_sample=False, temperature=3.0) == greedy  # as there: not drawn, whatever the temperature
    assert text_of(lm, do_sample=True, temperature=3.0, top_k=1) == greedy
    assert text_of(lm, max_gen_toks=None, max_new_tokens=20, until=None, do_sample=None) == greedy
    assert text_of(lm, until=greedy[5]) == greedy[: greedy.index(greedy[5])]
    torch.manual_seed(0)
    drawn = [text_of(lm, temperature=1.0), text_of(lm, temperature=1.0)]
    assert len({greedy, *drawn}) == 3
    torch.manual_seed(0)
    assert text_of(lm, temperature=1.0) == drawn[0]
    ids = [256, *generate(lm.model, torch.tensor([[256]]), 5, temperature=0.0)[0, 1:].tolist()]
    assert lm.generate_until([request("", {"max_gen_toks": 5})]) == [get_tokenizer("bytes").decode(ids)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams is not understood; choose from until, do_sample"),
        ({"do_sample": True}, "do_sample is true, and there is no temperature above 0"),
        ({"max_gen_toks": 40}, "max_gen_toks must be one number below the max_length of 40, not 40"),
        ({"max_gen_toks": 4, "max_new_tokens": 5}, "must be one number"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number from 1 on, not 0"),
        ({"temperature": 1.0, "top_p": 2}, "top_p must be above 0 and at most 1, not 2"),
    ],
)
def test_options_that_are_not_understood_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        text_of(of_bytes(tmp_path), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_remote_code": True, "peft": "x"}, "model_args: trust_remote_code, peft is unknown; choose from pretr"),
        ({"pretrained": None}, "model_args: pretrained is missing"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16, not int8"),
        ({"batch_size": "auto"}, "batch_size must be a whole number from 1 on, not auto"),
        ({"max_length": 0}, "max_length must be a whole number from 1 on, not 0"),
        ({"tokenizer": "gpt2"}, "tokenizer gpt2 has 50257 ids and the model only 257 rows"),
        ({"tokenizer": None}, "carries no tokenizer"),
    ],
)
def test_model_args_that_are_not_understood_are_refused_by_name(tmp_path, arguments, message):
    of_bytes(tmp_path)
    with pytest.raises(ValueError, match=message):
        HarnessLM(**{"pretrained": str(tmp_path), "tokenizer": "bytes", **arguments})


@pytest.mark.parametrize(("continuation", "count"), [("", 0), ("x" * 41, 41)])
def test_a_continuation_that_cannot_be_scored_is_refused(tmp_path, continuation, count):
    with pytest.raises(
        ValueError, match=f"has {count} tokens of its own, and must have from 1 to the max_length of 40"
    ):
        of_bytes(tmp_path).loglikelihood([request("abc", continuation)])
