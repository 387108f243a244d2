"""Mamba2Config: what it refuses, what it keeps, and that its counts are those of the model it describes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import Mamba2Config as TheirConfig
from transformers import Mamba2ForCausalLM

from mamba2.config import Mamba2Config
from mamba2.model import flops_per_token, num_parameters

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("config", "tiny", "130m", "370m", "780m", "1.3b", "2.7b")
# 4 heads of 8 = 2 * 16
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3}
SMALL |= {"head_dim": 8, "num_heads": 4, "n_groups": 2, "state_size": 5}


def small(**changes) -> Mamba2Config:
    return Mamba2Config(**{**SMALL, **changes})


def transformers_model(config: Mamba2Config, folder: Path):
    """transformers' own model of what `config` writes, without memory for its weights."""
    config.save(folder)
    with torch.device("meta"):
        return Mamba2ForCausalLM(TheirConfig.from_pretrained(folder))


# ------------------------------------------------------------------------------------------------------ shipped configs


def test_the_study_model_is_the_published_one():
    config = Mamba2Config.from_json(CONFIGS / "config.json")
    assert num_parameters(config) == 40_070_368
    assert round(flops_per_token(config, 1024) / 1e6) == 196
    assert (config.d_inner, config.conv_dim, config.d_in_proj) == (768, 768 + 2 * 8 * 142, 2 * 768 + 2 * 8 * 142 + 24)


def test_tiny_is_one_to_two_million_parameters():
    assert 1e6 <= num_parameters(Mamba2Config.from_json(CONFIGS / "tiny.json")) <= 2e6


@pytest.mark.parametrize(
    ("name", "d_model", "n_layer"),
    [("130m", 768, 24), ("370m", 1024, 48), ("780m", 1536, 48), ("1.3b", 2048, 48), ("2.7b", 2560, 64)],
)
def test_published_sizes_have_the_shapes_of_mamba_ssm(name, d_model, n_layer):
    config = Mamba2Config.from_json(CONFIGS / f"{name}.json")
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (d_model, n_layer, 64)
    assert config.vocab_size == math.ceil(50277 / 16) * 16 and config.tie_word_embeddings
    assert config.with_weight_init("mamba_ssm") == config  # the other keys of that scheme are in the file, too
    # Mamba2's constructor: in_proj, conv with bias, dt_bias, A_log, D, norm, out_proj; then Block's norm
    d_in, n, h = 2 * d_model, 128, 2 * d_model // 64
    mixer = d_model * (2 * d_in + 2 * n + h) + (d_in + 2 * n) * 5 + 3 * h + d_in + d_in * d_model
    assert num_parameters(config) == n_layer * (mixer + d_model) + d_model + 50288 * d_model


@pytest.mark.parametrize("changes", [{"use_bias": True}, {"use_conv_bias": False}, {"tie_word_embeddings": True}])
def test_parameter_count_follows_the_options(changes, tmp_path):
    config = small(**changes)
    assert num_parameters(config) == transformers_model(config, tmp_path).num_parameters()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_come_back_byte_for_byte_and_count_what_transformers_does(name, tmp_path):
    config = Mamba2Config.from_json(CONFIGS / f"{name}.json")
    assert config.save(tmp_path / "copy.json").read_text() == (CONFIGS / f"{name}.json").read_text()
    assert num_parameters(config) == transformers_model(config, tmp_path).num_parameters()


# --------------------------------------------------------------------------------------------------------- JSON in, out


def test_a_folder_or_a_file_of_any_name_is_read(tmp_path):
    small().save(tmp_path / "model")
    small().save(tmp_path / "other.json")
    assert Mamba2Config.from_json(tmp_path / "model") == small()
    assert Mamba2Config.from_json(str(tmp_path / "model" / "config.json")) == small()
    assert Mamba2Config.from_json(tmp_path / "other.json") == small()


def test_unknown_keys_stay_unchanged_and_in_place():
    values = {"architectures": ["X"], "vocab_size": 50, "torch_dtype": "bfloat16", **SMALL, "nested": {"a": [1, None]}}
    config = Mamba2Config.from_dict(values)
    assert config.extra == {"architectures": ["X"], "torch_dtype": "bfloat16", "nested": {"a": [1, None]}}
    written = config.to_dict()
    assert list(written)[: len(values)] == list(values)
    assert {key: written[key] for key in values} == values


