"""Layers of attention among those of Mamba-2: against mamba-ssm and transformers, and everywhere that a model goes."""

import dataclasses
import functools
import itertools
import json

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from mamba2.attention import AttentionMixer
from mamba2.checkpoint.convert import convert
from mamba2.checkpoint.foreign import from_mamba_ssm
from mamba2.config import Mamba2Config
from mamba2.decoding import make_decoder
from mamba2.generate import generate
from mamba2.model import Mamba2LM, flops_per_token, num_parameters
from tests.oracles import mamba_ssm_classes, mamba_ssm_logits
from tests.runs import arguments, contents, interrupt_after, make_study, run_train
from tests.test_model import check_documents_by_cu_seqlens, relative_error, small_config

SHAPE = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "causal": True, "d_conv": 3, "rotary_emb_dim": 4}


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def hybrid(**changes) -> Mamba2Config:
    return small_config(attn_layer_idx=[1], attn_cfg={**SHAPE, **changes})


def random_ids(b: int, l: int) -> torch.Tensor:
    return torch.randint(1, 61, (b, l), generator=torch.Generator().manual_seed(b * l))


@pytest.mark.parametrize("changes", [{}, {"num_heads_kv": None, "d_conv": 0, "qkv_proj_bias": False, "head_dim": None}])
def test_a_converted_model_equals_mamba_ssm(tmp_path, changes):
    """Its rotation needs an extension that is not built, so there is none here."""
    config = dataclasses.replace(hybrid(rotary_emb_dim=0, **changes), num_hidden_layers=2)
    model = Mamba2LM(config, seed=3)
    folder = model.save_pretrained(tmp_path / "ours")
    convert(folder, tmp_path / "theirs", "mamba-ssm")
    classes = mamba_ssm_classes()
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    theirs = classes.MambaLMHeadModel(classes.MambaConfig(**values))
    theirs.load_state_dict(torch.load(tmp_path / "theirs" / "pytorch_model.bin"))
    ids = random_ids(1, 20)
    with torch.no_grad():
        assert relative_error(model(ids), mamba_ssm_logits(theirs, ids)) < 1e-4
    again = Mamba2LM.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.config.attn_cfg == model.config.attn_cfg and again.config.attn_layer_idx == (1,)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(model.config)


def test_the_published_hybrid_has_the_parameters_counted_by_hand():
    """The config of state-spaces/mamba2attn-2.7b."""
    attention = {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "rotary_emb_dim": 64}
    values = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "pad_vocab_size_multiple": 16, "d_intermediate": 0}
    values |= {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [9, 18, 27, 36, 45, 56]}
    values |= {"attn_cfg": {**attention, "out_proj_bias": False, "qkv_proj_bias": False}}
    config = from_mamba_ssm(values)
    mamba = 2560 * (2 * 5120 + 2 * 128 + 80) + 5 * (5120 + 256) + 3 * 80 + 5120 + 5120 * 2560 + 2560
    attention = 2560 * 3 * 3840 + 5 * 3 * 3840 + 3840 * 2560 + 2560
    assert num_parameters(config) == 58 * mamba + 6 * attention + 2560 + 50288 * 2560


def test_the_rotation_is_that_of_transformers():
    mixer = AttentionMixer(hybrid(num_heads_kv=4))
    qkv = torch.randn(2, 7, sum(mixer.widths))
    places = torch.arange(5, 12).expand(2, 7)
    q, k, _ = mixer._heads(qkv, places)
    plain = [part.unflatten(-1, (4, 6)).transpose(1, 2) for part in qkv.split(mixer.widths, -1)]
    angles = places[..., None] / 10000.0 ** (torch.arange(0, 4, 2) / 4)
    angles = torch.cat([angles, angles], dim=-1)
    expected = apply_rotary_pos_emb(plain[0], plain[1], angles.cos(), angles.sin())
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_documents_equal_sequences_one_by_one_and_do_not_look_back():
    model, ids = Mamba2LM(hybrid()), random_ids(1, 24)
    cuts = [0, 1, 9, 10, 24]
    seq_idx = torch.cat([torch.full((1, b - a), i % 2) for i, (a, b) in enumerate(itertools.pairwise(cuts))], dim=1)
    with torch.no_grad():
        together, state = model(ids, seq_idx=seq_idx, return_state=True)
        for start, stop in itertools.pairwise(cuts):
            alone, last = model(ids[:, start:stop], return_state=True)
            assert_close(together[:, start:stop], alone)
        following = random_ids(1, 3)[:, 0]
        a, b = (model.step(following, s)[0] for s in (state, last))
        assert_close(a, b)
    assert state[1].k.shape[1] == 15 and last[1].lengths.tolist() == [15]


