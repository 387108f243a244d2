"""Model folders on the Hugging Face hub: a name instead of a folder, and how a folder gets there. safetensors only."""

import os
import re
from pathlib import Path

from mamba2.checkpoint.weights import find_weights

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = ["*.json", "*.safetensors", "README.md"]


def fetch(name: str | os.PathLike) -> Path:
    """The folder `name`; or if there is none and `name` reads OWNER/MODEL or OWNER/MODEL@REVISION, without a folder
    OWNER here, a copy of that model on the hub, kept in huggingface_hub's cache.

    Raises FileNotFoundError if there is neither, ValueError if the model on the hub has no safetensors.
    """
    folder, match = Path(name), NAME.fullmatch(str(name))
    if folder.exists() or match is None or folder.parent.exists():
        return folder
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        download = huggingface_hub.snapshot_download
        copy = Path(download(match[1], revision=match[2], allow_patterns=FILES, ignore_patterns="*/*"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no model folder at {name}, and none from the hub: {reason}") from error
    if not any(copy.glob("*.safetensors")):
        raise ValueError(f"{name} on the hub has no safetensors, and pickles are not loaded from there")
    return copy


def push(folder: Path, name: str, private: bool = False) -> str:
    """Create the model OWNER/MODEL on the hub, if it is not there, and upload a folder to it. Returns its address.

    Raises FileNotFoundError if the folder holds no weights, ValueError if they are pickles or `name` is no such name,
    OSError if the hub does not take it.
    """
    match = NAME.fullmatch(name)
    if match is None or match[2] is not None:
        raise ValueError(f"{name!r} is no name on the hub, which reads OWNER/MODEL")
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    weights = find_weights(folder)
    if pickles := [file.name for file in weights if file.suffix != ".safetensors"]:
        raise ValueError(f"{folder / pickles[0]} is a pickle; `convert --to transformers` makes safetensors of it")
    import huggingface_hub

    files = [file.name for file in weights] + ["config.json", "*tokenizer*.json", "*.index.json", "README.md"]
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, ignore_patterns="*/*")
    except Exception as error:  # of the network, in classes of the client that huggingface_hub has at the moment
        raise OSError(f"{folder} did not get to {hub.endpoint}/{name}: {error}") from error
    return f"{hub.endpoint}/{name}"