def test_codestral_file_of_transformers_4_is_read():
    """Its keys beyond the current set (rms_norm, norm_before_gate, time_step_rank, ...) and its bare Infinity."""
    text = """{"architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4,
        "eos_token_id": 0, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "mamba2",
        "n_groups": 8, "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64, "pad_token_id": 0,
        "rescale_prenorm_residual": false, "residual_in_fp32": true, "rms_norm": true, "state_size": 128,
        "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
        "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
        "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": false, "use_cache": true,
        "use_conv_bias": true, "vocab_size": 32768}"""
    values = json.loads(text)
    config = Mamba2Config.from_dict(values)
    assert num_parameters(config) == 7_285_403_648  # the published model
    del values["time_step_limit"]
    assert config.to_dict() == values


def test_absent_keys_take_the_defaults_of_transformers():
    theirs = TheirConfig()
    for field in dataclasses.fields(Mamba2Config):
        if field.name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            continue  # required here
        if hasattr(theirs, field.name):
            assert field.default == getattr(theirs, field.name), field.name


def test_own_keys_are_written_only_when_they_say_something():
    assert not {"weight_init", "dt_bias_init", "time_step_limit", "extra", "key_order"} & set(small().to_dict())
    record = {"name": "uniform", "seed": 42, "t_min": 0.001}
    config = small(dt_bias_init=record).with_weight_init("mamba_ssm")
    written = config.to_dict()
    assert (written["weight_init"], written["dt_bias_init"]) == ("mamba_ssm", record)
    assert (written["initializer_range"], written["rescale_prenorm_residual"]) == (0.02, True)
    assert Mamba2Config.from_dict(written) == config
    assert config.with_weight_init("transformers") == small(dt_bias_init=record)


@pytest.mark.parametrize("upper", [math.inf, "Infinity", "inf", {"__float__": "Infinity"}, None])
def test_every_spelling_of_no_upper_limit_is_read(upper):
    assert small(time_step_limit=[0.0, upper]).time_step_limit == (0.0, math.inf)
    assert small(time_step_limit=[0.01, upper]).time_step_limit == (0.01, math.inf)
    assert small(time_step_limit=None).time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize("limit", [(0.001, math.inf), (0.0, 0.5), (0.25, 1)])
def test_time_step_limit_survives_standard_json_here_and_in_transformers(limit, tmp_path):
    file = small(time_step_limit=limit).save(tmp_path)
    json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert Mamba2Config.from_json(tmp_path).time_step_limit == limit
    assert tuple(TheirConfig.from_pretrained(tmp_path).time_step_limit) == limit


def test_a_config_that_transformers_wrote_is_read(tmp_path):
    TheirConfig(**SMALL, time_step_limit=(0.01, math.inf)).save_pretrained(tmp_path)
    config = Mamba2Config.from_json(tmp_path)
    assert config.time_step_limit == (0.01, math.inf)
    assert dataclasses.replace(config, extra={}) == small(time_step_limit=(0.01, math.inf))


