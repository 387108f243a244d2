"""Files and folders that are written whole or not at all: under a temporary name, flushed to disk, then renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def flush(path: Path) -> None:
    """fsync a file or a folder. Contents must reach the disk before the rename that makes them visible.

    Windows flushes files that are open for writing only, and no folders.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def save_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError naming it when that fails."""
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error
    # safetensors makes files that only the owner can read; use the user's umask as for every other file.
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, for what is being written or deleted."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write. It is flushed and renamed to `path` at the end, or deleted after an error."""
    temporary = temporary_name(path)
    try:
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            flush(written)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file in UTF-8. After an error the old file is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """`atomic_file` for a folder: yield an empty temporary folder to fill. Raises FileExistsError if `path` exists."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already and is not overwritten; remove it, or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had this one's id
        temporary.mkdir()
        yield temporary
