"""What `inspect` finds suspicious in a checkpoint: nothing in a sound one, and each fault by its name."""

import sys
from collections.abc import Callable

import pytest
import torch

from mamba2 import Mamba2LM
from mamba2.checkpoint.__main__ import main
from mamba2.checkpoint.inspect import report, suspicions
from mamba2.initializers import INITIALIZERS, DtParams, inverse_softplus
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
