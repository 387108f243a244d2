"""The folder of one run: its checkpoints, which of them are kept, and which one to resume from.

    OUT/metrics.jsonl   OUT/train.toml        every number logged; every option, in the form of a preset
    OUT/checkpoint-N/   OUT/latest  OUT/best  links to the last one and to the one with the lowest validation loss
    OUT/tensorboard/                          its event files, where asked for
    OUT-final/                                the trained model

A checkpoint is written and removed atomically: a folder named checkpoint-N is always complete.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mamba2.checkpoint.training_state import DamagedCheckpoint, read_state, write_state
from mamba2.distributed import ALONE, World
from mamba2.files import atomic_folder, temporary_name

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """Attributes: `path`, `final`. Every process of `world` calls `save` and `save_final`, rank 0 alone the rest."""

    def __init__(
        self, path: Path, keep: int = 5, keep_best: bool = True, keep_early: bool = False, world: World = ALONE
    ):
        """`keep`: how many of the last checkpoints to keep; `keep_best`: also the best one; `keep_early`: also those of
        steps 0, 1, 2, 4, 8, …"""
        self.path, self.final = path, path.with_name(path.name + "-final")
        self._world = world
        self._keep, self._keep_best, self._keep_early = keep, keep_best, keep_early

    def checkpoints(self) -> dict[int, Path]:
        """Checkpoint folders by step, in increasing order."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        matches = {CHECKPOINT.fullmatch(folder.name): folder for folder in found if folder.is_dir()}
        return dict(sorted((int(match[1]), folder) for match, folder in matches.items() if match))

    def lock(self) -> None:
        """Create the folder and lock it for this process, and delete the temporary files that killed runs left.

        Raises OSError when the folder cannot be written to or another run has locked it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise OSError(f"another run is training in {self.path}; choose another --output-dir") from None
        for leftover in (*self.path.glob(".*.tmp"), *self.path.parent.glob(f".{self.final.name}.*.tmp")):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def unlock(self) -> None:
        self._lock.release()

    def find(self, resume: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to resume from and its state. `resume` is a path, `auto` (the last intact one, None if there
        is no checkpoint) or `none`.

        Raises FileExistsError when it is `none` and there are checkpoints, FileNotFoundError when the path is missing,
        DamagedCheckpoint when that checkpoint, or every one here, is damaged.
        """
        found = self.checkpoints()
        if resume == "none":
            if found:
                raise FileExistsError(
                    f"{self.path} holds checkpoints of a run that did not end; --resume auto goes on from the last, "
                    "--overwrite removes them"
                )
            return None
        if resume != "auto":
            folder = Path(resume).resolve()
            return folder, read_state(folder)
        damage = []
        for folder in reversed(found.values()):
            try:
                state = read_state(folder)
            except DamagedCheckpoint as error:
                damage.append((folder, error))
                continue
            for damaged, error in damage:
                # The resumed run will write a checkpoint under this name; the damaged one is kept for inspection.
                aside = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
                print(f"warning: {error}; it is now {aside.name}, and {folder} is used in its place", flush=True)
            return folder, state
        if damage:
            problems = "; ".join(str(error) for _, error in damage)
            raise DamagedCheckpoint(f"no checkpoint in {self.path} is whole: {problems}. --overwrite begins anew")
        return None

    def clear(self, after: int = -1) -> None:
        """Remove the checkpoints of steps above `after`; without an argument, everything that a run writes."""
        for step, folder in self.checkpoints().items():
            if step > after:
                _remove(folder)
        if after < 0:
            for name in ("latest", "best", "metrics.jsonl", "train.toml"):
                (self.path / name).unlink(missing_ok=True)
            for folder in (self.final, self.path / "tensorboard"):
                if folder.exists():
                    _remove(folder)

    def save(self, step: int, state: dict[str, Any], best_step: int | None, write: Callable[[Path], None]) -> Path:
        """Write checkpoint-`step` with `write`, then `state`; update the links; remove old checkpoints."""
        folder = self.path / f"checkpoint-{step}"

        def write_all(temporary: Path) -> None:
            write(temporary)
            self._world.first(lambda: write_state(temporary, state))

        self._together(folder, write_all)
        self._world.first(lambda: self._tidy(folder, best_step))
        return folder

    def save_final(self, write: Callable[[Path], None]) -> None:
        self._together(self.final, write)

    def _together(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Call `write` in every process on one temporary folder, then rename it to `folder`."""
        with contextlib.ExitStack() as stack:
            write(self._world.first(lambda: stack.enter_context(atomic_folder(folder))))

    def _tidy(self, folder: Path, best_step: int | None) -> None:
        """Point the links at the new checkpoint `folder` and the best one, and remove checkpoints not to be kept."""
        _link(self.path / "latest", folder.name)
        found = self.checkpoints()
        if best_step in found:
            _link(self.path / "best", found[best_step].name)
        kept = {*list(found)[-self._keep :]}
        if self._keep_best:
            kept.add(best_step)
        if self._keep_early:
            kept |= {step for step in found if step & (step - 1) == 0}
        for step, old in found.items():
            if step not in kept:
                _remove(old)


def _link(link: Path, target: str) -> None:
    """Atomically point `link` at `target` in the same folder; not on Windows, where users may not make links."""
    if os.name == "nt":
        return
    temporary = temporary_name(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _remove(folder: Path) -> None:
    """Rename, then delete: if this is killed half way, no incomplete checkpoint is left."""
    shutil.rmtree(folder.rename(temporary_name(folder)))
