"""Model folders: what is refused, with which message, and that nothing is ever half written."""

import json
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba2.checkpoint.convert import convert
from mamba2.checkpoint.model_folder import WEIGHTS
from mamba2.files import atomic_folder
from mamba2.model import Mamba2LM
from tests.distributed_runs import spawn
from tests.test_model import small_config

BIN, INDEX, HEAD = "pytorch_model.bin", f"{WEIGHTS}.index.json", "lm_head.weight"
IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return Mamba2LM(small_config()).save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_and_the_other_spelling_are_read(folder, prefix):
    expected = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}  # not the file's own memory
    renamed = {prefix + k.replace("embeddings", "embedding"): v for k, v in expected.items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    loaded = Mamba2LM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, None, "no model.safetensors in"),
        (WEIGHTS, -100, "model.safetensors is not a readable safetensors file, perhaps cut short"),
        (
            WEIGHTS,
            {
                **dict.fromkeys(["backbone.layers.0.mixer.D", "backbone.layers.2.norm.weight"]),
                "backbone.more": torch.zeros(1),
                "backbone.norm_f.weight": torch.zeros(5),
            },
            r"missing backbone.layers.0.mixer.D, backbone.layers.2.norm.weight; unexpected backbone.more; "
            r"backbone.norm_f.weight has shape \(5,\) instead of \(32,\)",
        ),
        *(
            (
                name,
                {HEAD: torch.zeros(61, 32, dtype=dtype)},
                f"{name} .* {HEAD} is {said}, and weights must be floating",
            )
            for name, dtype, said in (
                (WEIGHTS, torch.int64, "I64"),
                (WEIGHTS, torch.bool, "BOOL"),
                (WEIGHTS, torch.uint8, "U8"),
                (BIN, torch.int8, "int8"),
            )
        ),
        (BIN, {7: torch.zeros(1)}, "pytorch_model.bin holds a tensor under the key 7"),
        (BIN, {"x": "text"}, "pytorch_model.bin holds no dictionary of tensors"),
        (BIN, [1, 2], "pytorch_model.bin holds no dictionary of tensors"),
        (BIN, {f"module.{HEAD}": torch.zeros(1)}, f"holds {HEAD} twice: as {HEAD} and as module.{HEAD}"),
        (INDEX, '{"weight_map": {}}', "index.json names no shard"),
        (INDEX, '{"weight_map": {"a": 5}}', "index.json names 5 as a shard"),
        (INDEX, '{"weight_map": {"a": "x", "b": 5}}', "index.json is not an index of shards"),
        (INDEX, '{"weight_map": {"a": [1]}}', "index.json is not an index of shards"),
        (INDEX, '{"weight_map": ["a"]}', "index.json is not an index of shards"),
        (INDEX, "{}", "index.json is not an index of shards"),
        (INDEX, "[1]", "index.json is not an index of shards"),
        (INDEX, "[" * 100_000, "index.json is not an index of shards"),
    ],
)
def test_damaged_weights_are_refused_by_name(folder, name, content, message):
    """`content` is text, how many bytes to keep, or what to change among the tensors, None being to leave one out."""
    tensors, whole = load_file(folder / WEIGHTS), (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    if isinstance(content, dict):
        content = {key: value for key, value in {**tensors, **content}.items() if value is not None}
    if isinstance(content, int):
        (folder / name).write_bytes(whole[:content])
    elif isinstance(content, str):
        (folder / name).write_text(content)
    elif content is not None:
        (save_file if name == WEIGHTS else torch.save)(content, folder / name)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=message):
        Mamba2LM.from_pretrained(folder)


