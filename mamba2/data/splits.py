"""Which split the name of a file, a folder or a split says, and the files of a folder by split.

The words are those that `datasets` knows. A word counts wherever it stands between other signs than letters: train.txt,
wiki.valid.txt, test-00000-of-00002.parquet, my_dev_set/. A folder's name goes before a file's. Where no name says a
split, all files are for training; where some do, the others are left out.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
VALIDATION_SPLITS = ("validation", "test")
WORDS = {word: split for split, words in KEYWORDS.items() for word in words}
LETTER = r"[^\W\d_]"
WORD = re.compile(rf"(?<!{LETTER})(?:{'|'.join(WORDS)})(?!{LETTER})", re.IGNORECASE)
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")

BOOKKEEPING = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
UNNAMED = "no split in the name, and others have one"
UNITS = ("files", "bytes", "rows")
SHOWN = 3  # names of files that the plan shows of each kind


class NoSplit(ValueError):
    """A source has not the split that was asked for, but those of `names`."""

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


def splits_said(name: str) -> set[str]:
    """The splits, of train, validation and test, that a name says."""
    return {WORDS[word.lower()] for word in WORD.findall(name)}


def choose_split(asked: str, names: Iterable[str], where: str | os.PathLike) -> str:
    """The one of `names` that is the split `asked`: by its name, as another word for it (dev for validation), or the
    only one that says it (train_sft for train).

    Raises NoSplit if there is none, ValueError if there are several.
    """
    names = list(names)
    split = WORDS.get(asked)
    for found in (
        [name for name in names if name == asked],
        [name for name in names if split and WORDS.get(name) == split],
        [name for name in names if split and splits_said(name) == {split}],
    ):
        if len(found) > 1:
            raise ValueError(
                f"{where} has several splits that say {asked}: {', '.join(found)}; choose by name what to encode "
                "(`python -m mamba2.data` takes --split and --validation-split)"
            )
        if found:
            return found[0]
    raise NoSplit(f"{where} has no split {asked!r}; it has {', '.join(names) or 'none'}", names)


def split_of(path: PurePath, root: PurePath) -> str | None:
    """The split of a file below the source `root`; None if the names say none. In the hub's layout,
    data/NAME-00000-of-00002.parquet, NAME is the split, whatever it says.

    Raises ValueError if they say several.
    """
    file = path.relative_to(root)
    folders = {split for part in file.parts[:-1] for split in splits_said(part)}
    said = folders or splits_said(file.name)
    if len(said) > 1:
        raise ValueError(
            f"{path} says several splits, {' and '.join(sorted(said))}; rename it, or move it into a folder whose name "
            "says one"
        )
    if file.parent == PurePath("data") and (shard := SHARD.match(file.name)):
        return WORDS.get(shard[1].lower(), shard[1])
    return next(iter(said), None)


@dataclass(frozen=True)
class Listing:
    """The files of a source: those of each split, and by the reason what is of none."""

    root: Path
    splits: dict[str, list[Path]]
    left_out: dict[str, list[Path]]

    def choose(self, asked: str, endings: str) -> str:
        """The split `asked` among those that are there; see `choose_split`. `endings`: of files that can be read."""
        if not self.splits:
            raise NoSplit(f"{self.root} has no split {asked!r}; it has no {endings} file", [])
        try:
            return choose_split(asked, self.splits, self.root)
        except NoSplit as error:
            if not (unnamed := self.left_out.get(UNNAMED)):
                raise
            more = f"and {len(unnamed)} files whose names say no split ({_names(unnamed, self.root)})"
            hint = "put them into a folder whose name says it, such as train"
            raise NoSplit(f"{error}, {more}: {hint}", error.names) from error

    def told(self) -> dict:
        """For the plan: how many files there are of each kind, how large, and the names of the first."""
        splits = {split: self._told(files) for split, files in self.splits.items()}
        for split, files in self.splits.items():
            splits[split]["bytes"] = sum(map(os.path.getsize, files))
        return {"splits": splits, "left_out": {why: self._told(paths) for why, paths in self.left_out.items()}}

    def _told(self, paths: list[Path]) -> dict:
        return {"files": len(paths), "names": _names(paths, self.root)}


def list_files(root: Path, files: Iterable[Path], is_data: Callable[[Path], bool], endings: str) -> Listing:
    """Sort `files`, which lie below `root`, by split. If no name says a split, all of them are for training.

    Raises ValueError if a name says several splits, or one file belongs to two; FileNotFoundError for a broken link.
    """
    splits: dict[str | None, list[Path]] = {}
    left_out: dict[str, list[Path]] = {}
    seen: dict[tuple[int, int], tuple[str | None, Path]] = {}
    for file in files:
        if is_hidden(file):
            left_out.setdefault("hidden", []).append(file)
        elif file.name in BOOKKEEPING:
            left_out.setdefault("bookkeeping", []).append(file)
        elif file.is_dir():
            left_out.setdefault("folders that are not entered", []).append(file)
        elif not is_data(file):
            left_out.setdefault(f"not {endings}", []).append(file)
        elif file.is_symlink() and not file.exists():
            raise FileNotFoundError(f"{file} is a link to {os.readlink(file)}, which is not there")
        elif not file.is_file():
            left_out.setdefault("no files but devices", []).append(file)
        else:
            split = split_of(file, root)
            status = file.stat()
            other, first = seen.setdefault((status.st_dev, status.st_ino), (split, file))
            if first != file and split and other and split != other:
                raise ValueError(f"{first} and {file} are the same file, once in {other} and once in {split}")
            if first == file or split != other:
                splits.setdefault(split, []).append(file)
            else:
                left_out.setdefault("the same file under another name", []).append(file)
    if not any(split and splits_said(split) for split in splits):
        unsaid = sorted(file for some in splits.values() for file in some)
        return Listing(root, {"train": unsaid} if unsaid else {}, left_out)
    if unnamed := splits.pop(None, None):
        left_out[UNNAMED] = unnamed
    return Listing(root, splits, left_out)


def is_hidden(path: Path) -> bool:
    """Whether a program keeps it for itself: .x, and folders like __MACOSX."""
    return path.name.startswith(".") or (path.name.startswith("__") and path.is_dir())


def walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below a folder in the order of their paths, through links too; and the folders that are not entered:
    hidden ones, and links back to where they lie in."""
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in above:
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_hidden(path):
            yield from walk(path, (*above, identity))
        else:
            yield path


