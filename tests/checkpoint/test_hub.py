"""Models on the hub, which is a folder here: what goes there, what comes back, what is refused. And the model card."""

import functools
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import Mamba2ForCausalLM

from mamba2.checkpoint import __main__ as command
from mamba2.checkpoint import model_folder
from mamba2.checkpoint.convert import convert
from mamba2.checkpoint.hub import fetch, push
from mamba2.generate import main as generate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer, save_tokenizer
from tests.test_model import IDS, small_config


def copy(source: Path, target: Path, allowed, ignored) -> None:
    names = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
    for name in filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=ignored):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that huggingface_hub's functions upload to and download from, with its own rules for patterns."""
    folder, cache = tmp_path / "hub", tmp_path / "cache"

    def upload(self, repo_id, folder_path, allow_patterns, ignore_patterns):
        assert (folder / repo_id).is_dir()
        copy(Path(folder_path), folder / repo_id, allow_patterns, ignore_patterns)

    def create(self, name, private, exist_ok):
        (folder / name).mkdir(parents=True, exist_ok=exist_ok)

    def download(name, revision, allow_patterns, ignore_patterns):
        if not (folder / name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nand more")
        copy(folder / name, cache / str(revision), allow_patterns, ignore_patterns)
        return str(cache / str(revision))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def model(tmp_path):
    model = Mamba2LM(small_config(vocab_size=257), seed=3, initialization="log_uniform+A=ones")
    folder = model.save_pretrained(tmp_path / "model")
    save_tokenizer(get_tokenizer("bytes"), folder)
    return model


def test_a_model_goes_to_the_hub_and_opens_by_its_name(hub, model, monkeypatch, capsys):
    for extra in ("optimizer/moments.safetensors", "rng.safetensors", "training_state.json", "pytorch_model.bin"):
        Path("model", extra).parent.mkdir(exist_ok=True)
        Path("model", extra).write_text("{}")
    monkeypatch.setattr(sys, "argv", ["checkpoint", "push", "model", "me/tiny"])
    command.main()
    assert "pushed model to https://huggingface.co/me/tiny" in capsys.readouterr().out
    files = {file.name for file in (hub / "me/tiny").rglob("*")}
    assert files == {"README.md", "config.json", "model.safetensors", "mamba2_tokenizer.json"}
    assert torch.equal(Mamba2LM.from_pretrained("me/tiny@v1")(IDS), model(IDS))
    monkeypatch.setattr(sys, "argv", ["generate", "me/tiny", "To", "--max-new-tokens", "2"])
    generate()
    assert capsys.readouterr().out.startswith("To")


def test_a_folder_comes_before_the_hub_and_pickles_never_come(hub, model):
    assert fetch("model") == Path("model") and fetch("absent") == Path("absent")
    Path("me").mkdir()
    assert fetch("me/absent") == Path("me/absent")  # a typing error in a path asks nobody
    with pytest.raises(FileNotFoundError, match=r"no model folder at you/none, and none from the hub: cannot find it$"):
        Mamba2LM.from_pretrained("you/none")
    (hub / "you/pickle").mkdir(parents=True)
    (hub / "you/pickle/pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match="you/pickle on the hub has no safetensors"):
        fetch("you/pickle")
    with pytest.raises(FileNotFoundError, match=r"no model folder at absent$"):
        push(Path("absent"), "me/tiny")
    with pytest.raises(ValueError, match="'tiny' is no name on the hub"):
        push(Path("model"), "tiny")
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        push(Path("model"), "me/tiny")


def test_a_hub_that_is_not_reached_is_a_sentence(model, tmp_path, monkeypatch):
    api = functools.partial(huggingface_hub.HfApi, endpoint="http://localhost:1", token="none")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    with pytest.raises(OSError, match="model did not get to http://localhost:1/me/tiny: "):
        push(tmp_path / "model", "me/tiny")


def test_the_card_is_one_that_the_hub_reads_and_replaces_nobody_elses(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = huggingface_hub.ModelCard.load(Path("model/README.md").resolve())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mamba2", "ssm"],
    }
    record = json.dumps(model.config.dt_bias_init)
    assert "# Mamba-2, log_uniform+A=ones" in card.text and f"| initialisation of dt_bias | `{record}` |" in card.text
    assert "| training | none recorded |" in card.text
    trained = Path("model/README.md").read_text().replace("none recorded", "8 steps")
    Path("model/README.md").write_text(trained)
    convert("model", "theirs", "transformers")
    assert Path("theirs/README.md").read_text() == trained
    model.save_pretrained("model")
    Path("model/README.md").write_text("My own words.")
    model.save_pretrained("model")
    assert Path("model/README.md").read_text() == "My own words."


@pytest.mark.parametrize("tied", [True, False])
def test_large_models_are_sharded_as_transformers_reads_and_writes(tmp_path, monkeypatch, tied):
    model = Mamba2LM(small_config(tie_word_embeddings=tied), seed=3)
    whole = model_folder.weights_sha256(model.save_pretrained(tmp_path / "model"))
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 30_000)
    folder = model.save_pretrained(tmp_path / "model")
    assert not (folder / "model.safetensors").exists() and len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert model_folder.weights_sha256(folder) != whole
    assert torch.equal(Mamba2LM.from_pretrained(folder)(IDS), model(IDS))
    loading = Mamba2ForCausalLM.from_pretrained(folder, output_loading_info=True)[1]
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    split = huggingface_hub.split_torch_state_dict_into_shards(
        {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")},
        max_shard_size=30_000,
        filename_pattern="model{suffix}.safetensors",
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    monkeypatch.undo()
    assert model_folder.weights_sha256(model.save_pretrained(folder)) == whole
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
