"""Initialisations of other parameters than dt_bias: what each sets, what it leaves alone, and what is recorded."""

import dataclasses
import hashlib
import math
import re

import pytest
import torch

from mamba2.evaluation.diagnostics import initial_model
from mamba2.factors import parse_initialization
from mamba2.initializers import INITIALIZERS, DtParams, seed_stream
from mamba2.model import Mamba2LM
from tests.runs import small_config

CONFIG = small_config(num_hidden_layers=3)
ALL = [(factor, choice) for factor in INITIALIZERS if factor != "dt_bias" for choice in INITIALIZERS[factor]]
SETS = {
    "A": ["A_log"],
    "D": ["D"],
    "conv": ["conv1d.weight", "conv1d.bias"],
    "BC": ["in_proj.weight"],
    "out_proj": ["out_proj.weight"],
    "embedding": ["backbone.embeddings.weight", "lm_head.weight"],
}


def model(initialization: str, seed: int = 3, config=CONFIG) -> Mamba2LM:
    return Mamba2LM(config, seed, initialization)


@pytest.mark.parametrize(("factor", "choice"), ALL)
def test_a_factor_changes_its_tensors_alone_to_the_bit(factor, choice):
    plain, changed = model("log_uniform").state_dict(), model(f"log_uniform+{factor}={choice}").state_dict()
    differs = {name for name in plain if not plain[name].equal(changed[name])}
    assert all(any(name.endswith(own) for own in SETS[factor]) for name in differs)
    assert bool(differs) == ((factor, choice) not in {("A", "arange"), ("D", "ones")})  # what the model has anyway


@pytest.mark.parametrize(("factor", "choice"), ALL)
def test_a_factor_is_recorded_repeatable_and_made_again(factor, choice, tmp_path):
    name = f"uniform+{factor}={choice}"
    first, second = model(name), model(name)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    record = first.config.factors_init
    assert record == second.config.factors_init and record[factor]["name"] == choice and record[factor]["seed"] == 3
    loaded = Mamba2LM.from_pretrained(first.save_pretrained(tmp_path))
    assert loaded.config.factors_init == record
    again = initial_model(loaded)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))


def test_the_order_of_factors_does_not_matter():
    one, other = (
        model("uniform+A=uniform_1_16+D=zeros+conv=identity"),
        model("uniform+conv=identity+D=zeros+A=uniform_1_16"),
    )
    assert all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_dt_follows_the_changed_A():
    """halflife sets dt / A: with A = 1 memory is the same as with A = 1..nheads, and dt is not."""
    plain, ones = model("halflife"), model("halflife+A=ones")
    for m in (plain, ones):
        m.tau = math.log(2) / (torch.nn.functional.softplus(m.dt_bias().double()) * m.A())
    torch.testing.assert_close(plain.tau, ones.tau, rtol=1e-5, atol=0)
    assert not plain.dt_bias().equal(ones.dt_bias())


def test_the_values_are_those_of_the_formulas():
    drawn, L = model("log_uniform"), CONFIG.num_hidden_layers

    def parts(initialization, factor):
        which = slice(1) if factor == "A" else slice(None)  # dt_bias, which A may read, is the second
        return [mixer.tensors_of(factor)[which] for mixer in model(initialization).mixers()]

    heads = CONFIG.num_heads
    for (values,) in parts("log_uniform+A=arange", "A"):
        torch.testing.assert_close(values.exp(), torch.arange(1.0, heads + 1))
    A = torch.cat([values.exp() for (values,) in parts("log_uniform+A=uniform_1_16", "A")])
    expected = torch.empty(L, heads).uniform_(1.0, 16.0, generator=seed_stream(3, "A"))
    torch.testing.assert_close(A, expected.flatten())
    assert all((values == 0).all() for (values,) in parts("log_uniform+A=ones", "A"))
    assert all((values == math.log(0.01)).all() for (values,) in parts("log_uniform+A=slow", "A"))
    assert all((values == 0).all() for (values,) in parts("log_uniform+D=zeros", "D"))
    for mixer, (weight, bias) in zip(drawn.mixers(), parts("log_uniform+conv=identity", "conv")):
        old = mixer.conv1d.weight.squeeze(1) / 10
        torch.testing.assert_close(weight[:, :-1], old[:, :-1])
        torch.testing.assert_close(weight[:, -1], old[:, -1] + 1)
        torch.testing.assert_close(bias, mixer.conv1d.bias / 10)
    for mixer, (B, C) in zip(drawn.mixers(), parts("log_uniform+BC=tied", "BC")):
        _, xBC, _ = mixer.in_proj.weight.split(mixer.in_proj.widths)
        gn = CONFIG.n_groups * CONFIG.state_size
        assert B.equal(xBC[-2 * gn : -gn])
        torch.testing.assert_close(C, B + xBC[-gn:] / 10)
    for mixer, (weight,) in zip(drawn.mixers(), parts("log_uniform+out_proj=rescaled", "out_proj")):
        torch.testing.assert_close(weight, mixer.out_proj.weight / math.sqrt(L))
    weight = model("log_uniform+embedding=small").backbone.embeddings.weight
    assert weight.std().item() == pytest.approx(0.02, rel=1e-5)


def test_A_by_half_life_leaves_dt_and_sets_memory():
    plain, joint = model("log_uniform"), model("log_uniform+A=halflife+D=zeros")
    assert plain.dt_bias().equal(joint.dt_bias())
    dt = torch.nn.functional.softplus(joint.dt_bias().double())
    tau = (math.log(2) / (dt * joint.A())).sort(dim=1).values
    expected = torch.logspace(0, 3, CONFIG.num_heads, base=1024 ** (1 / 3)).double()
    torch.testing.assert_close(tau, expected.expand_as(tau), rtol=1e-5, atol=0)
    shorter = Mamba2LM(CONFIG, 3, "log_uniform+A=halflife", DtParams(half_life_max=64.0))
    assert shorter.config.factors_init["A"]["half_life_max"] == 64.0
    assert initial_model(shorter).A().equal(shorter.A())


def test_the_record_holds_the_hash_of_the_values():
    made = model("log_uniform+conv=identity")
    parts = zip(*(mixer.tensors_of("conv") for mixer in made.mixers()))
    data = b"".join(torch.stack(tensors).detach().numpy().tobytes() for tensors in parts)
    assert made.config.factors_init["conv"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_layers_without_a_convolution_bias_have_factors_too():
    config = dataclasses.replace(CONFIG, use_conv_bias=False)
    assert model("log_uniform+conv=identity", config=config).config.factors_init


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrom", "unknown initialization 'unifrom': choose from uniform, linear_decay"),
        ("uniform+A", "unknown factor 'A' of the initialization 'uniform+A': choose from A=arange, A=uniform_1_16"),
        ("uniform+A=one", "unknown factor 'A=one'"),
        ("uniform+A=ones+A=slow", "names A twice"),
    ],
)
def test_what_is_unknown_is_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_initialization(text)