def test_a_shard_that_is_missing_or_holds_other_tensors_is_named(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({HEAD: tensors.pop(HEAD)}, folder / "2.safetensors")
    save_file(tensors, folder / "1.safetensors")

    def load_with_head_in(shard: str) -> None:
        places = {**dict.fromkeys(tensors, "1.safetensors"), HEAD: shard}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        Mamba2LM.from_pretrained(folder)

    load_with_head_in("2.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names the shard 3\.safetensors, which is not in"):
        load_with_head_in("3.safetensors")
    with pytest.raises(ValueError, match=r"says that lm_head.weight lies in 1\.safetensors, which does not hold"):
        load_with_head_in("1.safetensors")


def test_a_tied_head_is_left_out_and_refused_where_it_differs(tmp_path):
    model = Mamba2LM(small_config(tie_word_embeddings=True))
    file = model.save_pretrained(tmp_path) / WEIGHTS
    tensors = load_file(file)
    assert HEAD not in tensors
    save_file({**tensors, HEAD: model.lm_head.weight.detach().clone()}, file)
    assert torch.equal(Mamba2LM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    save_file({**tensors, HEAD: model.lm_head.weight.detach() + 1}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embeddings"):
        Mamba2LM.from_pretrained(tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["MAMBA2_TEST_FOLDER"],)


def test_a_pickle_with_code_is_refused_and_not_run(folder, monkeypatch):
    monkeypatch.setenv("MAMBA2_TEST_FOLDER", str(folder / "run"))
    (folder / WEIGHTS).unlink()
    for write in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
        write({"x": Code()}, folder / BIN)
        with pytest.raises(ValueError, match=r"_model.bin (holds more than tensors and is refused|is not a read)"):
            Mamba2LM.from_pretrained(folder)
        assert not (folder / "run").exists()


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("-inf"), "float32"), (1e6, "float16")])
def test_weights_that_are_not_finite_are_named_and_refused_where_they_must_be(folder, capsys, value, dtype):
    options = {"dtype": getattr(torch, dtype)}
    Mamba2LM.from_pretrained(folder, **options, finite=True)
    assert capsys.readouterr().err == ""
    tensors = load_file(folder / WEIGHTS)
    tensors[IN_PROJ][3, 4] = value
    save_file(tensors, folder / WEIGHTS)
    named = f"model.safetensors: {IN_PROJ} holds NaN or infinity in {dtype}"
    Mamba2LM.from_pretrained(folder, **options)
    assert named in capsys.readouterr().err
    with pytest.raises(ValueError, match=named):
        Mamba2LM.from_pretrained(folder, **options, finite=True)


def test_a_wrong_config_and_an_absent_folder_are_named(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "n_groups": 3}))
    with pytest.raises(ValueError, match="n_groups is 3"):
        Mamba2LM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        Mamba2LM.from_pretrained(folder / "absent")


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


# -------------------------------------------------------------------------------------------- in a process of its own


def save_until_the_disk_is_full(folder: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails half way in both."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = Mamba2LM.from_pretrained(folder)
    model.backbone.norm_f.weight.data.fill_(7.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(OSError, match=f"cannot write {folder / WEIGHTS}"):
        model.save_pretrained(folder)


def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(folder):
    before = (folder / WEIGHTS).read_bytes()
    assert spawn(save_until_the_disk_is_full, 1, folder) == [0]
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", WEIGHTS]


def load_in_little_memory(folder: Path, dtype: torch.dtype, small: Path) -> None:
    Mamba2LM.from_pretrained(small, dtype=dtype)  # so that the libraries' own pages are in memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Mamba2LM.from_pretrained(folder, dtype=dtype)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    size = sum(p.nbytes for p in model.parameters())
    assert 0.5 * size < peak < size + 32 * 2**20


@pytest.mark.parametrize(("layout", "dtype"), [("transformers", torch.bfloat16), ("mamba-ssm", torch.float32)])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, folder, layout, dtype):
    """Of a model of 260 MB in float32, the resident set while it is read, mapped pages included."""
    with torch.device("meta"):
        model = Mamba2LM(small_config(vocab_size=60_000, hidden_size=512, num_heads=128))
    tensors = {key: torch.full(tensor.shape, 0.5) for key, tensor in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    large = model.save_pretrained(tmp_path / "large")
    if layout == "mamba-ssm":
        convert(large, tmp_path / "theirs", layout)
        large = tmp_path / "theirs"
    assert spawn(load_in_little_memory, 1, large, dtype, folder) == [0]
