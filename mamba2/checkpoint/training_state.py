"""The files of a checkpoint from which a run resumes with the same bits. No pickle.

checkpoint-N/   model.safetensors, config.json, the tokenizer      a model folder
                optimizer/*.safetensors                            exp_avg.NAME, exp_avg_sq.NAME, …; one file, or shards
                rng.safetensors                                    the state of torch's generators: cpu, cuda
                trainer_state.json                                 written last: counters, the run's identity, and size
                                                                   and sha256 of every other file
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from mamba2.files import atomic_file, save_tensors, sha256

STATE = "trainer_state.json"
OPTIMIZER = "optimizer"
RNG = "rng.safetensors"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are missing, truncated or changed."""


# ----------------------------------------------------------------------------------------------------- the whole folder


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write trainer_state.json: `state`, and size and sha256 of every file in `folder`."""
    record = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({**state, "files": record}, indent=1, allow_nan=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of trainer_state.json, after checking size and sha256 of every file.

    Raises FileNotFoundError when the folder is missing, DamagedCheckpoint naming the file that does not match.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {folder}")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = state["files"].items()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} holds no {STATE}: it cannot be resumed from") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / STATE} is damaged: {error!r}") from error
    for name, written in files:
        file = folder / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is missing")
        if file.stat().st_size != written["size"]:
            size = f"{file.stat().st_size} bytes instead of {written['size']}"
            raise DamagedCheckpoint(f"{folder} is damaged: {name} has {size}")
        if sha256(file) != written["sha256"]:
            raise DamagedCheckpoint(f"{folder} is damaged: the contents of {name} have changed (sha256)")
    return state


# ------------------------------------------------------------------------------------------------ optimizer, generators


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as KEY.NAME of the parameter, without `step`: the run counts its updates itself."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
        if key != "step"
    }


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's moments, if it has made an update. If they are sharded, every process must call this."""
    tensors = optimizer_tensors(model, optimizer)
    if not tensors:
        return
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        with _system_errors(f"cannot write {folder / OPTIMIZER}"):
            writer = dcp.HuggingFaceStorageWriter(str(folder / OPTIMIZER), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
        return
    (folder / OPTIMIZER).mkdir(exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(folder / OPTIMIZER / "moments.safetensors", tensors)


@contextmanager
def _system_errors(what: str) -> Iterator[None]:
    """Turn a CheckpointException, which holds a traceback for every process, into a one-line OSError if all its causes
    are OSErrors."""
    try:
        yield
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        if not all(isinstance(cause, OSError) for cause in causes.values()):
            raise
        raise OSError(f"{what}: {'; '.join(f'process {rank}: {cause}' for rank, cause in causes.items())}") from error


def sort_headers(folder: Path) -> None:
    """Sort the metadata in the headers of the optimizer's shards. safetensors writes it in random order, and equal
    moments should give equal files."""
    for file in (folder / OPTIMIZER).glob("*.safetensors"):
        with open(file, "r+b") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) > length:
                raise ValueError(f"the header of {file} is not as safetensors writes it")
            opened.seek(8)
            opened.write(text.ljust(length))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Restore the optimizer's state after `updates` updates. The shards in the files may differ from those in memory.

    Raises DamagedCheckpoint naming a parameter that only the model or only the checkpoint has.
    """
    if updates == 0:
        return
    parameters, stored = dict(model.named_parameters()), _stored(folder)
    keys: dict[str, list[str]] = {}
    for tensor in stored:
        key, _, name = tensor.partition(".")
        keys.setdefault(name, []).append(key)
    if wrong := sorted(keys.keys() ^ parameters.keys()):
        raise DamagedCheckpoint(f"{folder / OPTIMIZER} does not fit the model: {wrong[0]}")
    for name, parameter in parameters.items():
        state = {key: torch.zeros_like(parameter) for key in keys[name]}
        if "exp_avg" in state:
            # As fused AdamW keeps it: on the parameter's device, in float32.
            state["step"] = torch.tensor(float(updates), device=parameter.device)
        optimizer.state[parameter] = state
    _read_moments(folder, optimizer_tensors(model, optimizer))


def _stored(folder: Path) -> dict[str, Any]:
    """Size and dtype of every stored tensor of the optimizer, by name."""
    return dcp.HuggingFaceStorageReader(str(folder / OPTIMIZER)).read_metadata().state_dict_metadata


def _read_moments(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors`, whole or sharded, from the optimizer's files in the checkpoint `folder`."""
    reader = dcp.HuggingFaceStorageReader(str(folder / OPTIMIZER))
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with _system_errors(f"cannot read {folder / OPTIMIZER}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `no_dist`, on purpose
        dcp.load(tensors, storage_reader=reader, no_dist=not sharded)


def export_optimizer(folder: Path, file: Path) -> int:
    """Write the optimizer's moments of a checkpoint, sharded or not, into one safetensors file.

    Returns the number of tensors. Raises FileNotFoundError, FileExistsError, DamagedCheckpoint, and ValueError when
    the optimizer had made no update yet.
    """
    if file.exists():
        raise FileExistsError(f"{file} exists already and is not overwritten")
    read_state(folder)
    if not (folder / OPTIMIZER).is_dir():
        raise ValueError(f"{folder} holds no moments: the optimizer had made no update")
    stored = _stored(folder).items()
    tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in stored}
    _read_moments(folder, tensors)
    with atomic_file(file) as temporary:
        save_tensors(temporary, tensors)
    return len(tensors)


def rng_tensors() -> dict[str, torch.Tensor]:
    """The state of torch's generators in this process."""
    tensors = {"cpu": torch.get_rng_state()}
    if gpu := torch.accelerator.current_accelerator(check_available=True):
        tensors[gpu.type] = torch.get_device_module(gpu).get_rng_state()
    return tensors


def save_rng(folder: Path, of_ranks: list[dict[str, torch.Tensor]]) -> None:
    """Write what `rng_tensors` returned in each process, by rank."""
    tensors = {f"{name}.{rank}": tensor for rank, of_rank in enumerate(of_ranks) for name, tensor in of_rank.items()}
    save_tensors(folder / RNG, tensors)


def load_rng(folder: Path, rank: int) -> None:
    """Set this process's generators. A rank that the saved run did not have keeps its own."""
    tensors = load_file(folder / RNG)
    if f"cpu.{rank}" in tensors:
        torch.set_rng_state(tensors[f"cpu.{rank}"])
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if gpu is not None and f"{gpu.type}.{rank}" in tensors:
        torch.get_device_module(gpu).set_rng_state(tensors[f"{gpu.type}.{rank}"])
