"""Which split the name of a file, a folder or a split says, and the files of a folder by split.

The words are those that `datasets` knows. A word counts wherever no letter stands next to it: train.txt,
wiki.valid.txt, test-00000-of-00002.parquet, my_dev_set/. A folder's name counts more than a file's. If no name says a
split, all files are for training, unless a name looks like held-out data, which is an error. If some names say a split,
the other files are left out. A training file that is a copy of a held-out file is left out, too.
"""

import filecmp
import hashlib
import os
import re
from collections import defaultdict
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
# Words that `datasets` does not know, but that probably mean held-out data: tests, devset, TestData, held-out.
BORDER = "(?<=[a-z])(?=[A-Z])"
HELD_OUT = "|".join((*KEYWORDS["validation"], *KEYWORDS["test"], "development", "held[-_ ]?out", "hold[-_ ]?out"))
MORE = "s|(?:data)?sets?|data|splits?|parts?|files?|docs?|texts?|samples?|cases?|corpus"
DOUBTFUL = re.compile(rf"(?:(?<!{LETTER})|{BORDER})(?i:(?:{HELD_OUT})(?:{MORE})?)(?:(?!{LETTER})|{BORDER})")

BOOKKEEPING = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
UNNAMED = "no split in the name, and others have one"
COPIES = "the same bytes as a file held out"
UNITS = ("files", "bytes", "rows")
SHOWN = 3  # how many file names of each kind the plan shows
BEGINNING = 2**12  # bytes that are compared first, before whole files are
CHOOSE = "choose by name what to encode (`python -m mamba2.data` takes --split and --validation-split)"


class NoSplit(ValueError):
    """A source does not have the split that was asked for; it has those of `names`."""

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


def splits_said(name: str) -> set[str]:
    """The splits, of train, validation and test, that a name says."""
    return {WORDS[word.lower()] for word in WORD.findall(name)}


def choose_split(asked: str, names: Iterable[str], where: str | os.PathLike) -> str:
    """The one of `names` that is the split `asked`: the same name, else another word for it (dev for validation), else
    a name that contains such a word and no other (train_sft for train).

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
    """The split of a file below the source `root`; None if its name and its folders' names say none. In the hub's
    layout, data/NAME-00000-of-00002.parquet, NAME is the split, whatever it is.

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
    """The files of a source: `splits` has those of each split, `left_out` the others by the reason."""

    root: Path
    splits: dict[str, list[Path]]
    left_out: dict[str, list[Path]]

    def choose(self, asked: str, endings: str) -> str:
        """The split `asked` among those that are there; see `choose_split`. `endings` of readable files, for errors."""
        if not self.splits:
            more = ""
            if others := self.left_out.get(f"not {endings}"):
                more = f", but {_count(len(others), 'files')} with other endings ({_names(others, self.root)})"
            if others and any(file.suffix == ".bin" for file in others):
                more += "; a .bin file is read by its own path, or where its name says the split, as train.bin does"
            raise NoSplit(f"{self.root} has no split {asked!r}; it has no {endings} file{more}", [])
        try:
            return choose_split(asked, self.splits, self.root)
        except NoSplit as error:
            more = str(error)
            if files := self.left_out.get(UNNAMED):
                more += f"; or move {_count(len(files), 'files')} without a split in the name "
                more += f"({_names(files, self.root)}) into a folder whose name says it, such as train"
            if files := self.left_out.get(COPIES):
                more += f"; {_count(len(files), 'files')} with the same bytes as a file held out "
                more += f"({_names(files, self.root)}) left out"
            raise NoSplit(more, error.names) from error

    def told(self) -> dict:
        """For `describe`: the number of files of each kind, the size of those of a split, and the first names."""

        def told(paths: list[Path]) -> dict:
            return {"files": len(paths), "names": _names(paths, self.root)}

        return {
            "splits": {
                k: {**told(files), "bytes": sum(map(os.path.getsize, files))} for k, files in self.splits.items()
            },
            "left_out": {why: told(paths) for why, paths in self.left_out.items()},
        }


def list_files(root: Path, files: Iterable[Path], is_data: Callable[[Path], bool], endings: str) -> Listing:
    """Sort `files`, which lie below `root`, by split. If no name says a split, all of them are for training.

    Raises ValueError if a name says several splits, may mean held-out data, or if one file belongs to two splits;
    FileNotFoundError for a broken link.
    """
    splits: dict[str | None, list[Path]] = defaultdict(list)
    left_out: dict[str, list[Path]] = defaultdict(list)
    seen: dict[tuple[int, int], tuple[str | None, Path]] = {}
    for file in files:
        if is_hidden(file):
            left_out["hidden"].append(file)
        elif file.name in BOOKKEEPING:
            left_out["bookkeeping"].append(file)
        elif file.is_dir():
            left_out["folders that are not entered"].append(file)
        elif not is_data(file):
            left_out[f"not {endings}"].append(file)
        elif file.is_symlink() and not file.exists():
            raise FileNotFoundError(f"{file} is a link to {os.readlink(file)}, which is not there")
        elif not file.is_file():
            left_out["no files but devices"].append(file)
        else:
            split = split_of(file, root)
            status = file.stat()
            other, first = seen.setdefault((status.st_dev, status.st_ino), (split, file))
            if first != file and split and other and split != other:
                raise ValueError(f"{first} and {file} are the same file, once in {other} and once in {split}")
            if first == file or split != other:
                splits[split].append(file)
            else:
                left_out["the same file under another name"].append(file)
    unnamed = splits.pop(None, [])
    if not splits and unnamed:
        if doubtful := [file for file in unnamed if DOUBTFUL.search(str(file.relative_to(root)))]:
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
    """The training files that have the same bytes as a held-out file; empty files do not count. Only files of a size
    that occurs on both sides are opened."""
    sizes: dict[bool, dict[Path, int]] = {True: {}, False: {}}  # of the training files, and of the others
    for split, files in splits.items():
        sizes[splits_said(split) == {"train"}].update((file, file.stat().st_size) for file in files)
    shared = set(sizes[True].values()) & set(sizes[False].values()) - {0}
    train, others = ([file for file, size in sizes[side].items() if size in shared] for side in (True, False))
    held_out: dict[bytes, list[Path]] = defaultdict(list)
    for file in others:
        held_out[_beginning(file)].append(file)
    return {f for f in train if any(filecmp.cmp(f, other, shallow=False) for other in held_out.get(_beginning(f), ()))}


def _beginning(file: Path) -> bytes:
    """Hash of the first bytes of a file, which differ for most files that are not copies."""
    with open(file, "rb") as opened:
        return hashlib.sha256(opened.read(BEGINNING)).digest()


def is_hidden(path: Path) -> bool:
    """Whether a program keeps the file or folder for itself: .x, and folders like __MACOSX."""
    return path.name.startswith(".") or (path.name.startswith("__") and path.is_dir())


def walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """All files below a folder in the order of their paths; links are followed. Folders that are not entered are
    yielded themselves: hidden ones, and links to a folder that contains them."""
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
    """Hash of `more` and of the path, size and time of change of every file."""
    parts = list(more)
    for file in files:
        if file.is_file():
            status = file.stat()
            parts.append(f"{file} {file.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def describe(sources: dict[str, dict]) -> list[str]:
    """Lines for the plan: the files behind "train" and those held out, and what is left out and why. `sources` holds,
    for each of them, its `split` and what `Listing.told` says."""
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
