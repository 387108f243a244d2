"""Checkpoints of transformers, mamba-ssm and mistral-inference: equal logits here, files that load there strictly."""

import json
import random
import sys
import unicodedata

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2ForCausalLM
from transformers import Mamba2Config as TheirConfig

from mamba2.checkpoint import read_model
from mamba2.checkpoint.__main__ import main
from mamba2.checkpoint.convert import convert
from mamba2.checkpoint.foreign import from_codestral, from_mamba_ssm
from mamba2.checkpoint.inspect import report
from mamba2.config import Mamba2Config
from mamba2.model import SHAPES, Mamba2LM, num_parameters
from mamba2.tokenizer import get_tokenizer, load_tokenizer, save_tokenizer
from tests.decoding.test_decoding import make_model, random_ids
from tests.oracles import mamba_ssm_classes, mamba_ssm_logits
from tests.test_model import relative_error, small_config
from tests.test_tokenizer import random_texts


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in what every project initialises to one or zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


def mamba_ssm_model(vocab: int = 61, tied: bool = True, d_model: int = 32, **ssm_cfg) -> torch.nn.Module:
    classes = mamba_ssm_classes()
    ssm_cfg = {"layer": "Mamba2", **ssm_cfg}
    config = classes.MambaConfig(d_model=d_model, n_layer=2, vocab_size=vocab, ssm_cfg=ssm_cfg, tie_embeddings=tied)
    torch.manual_seed(1)
    return scatter(classes.MambaLMHeadModel(config))


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return getattr(result, "logits", result)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {}),
        (False, {"ngroups": 8}),
        (True, {"ngroups": 2, "dt_limit": (0.01, 0.05), "bias": True, "conv_bias": False, "d_conv": 3, "expand": 4}),
    ],
)
def test_a_checkpoint_of_mamba_ssm_loads_with_equal_logits_and_goes_back(tmp_path, tied, options):
    theirs = mamba_ssm_model(tied=tied, headdim=8, d_state=16, chunk_size=16, **options)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = Mamba2LM.from_pretrained(tmp_path / "theirs")
    assert ours.config.vocab_size == 64 and ours.config.n_groups == options.get("ngroups", 1)
    ids = random_ids(ours, 1, 20)
    expected = mamba_ssm_logits(theirs, ids)
    assert relative_error(logits(ours, ids), expected) < 1e-5

    convert(tmp_path / "theirs", tmp_path / "back", "mamba-ssm")
    back = mamba_ssm_classes().MambaLMHeadModel.from_pretrained(str(tmp_path / "back"))  # strict
    for (name, a), (_, b) in zip(back.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert Mamba2LM.from_pretrained(tmp_path / "back").config == ours.config

    convert(tmp_path / "theirs", tmp_path / "hub", "transformers")
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert isinstance(hub, Mamba2ForCausalLM)
    assert relative_error(logits(hub, ids), expected) < 1e-5


COMMON = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}


def test_the_layout_of_state_spaces_models_pads_the_vocabulary():
    values = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    values |= {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0}
    config = from_mamba_ssm({**values, **COMMON, "torch_dtype": "float16"})
    shape = (config.vocab_size, config.num_heads, config.head_dim, config.n_groups, config.state_size)
    assert shape == (50288, 24, 64, 1, 128)
    assert config.tie_word_embeddings and config.eos_token_id == 0
    assert num_parameters(config) == num_parameters(Mamba2Config.from_json("configs/130m.json"))