def test_saving_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    file = small().save(tmp_path)
    before = file.read_text()
    assert before.endswith("}\n")
    (tmp_path / "link").hardlink_to(file)  # sees whatever is written into the old file in place
    small(vocab_size=51).save(tmp_path)
    assert (tmp_path / "link").read_text() == before != file.read_text()
    (tmp_path / "link").replace(file)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        small(vocab_size=51).save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"] and file.read_text() == before


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"num_heads \* head_dim is 5 \* 8 = 40.* expand \* hidden_size = 2 \* 16 = 32"),
        ({"n_groups": 3}, "n_groups is 3, and must divide num_heads = 4"),
        ({"vocab_size": 0}, "vocab_size is 0, and must be an integer of at least 1"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"state_size": 5.0}, "state_size is 5.0"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"head_dim": None}, "head_dim is None"),
        ({"conv_kernel": 9}, "conv_kernel is 9, and must be an integer from 1 to 8"),
        ({"conv_kernel": 0}, "conv_kernel is 0"),
        ({"use_bias": 1}, "use_bias is 1, and must be true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0, and must be a finite number above 0"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan"),
        ({"initializer_range": True}, "initializer_range is True"),
        ({"time_step_min": 0.2}, "time_step_min is 0.2, and must be at most time_step_max = 0.1"),
        ({"time_step_max": math.inf}, "time_step_max is inf"),
        ({"time_step_limit": (0.5, 0.1)}, r"time_step_limit is \[0.5, 0.1\]"),
        ({"time_step_limit": (-1, 1)}, r"time_step_limit is \[-1.0, 1.0\]"),
        ({"time_step_limit": (math.nan, 1)}, "time_step_limit is"),
        ({"time_step_limit": (1,)}, r"time_step_limit is \(1,\), and must be two numbers"),
        ({"time_step_limit": "01"}, "time_step_limit is '01'"),
        ({"time_step_limit": [True, 1]}, "time_step_limit is"),
        ({"time_step_limit": [None, 1]}, "time_step_limit is"),
        ({"eos_token_id": 50}, "eos_token_id is 50, and must be an integer from 0 to 49"),
        ({"eos_token_id": [1, 99]}, "eos_token_id is 99"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
        ({"extra": {"rms_norm": False}}, "rms_norm is False, and only true"),
        ({"weight_init": "xavier"}, "weight_init is 'xavier', and must be one of transformers, mamba_ssm"),
        ({"dt_bias_init": "uniform"}, "dt_bias_init is 'uniform', and must be an object or null"),
        ({"dt_bias_init": {}}, "dt_bias_init.name is None, and must be the name"),
        ({"dt_bias_init": {"seed": 1}}, "dt_bias_init.name is None, and must be the name"),
        ({"dt_bias_init": {"name": ["uniform"]}}, r"dt_bias_init.name is \['uniform'\]"),
        ({"initializer_range": 1e300}, r"initializer_range is 1e\+300, .* from 1.18e-38 to 3.4e\+38"),
        ({"initializer_range": 10**400}, "initializer_range is 10000"),
        ({"initializer_range": 1e-320}, "initializer_range is 1e-320"),
        ({"layer_norm_epsilon": 1e-40}, "layer_norm_epsilon is 1e-40"),
        ({"time_step_max": 1e308}, r"time_step_max is 1e\+308"),
        ({"time_step_limit": (1e39, math.inf)}, r"time_step_limit is \[1e\+39, inf\]"),
        ({"time_step_limit": [{"a": 1}, 2]}, "time_step_limit is"),
        ({"time_step_limit": [0, 10**400]}, r"time_step_limit is \[0, 10000\d*\], and must be two numbers"),
        ({"time_step_limit": [0, 1e-300]}, r"time_step_limit is \[0.0, 1e-300\], .* that float32 holds"),
        ({"chunk_size": 10**30}, r"chunk_size is 10*, and must be an integer of at least 1 that int64 holds"),
        ({"vocab_size": {"a": 1}}, "vocab_size is {'a': 1}"),
        ({"hidden_act": {"name": "silu"}}, "hidden_act is {'name': 'silu'}"),
        ({"weight_init": ["transformers"]}, "weight_init is"),
    ],
)
def test_an_inconsistent_value_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_values_at_the_edge_of_what_is_allowed():
    small(conv_kernel=1, chunk_size=1, state_size=1, n_groups=4, hidden_act="swish", eos_token_id=[0, 49])
    small(bos_token_id=None, eos_token_id=None, pad_token_id=None, time_step_min=0.1, layer_norm_epsilon=1)


def test_another_model_type_or_format_is_refused():
    with pytest.raises(ValueError, match="model_type is 'llama', and only 'mamba2'"):
        Mamba2Config.from_dict({"model_type": "llama", **SMALL})
    with pytest.raises(ValueError, match="hidden_size, num_hidden_layers missing"):
        Mamba2Config.from_dict({"d_model": 768, "n_layer": 24, "vocab_size": 50277})
    with pytest.raises(ValueError, match="must be a JSON object of keys and values, got list"):
        Mamba2Config.from_dict([])


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config at .*nowhere"):
        Mamba2Config.from_json(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config at .*config\.json"):
        Mamba2Config.from_json(tmp_path)
    (tmp_path / "broken.json").write_text('{\n  "vocab_size": 50,\n  "hidden_size" 16\n}')
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON: line 3"):
        Mamba2Config.from_json(tmp_path / "broken.json")
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json: .*utf-8"):
        Mamba2Config.from_json(tmp_path / "latin.json")
    for text in ("[" * 100_000, '{"vocab_size": ' + "[" * 100_000 + "]" * 100_000 + "}"):
        (tmp_path / "deep.json").write_text(text)
        with pytest.raises(ValueError, match=r"deep\.json is nested too deeply"):
            Mamba2Config.from_json(tmp_path / "deep.json")
    (tmp_path / "wrong.json").write_text(json.dumps({**SMALL, "n_groups": 3}))
    with pytest.raises(ValueError, match=r"wrong\.json: n_groups is 3"):
        Mamba2Config.from_json(tmp_path / "wrong.json")


def test_a_config_cannot_be_changed_into_an_inconsistent_one():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().num_heads = 5
    with pytest.raises(ValueError, match="num_heads"):
        dataclasses.replace(small(), num_heads=5)
    with pytest.raises(ValueError, match="weight_init is 'xavier'"):
        small().with_weight_init("xavier")
