"""muP: initial scales and rates by width, and that activations then move as far at every width."""

import numpy as np
import pytest
import torch
from transformers import Mamba2ForCausalLM

from mamba2.config import Mamba2Config
from mamba2.model import Mamba2LM
from mamba2.training import make_optimizer
from tests.test_model import relative_error, small_config

WIDE = ("in_proj.weight", "out_proj.weight", "lm_head.weight")


def config(width: int, base: int | None = None, **changes) -> Mamba2Config:
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_heads": width // 8, "head_dim": 16, "n_groups": 1}
    return small_config(**{**shape, "weight_init": "mamba_ssm", "mup_base_width": base, **changes})


def step(model: Mamba2LM, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(ids[:, :-1], ids[:, 1:]).div(ids[:, 1:].numel()).backward()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    optimizer.step()
    optimizer.zero_grad()


def test_only_rows_of_B_and_C_and_the_head_are_scaled_at_first():
    """By 1/√4 at four times the base width, the same draws."""
    plain, scaled = Mamba2LM(config(128), seed=1), Mamba2LM(config(128, base=32), seed=1)
    before, after = plain.state_dict(), scaled.state_dict()
    before["lm_head.weight"] /= 2
    for mixer in plain.mixers():
        _, _, B, C, _ = mixer.in_proj.weight.detach().split(mixer.in_proj_rows())
        B /= 2
        C /= 2
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_rates_of_matrices_that_read_the_width_fall_with_it_and_their_decay_stays():
    model = Mamba2LM(config(128, base=32))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in make_optimizer(model, 0.01, (0.9, 0.99), 0.5, rates={"dt": 10.0}).param_groups:
        for name in map(names.get, group["params"]):
            expected = 0.01 / 4 if name.endswith(WIDE) else 0.1 if name.endswith("dt_bias") else 0.01
            assert group["peak"] == expected, name
            decayed = name.endswith((*WIDE, "embeddings.weight"))
            assert group["peak"] * group["weight_decay"] == (0.005 if decayed else 0.0), name


def spectral_norms(model: Mamba2LM) -> dict[str, float]:
    """Of every part of every matrix but the embeddings, over √(fan_out / fan_in)."""
    norms = {}
    for name, parameter in model.named_parameters():
        if name.endswith(WIDE):
            rows = model.mixers()[0].in_proj_rows() if "in_proj" in name else (len(parameter),)
            for i, part in enumerate(parameter.detach().split(rows)):
                norms[f"{name} {i}"] = torch.linalg.matrix_norm(part, 2).item() * (part.shape[1] / part.shape[0]) ** 0.5
    return norms


def test_spectral_norms_of_weights_and_updates_go_as_the_root_of_fan_out_over_fan_in():
    """The condition of arXiv:2310.17813, by singular values at 8 times the base width, where a wrong scale is off by at
    least √8. Updates are those from zero, by a gradient of rank one."""
    found = []
    for width in (64, 512):
        model = Mamba2LM(config(width, base=64))
        initial, optimizer = spectral_norms(model), make_optimizer(model, 0.01, (0.9, 0.99), 0.0)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            sides = [torch.randn(size, generator=generator) for size in parameter.shape]
            parameter.grad = torch.outer(*sides) if parameter.dim() == 2 else torch.zeros_like(parameter)
            parameter.data.zero_()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        optimizer.step()
        found.append((initial, spectral_norms(model)))
    for base, wide in zip(*found, strict=True):
        assert all(2 / 3 < wide[part] / base[part] < 3 / 2 for part in base), (base, wide)


def test_at_the_base_width_muP_changes_nothing_to_the_bit():
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    trained = []
    for base in (None, 32):
        model = Mamba2LM(config(32, base), seed=2)
        optimizer = make_optimizer(model, 0.01, (0.9, 0.99), 0.1)
        for _ in range(2):
            step(model, optimizer, ids)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def activations(model: Mamba2LM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, the output of each mixer and the residual stream after the last."""
    found = {}
    hooks = [
        layer.mixer.register_forward_hook(lambda _, inputs, output, i=i: found.__setitem__(f"mixer {i}", output[0]))
        for i, layer in enumerate(model.backbone.layers)
    ]
    with torch.no_grad():
        found["logits"] = model(ids)
        found["residual"] = model.backbone.embeddings.weight[ids] + found["mixer 0"] + found["mixer 1"]
    for hook in hooks:
        hook.remove()
    return found


def powers(muP: bool) -> dict[tuple[str, int], float]:
    """By activation and number of steps: the power of the width, fitted from 64 to 512, with which it has changed."""
    widths, changes = (64, 128, 256, 512), {}
    ids = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0))
    for width in widths:
        model = Mamba2LM(config(width, 64 if muP else None), seed=3)
        optimizer, first = make_optimizer(model, 1e-3, (0.9, 0.99), 0.0), activations(model, ids)
        for steps in range(1, 5):
            step(model, optimizer, ids)
            for name, now in activations(model, ids).items():
                change = (now - first[name]).square().mean().sqrt().item()
                changes.setdefault((name, steps), []).append(change)
    return {key: np.polyfit(np.log(widths), np.log(change), 1)[0] for key, change in changes.items()}


def test_activations_move_as_far_at_every_width_with_muP_and_farther_with_width_without():
    """The coordinate check of arXiv:2203.03466, appendix D.1. The logits' change has a part of the initial head's,
    which falls as 1/√width."""
    without, scaled = powers(muP=False), powers(muP=True)
    for (name, steps), power in scaled.items():
        assert (-0.5 if name == "logits" else -0.1) < power < 0.1, (name, steps, power)
        assert without[name, steps] > 0.2, (name, steps, without[name, steps])


def test_a_muP_folder_opens_in_transformers_and_comes_back(tmp_path):
    model = Mamba2LM(config(64, base=32), seed=1)
    model.save_pretrained(tmp_path)
    assert Mamba2LM.from_pretrained(tmp_path).config == model.config and model.config.width_multiple == 2
    assert "mup_base_width" not in config(64).to_dict()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert relative_error(model(ids), Mamba2ForCausalLM.from_pretrained(tmp_path)(ids).logits) < 1e-4


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings false"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True}}, "layers without attention"),
        ({"weight_init": "transformers"}, "weight_init mamba_ssm without A=arange"),
        ({"factors_init": {"A": {"name": "arange"}}}, "weight_init mamba_ssm without A=arange"),
    ],
)
def test_what_has_no_rule_is_refused(changes, needed):
    with pytest.raises(ValueError, match=f"mup_base_width is 32, and needs {needed}"):
        config(64, base=32, **changes)
    config(64, **changes)


@pytest.mark.parametrize("base", [0, 1.5, True])
def test_a_base_width_must_be_a_whole_number(base):
    with pytest.raises(ValueError, match=r"mup_base_width is .*, and must be an integer of at least 1"):
        config(64, base)


def test_muon_whose_rule_is_another_is_refused():
    with pytest.raises(ValueError, match="muon does not go with the model's mup_base_width 32"):
        make_optimizer(Mamba2LM(config(64, base=32)), 0.01, (0.9, 0.99), 0.0, name="muon")
