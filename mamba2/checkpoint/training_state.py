"""What a run needs beside the model to go on to the bit, without pickle.

checkpoint-N/   model.safetensors, config.json, the tokenizer      a model folder like any other
                optimizer.safetensors                              exp_avg.NAME, exp_avg_sq.NAME, step
                rng.safetensors                                    torch's generators: cpu, cuda
                trainer_state.json                                 written last: counters, what the run was, and size
                                                                   and sha256 of every other file
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from mamba2.checkpoint.files import save_tensors

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written: something is missing, cut short or changed."""


# ----------------------------------------------------------------------------------------------------- the whole folder


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write trainer_state.json: `state`, and size and sha256 of every file that lies in `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    record = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    text = json.dumps({**state, "files": record}, indent=1, allow_nan=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of trainer_state.json, after every file has been found as it was written.

    Raises FileNotFoundError when there is no such folder, DamagedCheckpoint naming the file that is not as it was.
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
        if _sha256(file) != written["sha256"]:
            raise DamagedCheckpoint(f"{folder} is damaged: the contents of {name} have changed (sha256)")
    return state


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ optimizer, generators


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's moments under the parameters' names; empty before the first step."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def optimizer_step(optimizer: torch.optim.AdamW) -> int:
    """Updates that AdamW has made, which its bias correction needs: the same number for every parameter."""
    return max((int(state["step"].item()) for state in optimizer.state.values()), default=0)


def start_moments(model: nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
    """Give the optimizer moments of zero after `step` updates, to be filled from a checkpoint."""
    for parameter in model.parameters():
        zeros = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        # Where AdamW itself keeps it when it is fused: on the parameter's device, in float32.
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **zeros}


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_tensors(model, optimizer).items()}
    save_tensors(folder / OPTIMIZER, {**tensors, "step": torch.tensor(optimizer_step(optimizer))})


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    tensors = load_file(folder / OPTIMIZER)
    step = int(tensors.pop("step"))
    if step == 0:
        return
    start_moments(model, optimizer, step)
    wanted = optimizer_tensors(model, optimizer)
    if wanted.keys() != tensors.keys():
        raise ValueError(f"{folder / OPTIMIZER} does not fit the model: {sorted(wanted.keys() ^ tensors.keys())}")
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])


def save_rng(folder: Path) -> None:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_tensors(folder / RNG, tensors)


def load_rng(folder: Path) -> None:
    tensors = load_file(folder / RNG)
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