def stats_hash(files: Iterable[Path], *more: str) -> str:
    """Hash of the path, size and time of change of every file, and of `more`."""
    parts = list(more)
    for file in files:
        if file.is_file():
            status = file.stat()
            parts.append(f"{file} {file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def describe(sources: dict[str, dict]) -> list[str]:
    """Lines for the plan: the files behind "train" and those held out, and what is left out and why. `sources`: of each
    its `split` and what `Listing.told` says."""
    told, used = sources.get("train", {}), {}
    for name, source in sources.items():
        used.setdefault(source["split"], name)
    splits = told.get("splits", {})
    lines = [
        f"{used.get(split, 'left out'):12} split {split}{_counted(splits[split])}"
        for split in dict.fromkeys([*used, *splits])
        if split in splits
    ]
    return lines + [f"{'left out':12} {why}{_counted(what)}" for why, what in told.get("left_out", {}).items()]


def _counted(what: dict) -> str:
    counts = [f"{what[unit]:,} {unit[:-1] if what[unit] == 1 else unit}" for unit in UNITS if unit in what]
    return (": " if counts else "") + ", ".join(counts) + (f" ({what['names']})" if "names" in what else "")


def _names(files: list[Path], root: Path) -> str:
    shown = [os.fsencode(file.relative_to(root)).decode("utf-8", "replace") for file in files[:SHOWN]]
    return ", ".join(shown + ["…"] * (len(files) > SHOWN))
