"""Where documents come from: files, folders, saved data sets, the hub, the standard library.

Every source is a sequence of items, each with the place after it. Reading can start at any of these places, so that an
interrupted preparation of tokens continues without reading again what is done.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mamba2.data.readers import READERS, ROWS, Document, Item, Place, before, cells, find_column, kind_of, read_file
from mamba2.data.splits import VALIDATION_SPLITS, Listing, choose_split, list_files, stats_hash, walk

STDLIB = "stdlib"

# One file of the standard library in 20 is held out, chosen by its content, so that copies of a file stay together.
STDLIB_HELD_OUT = 20


@dataclass(frozen=True)
class Source:
    """One split of a source. `items(place)` gives what comes after `place`, (0, 0) being the beginning."""

    name: str
    split: str
    revision: str  # changes with the content: commit of a hub data set, or hash of the files' paths, sizes and times
    total: int | None  # size in `unit`, None if not known
    unit: str  # "B" or " documents", for the progress bar
    items: Callable[[Place], Iterator[Item]]
    before: Callable[[Place], str] = lambda place: f"row {place[1] - 1}"  # names the document that ends at a place
    told: dict = field(default_factory=dict)  # files or rows of all splits, for `describe` in mamba2/data/splits.py

    def documents(self) -> Iterator[Document]:
        """All documents, as text or as ids."""
        pieces: list[Document] = []
        for item in self.items((0, 0)):
            pieces.append(item.document)
            if item.ends:
                yield "".join(pieces) if len(pieces) > 1 else item.document
                pieces = []


def read_documents(source: str | os.PathLike, split: str, config: str | None = None) -> Iterator[Document]:
    """Documents of one split; see `open_source`."""
    return open_source(source, split, config).documents()


def open_source(
    source: str | os.PathLike, split: str, config: str | None = None, revision: str | None = None
) -> Source:
    """One split of a source; mamba2/data/__init__.py lists what a source can be. `revision`: commit, branch or tag on
    the hub.

    Raises FileNotFoundError for a missing source, ValueError for a missing split or column.
    """
    source = str(source)
    path = Path(source)
    if revision is not None and (source == STDLIB or path.exists()):
        raise ValueError(f"{source} lies on this machine and has no revision {revision!r}; data sets of the hub have")
    if source == STDLIB:
        return _stdlib(split)
    if path.is_dir() and any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    if path.exists():
        return _files(path, split, config)
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"no data at {source}")
    name, _, suffix = source.partition(":")
    return _hub(name, config or suffix or None, split, revision)


def wikitext_articles(lines: Iterator[str]) -> Iterator[list[str]]:
    """The lines of each article of WikiText: one begins at a heading of the first level, ` = Title = `.

    A line that is not empty ends with a line break. Lines before the first heading belong to the first article.
    """
    article: list[str] = []
    for line in lines:
        heading = line.strip()
        if heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= =") and any(article):
            yield article
            article = []
        article.append(line if line.endswith("\n") or not line else line + "\n")
    if any(article):
        yield article


def fingerprint(source: str | os.PathLike) -> str:
    """Hash of the path, size and time of change of every file behind a source on this machine."""
    path = Path(source)
    if str(source) == STDLIB or not path.exists():
        return stats_hash([], str(source), sys.version if str(source) == STDLIB else "")
    return stats_hash(walk(path) if path.is_dir() else [path], str(source))


# ------------------------------------------------------------------------------------------------------------ the kinds


def _stdlib(split: str) -> Source:
    split = choose_split(split, ("train", *VALIDATION_SPLITS), STDLIB)
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = ("site-packages", "dist-packages")
    files = [file for file in sorted(root.rglob("*.py")) if not any(part in file.parts for part in installed)]
    sizes = [file.stat().st_size for file in files]

    def items(place: Place) -> Iterator[Item]:
        read = sum(sizes[: place[0]])
        for number in range(place[0], len(files)):
            text = files[number].read_bytes().decode("utf-8", errors="ignore")
            read += sizes[number]
            digest = hashlib.sha256(text.encode()).digest()
            held_out = int.from_bytes(digest[:8], "little") % STDLIB_HELD_OUT == 0
            if held_out == (split != "train"):
                yield Item(text, (number + 1, 0), read)

    def name(place: Place) -> str:
        return str(files[place[0] - 1])

    return Source(STDLIB, split, f"Python {sys.version}", sum(sizes), "B", items, name)


def _saved(path: Path, asked: str) -> Source:
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        splits = saved
    else:  # a folder inside that of a DatasetDict is one of its splits, and named like it
        of_several = (path.resolve().parent / "dataset_dict.json").is_file()
        splits = {path.resolve().name if of_several else str(saved.split or "train"): saved}
    rows = {name: len(data) for name, data in splits.items()}
    return _table(str(path), asked, fingerprint(path), splits, rows)


def _hub(name: str, config: str | None, asked: str, revision: str | None) -> Source:
    from datasets import load_dataset_builder

    full_name = "Salesforce/wikitext" if name == "wikitext" else name
    try:
        builder = load_dataset_builder(full_name, config, revision=revision)
        splits = builder.as_streaming_dataset()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name} ({config or 'default'}) from disk or hub: {error}") from error
    rows = {split: info.num_examples for split, info in (builder.info.splits or {}).items()}
    label = full_name if config is None else f"{full_name}:{config}"
    return _table(label, asked, str(builder.hash), splits, rows)


def _table(name: str, asked: str, revision: str, splits: dict, rows: dict[str, int]) -> Source:
    """A split of the tables `splits` of the library `datasets`. `rows`: how many each has, where that is known."""
    split = choose_split(asked, splits, name)

    def items(place: Place) -> Iterator[Item]:
        row = place[1]
        if row == rows.get(split):
            return  # `skip` raises IndexError if nothing is left
        for table in splits[split].skip(row).with_format("arrow").iter(ROWS):
            column = find_column(table.column_names, name)
            for cell in cells(table.column(column), column, name, row):
                row += 1
                yield Item(cell, (0, row), row)

    told = {"splits": {some: {"rows": rows[some]} if some in rows else {} for some in splits}, "left_out": {}}
    return Source(name, split, revision, rows.get(split), " documents", items, told=told)


def _files(path: Path, asked: str, config: str | None) -> Source:
    endings = ", ".join(READERS)
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"{path} is none of {endings}")
        listing = Listing(path.parent, {"train": [path]}, {})
        split = choose_split(asked, listing.splits, path)
    else:
        root = path / config if config and (path / config).is_dir() else path
        listing = list_files(root, walk(root), lambda file: kind_of(file) is not None, endings)
        split = listing.choose(asked, endings)
    files = listing.splits[split]
    sizes = [file.stat().st_size for file in files]

    def items(place: Place) -> Iterator[Item]:
        first, inside = place
        read = sum(sizes[:first])
        for number in range(first, len(files)):
            for item in read_file(files[number], inside):
                yield item._replace(after=(number, item.after[1]), read=read + item.read)
            read, inside = read + sizes[number], 0

    def name(place: Place) -> str:
        return before(files[place[0]], place[1])

    told = listing.told()
    return Source(str(path), split, fingerprint(path), sum(sizes), "B", items, name, told)