def test_codestrals_layout_loads(tmp_path):
    """params.json beside tensors whose names mistral-inference prefixes, as its Mamba class holds mamba-ssm's model."""
    theirs = mamba_ssm_model(vocab=40, tied=False, d_model=64, ngroups=2)
    tensors = {f"model.{key}": tensor.bfloat16() for key, tensor in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    params = {"dim": 64, "n_layers": 2, "vocab_size": 40, "pad_vocab_size_multiple": 1, "tie_embeddings": False}
    params |= {"model_type": "mamba", "n_groups": 2, **COMMON}
    (tmp_path / "params.json").write_text(json.dumps(params))
    ours = Mamba2LM.from_pretrained(tmp_path)
    ids = random_ids(ours, 1, 10)
    theirs.load_state_dict({key.removeprefix("model."): t.float() for key, t in tensors.items()}, strict=True)
    assert relative_error(logits(ours, ids), mamba_ssm_logits(theirs, ids)) < 1e-5
    half = Mamba2LM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_transformers_leaves_the_weights_of_either_scheme_as_they_are(tmp_path):
    model = Mamba2LM(small_config().with_weight_init("mamba_ssm"))
    theirs = Mamba2ForCausalLM.from_pretrained(model.save_pretrained(tmp_path))
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(("groups", "tied"), [(1, True), (8, False)])
def test_a_sharded_checkpoint_of_transformers_loads_and_goes_back(tmp_path, groups, tied):
    small_config(n_groups=groups, tie_word_embeddings=tied).save(tmp_path)
    torch.manual_seed(0)
    theirs = scatter(Mamba2ForCausalLM(TheirConfig.from_pretrained(tmp_path)))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = Mamba2LM.from_pretrained(tmp_path / "theirs")
    ids = random_ids(ours, 2, 20)
    assert relative_error(logits(ours, ids), logits(theirs, ids)) < 1e-5
    convert(tmp_path / "theirs", tmp_path / "back", "transformers")
    back, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (_, b) in zip(back.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_conversion_can_store_half_precision(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    for layout, read in (
        ("transformers", lambda folder: load_file(folder / "model.safetensors")),
        ("mamba-ssm", lambda folder: torch.load(folder / "pytorch_model.bin", weights_only=True)),
    ):
        convert(tmp_path / "model", tmp_path / layout, layout, dtype=torch.bfloat16)
        assert all(t.dtype == torch.bfloat16 for t in read(tmp_path / layout).values())
        back = Mamba2LM.from_pretrained(tmp_path / layout)
        assert torch.equal(back.lm_head.weight, model.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize("name", ["bytes", "gpt2", "gpt-neox-20b"])
def test_a_folder_for_transformers_has_a_tokenizer_with_the_same_ids(tmp_path, name):
    ours = get_tokenizer(name)
    model = Mamba2LM(small_config(vocab_size=50304, hidden_size=8, num_heads=2, n_groups=1, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(ours, tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path / "hub", "transformers") is ours
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert theirs.eos_token_id == ours.eot_id and len(theirs) == ours.vocab_size
    generator = random.Random(1)
    texts = random_texts(2000) + ["".join(chr(generator.randint(1, 0x2FFF)) for _ in range(20)) for _ in range(500)]
    if ours.nfc:  # the library's tables of Unicode and Python's are not of one version
        library = theirs.backend_tokenizer.normalizer
        known = [text for text in texts if library.normalize_str(text) == unicodedata.normalize("NFC", text)]
        assert len(known) > 0.99 * len(texts)
        texts = known
    for text, ids in zip(texts, theirs(texts)["input_ids"]):
        assert ours.encode(text) == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids)
    assert load_tokenizer(tmp_path / "hub") is ours
    if name == "bytes":
        return  # single bytes without a rule for words: a file that only the library reads
    again = get_tokenizer(tmp_path / "hub")  # the file itself
    assert all(again.encode(text) == ours.encode(text) for text in texts[:300])
    convert(tmp_path / "hub", tmp_path / "again", "transformers", tokenizer=str(tmp_path / "hub"))
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("a  b")["input_ids"] == ours.encode("a  b")


# ------------------------------------------------------------------------------------------------------------ bad input


MAMBA_SSM = {"d_model": 32, "n_layer": 1, "vocab_size": 61, "ssm_cfg": {"layer": "Mamba2", "headdim": 8}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {}}, "ssm_cfg.layer is 'Mamba1'"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \(1,\), and must be"),
        ({"d_intermediate": 64}, "d_intermediate is 64"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "new": 1}}, "keys that are not known: new"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, r"num_heads \* head_dim"),
        ({"ssm_cfg": ["Mamba2"]}, r"ssm_cfg is \['Mamba2'\], and must be an object"),
        ({"ssm_cfg": "Mamba2"}, "ssm_cfg is 'Mamba2', and must be an object"),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, r"ssm_cfg.layer is \['Mamba2'\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": "8"}}, "ssm_cfg.headdim is '8', and must be an integer"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "ssm_cfg.headdim is 0, and must be an integer of at least 1"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": None}}, "ssm_cfg.headdim is None"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": {"x": 1}}}, "ssm_cfg.headdim is {'x': 1}"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "expand": 1.5}}, "ssm_cfg.expand is 1.5"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": "1"}}, "n_groups is '1'"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "dt_limit": 3}}, "time_step_limit is 3"),
        ({"vocab_size": None}, "vocab_size is None, and must be an integer"),
        ({"d_model": [32]}, r"d_model is \[32\], and must be an integer"),
        ({"n_layer": True}, "n_layer is True, and must be an integer"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0, and must be an integer of at least 1"),
        ({"tie_embeddings": "yes"}, "tie_word_embeddings is 'yes', and must be true or false"),
        ({"norm_epsilon": 1e-6, "new": 1}, "with keys that are not known: new, norm_epsilon"),
        ({"n_layer": 10**8}, r"a model of .* parameters takes .* GB, and this machine has"),
    ],
)
def test_what_of_mamba_ssm_is_not_implemented_is_named(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**MAMBA_SSM, **changes}))
    with pytest.raises((ValueError, MemoryError), match=message) as error:
        read_model(tmp_path, SHAPES)
    assert "config.json" in str(error.value) or error.type is MemoryError