@pytest.mark.parametrize("d_conv", [0, 3])
def test_documents_by_cu_seqlens_equal_documents_run_one_by_one(d_conv):
    check_documents_by_cu_seqlens(hybrid(d_conv=d_conv), torch.int32)


@pytest.mark.parametrize("cut", [1, 2, 13])
def test_a_state_goes_on_as_if_nothing_had_been_cut(cut):
    """By forward passes, by prefill of prompts of several lengths, and token by token from nothing."""
    model, ids = Mamba2LM(hybrid()), random_ids(3, 20)
    with torch.no_grad():
        whole = model(ids)
        first, state = model(ids[:, :cut], return_state=True)
        second = model(ids[:, cut:], state=state)
        assert_close(torch.cat([first, second], dim=1), whole)
        lengths = [cut, 20, cut + 3]
        logits, state = model.prefill(ids, lengths, segment=7)
        for row, length in enumerate(lengths):
            assert_close(logits[row], whole[row, length - 1])
        logits, _ = model.step(ids[:, 5], state)
        for row, length in enumerate(lengths):
            expected = model(torch.cat([ids[row, :length], ids[row, 5:6]])[None])[0, -1]
            assert_close(logits[row], expected)
        state = model.new_state(3)
        steps = torch.stack([model.step(ids[:, i], state)[0] for i in range(20)], dim=1)
        assert_close(steps, whole)


def test_generation_in_bfloat16_and_what_compiled_decoding_says():
    model = Mamba2LM(hybrid()).bfloat16()
    ids = generate(model, random_ids(2, 5), 6, temperature=0.0, lengths=[5, 3])
    assert ids.shape == (2, 11)
    with pytest.raises(ValueError, match="here: layers of attention"):
        make_decoder(model, model.new_state(1), compiled=True)


def test_gradients_of_the_cut_sequence_pass_through_the_state():
    model, ids = Mamba2LM(hybrid()), random_ids(2, 12)
    whole = torch.autograd.grad(model(ids)[:, -1].square().sum(), list(model.parameters()))
    _, state = model(ids[:, :5], return_state=True)
    cut = torch.autograd.grad(model(ids[:, 5:], state=state)[:, -1].square().sum(), list(model.parameters()))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(cut, whole, strict=True))
    assert not state[1].detach().k.requires_grad


@pytest.mark.slow
def test_training_resumes_to_the_bit(tmp_path):
    study = make_study(tmp_path)
    config = json.loads((study / "model" / "config.json").read_text())
    values = {**config, "attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "causal": True, "rotary_emb_dim": 2}}
    Mamba2LM(Mamba2Config.from_dict(values)).save_pretrained(study / "model")
    for name in ("whole", "resumed"):
        if name == "resumed":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                interrupt_after(patch, steps=2)
                run_train(*arguments(study, study / name, "--max-steps", 4))
        run_train(*arguments(study, study / name, "--max-steps", 4))
    assert contents(study / "whole") == contents(study / "resumed")


def test_a_token_costs_more_the_longer_the_window():
    config = hybrid()
    assert flops_per_token(config, 2048) - flops_per_token(config, 1024) == 3 * 2 * 4 * 6 * 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [3]}, "a layer in attn_layer_idx is 3, and must be an integer from 0 to 2"),
        ({"attn_layer_idx": [1, 1]}, r"attn_layer_idx is \(1, 1\)"),
        ({"attn_layer_idx": [0, 1, 2]}, "not of all"),
        ({"attn_layer_idx": []}, "names no layer that it is for"),
        ({"attn_cfg": {}}, "must be an object with num_heads"),
        ({"attn_cfg": {**SHAPE, "window": 7}}, "keys that are not known: window"),
        ({"attn_cfg": {**SHAPE, "causal": False}}, "attn_cfg.causal is False, and only True"),
        ({"attn_cfg": {**SHAPE, "mlp_dim": 64}}, "attn_cfg.mlp_dim is 64, and only 0"),
        ({"attn_cfg": {**SHAPE, "rotary_emb_interleaved": True}}, "rotary_emb_interleaved is True"),
        ({"attn_cfg": {**SHAPE, "num_heads_kv": 3}}, "attn_cfg.num_heads_kv is 3"),
        ({"attn_cfg": {**SHAPE, "rotary_emb_dim": 3}}, "rotary_emb_dim is 3, and must be even"),
        ({"attn_cfg": {**SHAPE, "rotary_emb_dim": 8}}, "rotary_emb_dim is 8"),
        ({"attn_cfg": {"num_heads": 5, "causal": True}}, "must divide hidden_size"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**{"attn_layer_idx": [1], "attn_cfg": SHAPE, **changes})


def test_transformers_layout_is_refused(tmp_path):
    folder = Mamba2LM(hybrid()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no layers of attention"):
        convert(folder, tmp_path / "theirs", "transformers")
