"""Model folders: what is refused, by which name, and that nothing is ever half written."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba2.checkpoint import WEIGHTS
from mamba2.files import atomic_folder
from mamba2.model import Mamba2LM
from tests.test_model import small_config


@pytest.fixture
def folder(tmp_path):
    return Mamba2LM(small_config()).save_pretrained(tmp_path / "model")


def test_a_tied_head_is_left_out(tmp_path):
    folder = Mamba2LM(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_and_the_other_spelling_are_read(folder, prefix):
    expected = load_file(folder / WEIGHTS)
    renamed = {prefix + k.replace("embeddings", "embedding"): v for k, v in expected.items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    loaded = Mamba2LM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def damage(folder, kind):
    file = folder / WEIGHTS
    tensors = load_file(file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "missing tensor":
        del tensors["backbone.layers.1.mixer.D"]
        save_file(tensors, file)
    elif kind == "extra tensor":
        save_file({**tensors, "backbone.extra": torch.zeros(1)}, file)
    elif kind == "wrong shape":
        save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, file)
    elif kind in ("int64", "bool", "uint8"):
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(getattr(torch, kind))}, file)
    elif kind == "int8 in a pickle":
        file.unlink()
        torch.save(
            {**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, folder / "pytorch_model.bin"
        )
    elif kind == "keys that are no names":
        file.unlink()
        torch.save({**tensors, 7: torch.zeros(1)}, folder / "pytorch_model.bin")
    elif kind.startswith("index "):
        file.unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(kind.removeprefix("index "))
    elif kind == "no weights":
        file.unlink()
    elif kind == "wrong config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "n_groups": 3}))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("truncated", ValueError, "model.safetensors is not a readable safetensors file, perhaps cut short"),
        ("missing tensor", ValueError, "missing backbone.layers.1.mixer.D"),
        ("extra tensor", ValueError, "unexpected backbone.extra"),
        ("wrong shape", ValueError, r"lm_head.weight has shape \(3, 3\) instead of \(61, 32\)"),
        ("no weights", FileNotFoundError, "no model.safetensors in"),
        ("wrong config", ValueError, "n_groups is 3"),
        ("int64", ValueError, "model.safetensors .* lm_head.weight is I64, and weights must be floating"),
        ("bool", ValueError, "lm_head.weight is BOOL, and weights must be floating"),
        ("uint8", ValueError, "lm_head.weight is U8, and weights must be floating"),
        ("int8 in a pickle", ValueError, "pytorch_model.bin .* lm_head.weight is int8, and weights must be floating"),
        ("keys that are no names", ValueError, "pytorch_model.bin holds a tensor under the key 7"),
        ('index {"weight_map": {}}', ValueError, "index.json names no shard"),
        ('index {"weight_map": {"a": 5}}', ValueError, "index.json names 5 as a shard"),
        ('index {"weight_map": {"a": "x", "b": 5}}', ValueError, "index.json is not an index of shards"),
        ('index {"weight_map": {"a": [1]}}', ValueError, "index.json is not an index of shards"),
        ('index {"weight_map": ["a"]}', ValueError, "index.json is not an index of shards"),
        ("index [1]", ValueError, "index.json is not an index of shards"),
        ("index " + "[" * 100_000, ValueError, "index.json is not an index of shards"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(folder, kind, error, message):
    damage(folder, kind)
    with pytest.raises(error, match=message):
        Mamba2LM.from_pretrained(folder)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("-inf"), "float32"), (1e6, "float16")])
def test_weights_that_are_not_finite_are_named_and_refused_where_they_must_be(folder, capsys, value, dtype):
    Mamba2LM.from_pretrained(folder, dtype=getattr(torch, dtype), finite=True)
    assert capsys.readouterr().err == ""
    tensors = load_file(folder / WEIGHTS)
    tensors["backbone.layers.1.mixer.in_proj.weight"][3, 4] = value
    save_file(tensors, folder / WEIGHTS)
    named = f"model.safetensors: backbone.layers.1.mixer.in_proj.weight holds NaN or infinity in {dtype}"
    Mamba2LM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert named in capsys.readouterr().err
    with pytest.raises(ValueError, match=named):
        Mamba2LM.from_pretrained(folder, dtype=getattr(torch, dtype), finite=True)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        Mamba2LM.from_pretrained(tmp_path / "absent")


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert [file.name for file in tmp_path.rglob("*")] == ["a", "file"]
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(tmp_path / "a"):
        pass


FILL_THE_DISK = """
import resource, signal, sys
from mamba2.files import atomic_folder
from mamba2.model import Mamba2LM
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = Mamba2LM.from_pretrained(sys.argv[1])
model.backbone.norm_f.weight.data.fill_(7.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    model.save_pretrained(sys.argv[1])
except OSError as error:
    print(error)
    sys.exit(3)
"""


def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(folder):
    """A limit on the size of files stands for the full disk: the write fails half way in both."""
    assert resource.RLIMIT_FSIZE is not None
    before = (folder / WEIGHTS).read_bytes()
    result = subprocess.run([sys.executable, "-c", FILL_THE_DISK, str(folder)], capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert f"cannot write {folder / WEIGHTS}" in result.stdout
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", WEIGHTS]
