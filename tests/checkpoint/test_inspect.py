"""What `inspect` finds suspicious in a checkpoint: nothing in a sound one, and each fault by its name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba2 import Mamba2LM
from mamba2.checkpoint.__main__ import main
from mamba2.checkpoint.inspect import exchange, exchanged, report, suspicions
from mamba2.data import Tokens, Windows
from mamba2.initializers import INITIALIZERS, DtParams, inverse_softplus
from mamba2.tokenizer import get_tokenizer, save_tokenizer
from mamba2.training import make_optimizer
from mamba2.training.step import accumulate_gradients, update
from tests.runs import small_config

FACTORS = {parameter: choices for parameter, choices in INITIALIZERS.items() if parameter != "dt_bias"}
SOUND = [
    *INITIALIZERS["dt_bias"],
    *(f"log_uniform+{factor}={choice}" for factor in FACTORS for choice in FACTORS[factor]),
]


def found(model: Mamba2LM) -> list[str]:
    A_log = torch.stack([mixer.A_log.detach() for mixer in model.mixers()])
    return suspicions(model.config, model.dt_bias(), A_log)


@pytest.mark.parametrize("weight_init", ["transformers", "mamba_ssm"])
@pytest.mark.parametrize("initialization", SOUND)
def test_no_initialisation_is_suspicious(initialization, weight_init):
    config = small_config(num_hidden_layers=3).with_weight_init(weight_init)
    assert found(Mamba2LM(config, 1, initialization, DtParams(length=64.0, eigenvalue=4.0))) == []


def test_a_trained_model_is_not_suspicious():
    model = Mamba2LM(small_config(), 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mixer in model.mixers():
            for parameter in (mixer.dt_bias, mixer.A_log):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    assert found(model) == []


FAULTS: list[tuple[str, Callable, str]] = [
    ("dt_bias", torch.ones_like, "dt_bias is 1 everywhere"),
    ("dt_bias", torch.zeros_like, "dt_bias is 0 everywhere"),
    ("dt_bias", torch.nn.functional.softplus, "dt_bias is in the range of dt, 0.001 to 0.1: softplus was not inverted"),
    ("dt_bias", lambda bias: inverse_softplus(bias).float(), "dt_bias is not finite: softplus was inverted"),
    ("dt_bias", lambda bias: bias + 10, "the median of dt is"),
    ("dt_bias", lambda bias: bias - 10, "the median of dt is"),
    ("dt_bias", lambda bias: bias + 0.1, "A_log was reset after training"),
    ("A_log", torch.zeros_like, "A_log is 0 everywhere"),
    ("A_log", torch.exp, "the logarithm was not taken"),
    ("A_log", lambda A: A / 0, "A_log is not finite"),
]


@pytest.mark.parametrize(("name", "change", "message"), FAULTS)
def test_each_fault_is_named_and_strict_fails(name, change, message, tmp_path, monkeypatch, capsys):
    model = Mamba2LM(small_config(num_hidden_layers=3), 1)
    with torch.no_grad():
        for mixer in model.mixers():
            tensor = getattr(mixer, name)
            tensor.copy_(change(tensor))
    model.save_pretrained(tmp_path)
    _, what = report(tmp_path)
    assert len(what) == 1 and message in what[0]
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(tmp_path)])
    main()
    assert f"suspicious: {what[0]}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(tmp_path), "--strict"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learnt some of the text of Python's json, 1 nat below where it began."""
    tokenizer = get_tokenizer("bytes")
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (json, json.decoder, json.encoder))
    ids = np.array(tokenizer.encode(text), dtype=np.uint16)
    windows = Windows(Tokens(ids, np.array([0]), tokenizer.eot_id, 256), 64)
    model = Mamba2LM(small_config(vocab_size=257, num_hidden_layers=2), 1).train()
    optimizer = make_optimizer(model, 2e-2, (0.9, 0.99), 0.0)
    for step in range(80):
        accumulate_gradients(model, windows, windows.indices(0, step, 8), 8, torch.float32)
        update(model, optimizer, 1.0)
    folder = model.save_pretrained(tmp_path_factory.mktemp("trained"))
    save_tokenizer(tokenizer, folder)
    return folder


def test_exchanged_halves_of_a_projection_are_named(trained, tmp_path):
    tokenizer, model = get_tokenizer("bytes"), Mamba2LM.from_pretrained(trained)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert exchanged(model, tokenizer) == []
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    exchange(model)
    save_tokenizer(tokenizer, model.save_pretrained(tmp_path))
    (what,) = report(tmp_path)[1]
    assert "z and x seem to be exchanged in in_proj" in what


def test_a_model_that_learnt_nothing_or_has_no_tokenizer_is_not_judged_by_text(trained, tmp_path):
    assert exchanged(Mamba2LM(small_config(vocab_size=257), 1), get_tokenizer("bytes")) == []
    text, found = report(trained)
    assert found == [] and "not checked" not in text
    assert "was not checked: it was not asked for" in report(trained, reads_text=False)[0]
    bare = Mamba2LM(small_config(vocab_size=257), 1).save_pretrained(tmp_path)
    assert "was not checked: there is no tokenizer" in report(bare)[0]
