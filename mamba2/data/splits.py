"""Which split the name of a file, a folder or a split says, and the files of a folder by split.

The words are those that `datasets` knows. A word counts wherever it stands between other signs than letters: train.txt,
wiki.valid.txt, test-00000-of-00002.parquet, my_dev_set/. A folder's name goes before a file's. Where no name says a
split, all files are for training, unless one may mean held out; where some do, the others are left out, and so is what
copies a file held out.
"""

import filecmp
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
# What `datasets` does not know, but a reader takes for held out: tests, devset, TestData, held-out.
BORDER = "(?<=[a-z])(?=[A-Z])"
HELD_OUT = "|".join((*KEYWORDS["validation"], *KEYWORDS["test"], "development", "held[-_ ]?out", "hold[-_ ]?out"))
MORE = "s|(?:data)?sets?|data|splits?|parts?|files?|docs?|texts?|samples?|cases?|corpus"
DOUBTFUL = re.compile(rf"(?:(?<!{LETTER})|{BORDER})(?i:(?:{HELD_OUT})(?:{MORE})?)(?:(?!{LETTER})|{BORDER})")

BOOKKEEPING = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
UNNAMED = "no split in the name, and others have one"
COPIES = "the same bytes as a file held out"
UNITS = ("files", "bytes", "rows")
SHOWN = 3  # names of files that the plan shows of each kind
BEGINNING = 2**12  # bytes in which two files of one size most often differ
CHOOSE = "choose by name what to encode (`python -m mamba2.data` takes --split and --validation-split)"


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
            raise ValueError(f"{where} has several splits that say {asked}: {', '.join(found)}; {CHOOSE}")
        if found:
            return found[0]
    raise NoSplit(f"{where} has no split {asked!r}; it has {', '.join(names) or 'none'}; {CHOOSE}", names)


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
            others = self.left_out.get(f"not {endings}", [])
            more = f", but {_count(len(others), 'files')} with other endings ({_names(others, self.root)})"
            hint = "; a .bin file is read by its own path, or where its name says the split, as train.bin does"
            binary = any(file.suffix == ".bin" for file in others)
            more = (more if others else "") + (hint if binary else "")
            raise NoSplit(f"{self.root} has no split {asked!r}; it has no {endings} file{more}", [])
        try:
            return choose_split(asked, self.splits, self.root)
        except NoSplit as error:
            hints = {
                UNNAMED: "or move {} without a split in the name ({}) into a folder whose name says it, such as train",
                COPIES: "{} with the same bytes as a file held out ({}) left out",
            }
            more = [
                f"; {hint.format(_count(len(files), 'files'), _names(files, self.root))}"
                for why, hint in hints.items()
                if (files := self.left_out.get(why))
            ]
            raise NoSplit(f"{error}{''.join(more)}", error.names) from error

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

    Raises ValueError if a name says several splits or may mean held out, or one file belongs to two splits;
    FileNotFoundError for a broken link.
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
    unnamed = splits.pop(None, [])
    if not splits and unnamed:
        doubtful = [file for file in unnamed if DOUBTFUL.search(str(file.relative_to(root)))]
        if doubtful:
            raise ValueError(
                f"{root} has files whose names may mean held out, and none says its split "
                f"({_names(doubtful, root)}); move each into a folder called train, validation or test, or rename it"
            )
        return Listing(root, {"train": unnamed}, left_out)
    if unnamed:
        left_out[UNNAMED] = unnamed
    if copies := held_out_copies(splits):
        left_out[COPIES] = sorted(copies)
        splits = {split: rest for split, files in splits.items() if (rest := [f for f in files if f not in copies])}
    return Listing(root, splits, left_out)


def held_out_copies(splits: dict[str, list[Path]]) -> set[Path]:
    """The files for training with all the bytes of one that is not. Only files of one size are opened."""
    train, others = (
        [
            (file, file.stat().st_size)
            for split in splits
            if (splits_said(split) == {"train"}) is wanted
            for file in splits[split]
        ]
        for wanted in (True, False)
    )
    shared = {size for _, size in train} & {size for _, size in others} - {0}
    held_out: dict[bytes, list[Path]] = {}
    for file, size in others:
        if size in shared:
            held_out.setdefault(_beginning(file), []).append(file)
    return {
        file
        for file, size in train
        if size in shared and any(filecmp.cmp(file, f, shallow=False) for f in held_out.get(_beginning(file), ()))
    }


def _beginning(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return hashlib.sha256(opened.read(BEGINNING)).digest()


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
    counts = [_count(what[unit], unit) for unit in UNITS if unit in what]
    return (": " if counts else "") + ", ".join(counts) + (f" ({what['names']})" if "names" in what else "")


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit[:-1] if number == 1 else unit}"


def _names(files: list[Path], root: Path) -> str:
    shown = [os.fsencode(file.relative_to(root)).decode("utf-8", "replace") for file in files[:SHOWN]]
    return ", ".join(shown + ["…"] * (len(files) > SHOWN))