def test_other_models_of_mistral_are_refused():
    with pytest.raises(ValueError, match=r"model_type 'transformer', missing \['n_groups'\]"):
        from_codestral({"dim": 8, "n_layers": 1, "vocab_size": 10, "model_type": "transformer"})


def test_what_a_layout_cannot_say_is_refused_and_nothing_is_left(tmp_path):
    Mamba2LM(small_config(layer_norm_epsilon=1e-6)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="layer_norm_epsilon is 1e-06"):
        convert(tmp_path / "model", tmp_path / "out", "mamba-ssm")
    with pytest.raises(ValueError, match="tokenizer gpt2 has 50257 ids and the model only 61 rows"):
        convert(tmp_path / "model", tmp_path / "out", "transformers", tokenizer="gpt2")
    with pytest.raises(ValueError, match="layout 'onnx' is unknown"):
        convert(tmp_path / "model", tmp_path / "out", "onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    with pytest.raises(FileExistsError):
        convert(tmp_path / "model", tmp_path / "model", "transformers")


# --------------------------------------------------------------------------------------------------- inspect, memory


@pytest.mark.parametrize("tied", [False, True])
def test_inspect_prints_config_parameters_and_time_constants(tmp_path, monkeypatch, capsys, tied):
    model = Mamba2LM(small_config(tie_word_embeddings=tied), initialization="halflife")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(tmp_path)])
    main()
    text = capsys.readouterr().out
    assert f"{num_parameters(model.config):,} parameters" in text
    assert text.count(f"{num_parameters(model.config):,}\n") == 1  # the sum of the table
    assert '"state_size": 14' in text and "half-life" in text and "initialised by: halflife" in text
    assert "backbone.layers.*.mixer.in_proj.weight" in text
    convert(tmp_path, tmp_path / "theirs", "mamba-ssm")
    theirs, ours = (report(folder)[0].splitlines()[-6:] for folder in (tmp_path / "theirs", tmp_path))
    assert theirs == ours and ours[-1] == "suspicious: nothing"


def test_convert_is_a_command(tmp_path, monkeypatch, capsys):
    Mamba2LM(small_config(vocab_size=257)).save_pretrained(tmp_path / "a")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "transformers", "--tokenizer", "bytes"]
    monkeypatch.setattr(sys, "argv", ["checkpoint", *arguments])
    main()
    assert "tokenizer bytes" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "b").eos_token_id == 256
