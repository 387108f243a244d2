"""What gives documents: files, folders, saved data sets, the hub, the standard library.

Every source is a sequence of items that can be entered at any place it named before, so that preparing tokens can go on
after an interruption without reading again what is done.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mamba2.data.readers import (
    READERS,
    ROWS,
    Document,
    Item,
    Place,
    before,
    cells,
    document,
    find_column,
    kind_of,
    read_file,
)
from mamba2.data.splits import VALIDATION_SPLITS, Listing, choose_split, list_files, stats_hash, walk

STDLIB = "stdlib"

# Of the standard library one file in 20 is held out, chosen by its content: copies of a file fall on the same side.
STDLIB_HELD_OUT = 20


@dataclass(frozen=True)
class Source:
    """One split of a source. `items(place)` gives what comes after `place`, (0, 0) being the beginning."""

    name: str
    split: str
    revision: str  # changes with the content: commit of a hub data set, hash of the files' paths, sizes and times
    total: int | None  # bytes or documents, None if not known
    unit: str  # "B" or " documents"
    items: Callable[[Place], Iterator[Item]]
    before: Callable[[Place], str] = lambda place: f"row {place[1] - 1}"  # names the document that ends at a place
    told: dict = field(default_factory=dict)  # what the plan says of all splits; see mamba2/data/splits.py

    def documents(self) -> Iterator[Document]:
        """All documents, as text or as ids."""
        pieces: list[str] = []
        for item in self.items((0, 0)):
            if item.ends and not pieces:
                yield item.document
                continue
            pieces.append(item.document)
            if item.ends:
                yield "".join(pieces)
                pieces = []


def read_documents(source: str | os.PathLike, split: str, config: str | None = None) -> Iterator[Document]:
    """Documents of one split; see `open_source`."""
    return open_source(source, split, config).documents()


def open_source(
    source: str | os.PathLike, split: str, config: str | None = None, revision: str | None = None
) -> Source:
    """One split of a source; see the package for what a source can be. `revision`: commit, branch or tag on the hub.

    Raises FileNotFoundError for a source that is not there, ValueError for a split or a column that is not.
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
    else:  # perhaps one of a DatasetDict, whose folder is called as the split there
        of_several = (path.resolve().parent / "dataset_dict.json").is_file()
        splits = {path.resolve().name if of_several else str(saved.split or "train"): saved}
    split = choose_split(asked, splits, path)
    rows = splits[split].with_format("arrow")
    column = find_column(rows.column_names, path)

    def items(place: Place) -> Iterator[Item]:
        for start in range(place[1], len(rows), ROWS):
            some = cells(rows[start : start + ROWS].column(column), column, path, start)
            yield from (Item(cell, (0, row), row) for row, cell in enumerate(some, start + 1))

    told = {"splits": {name: {"rows": len(some)} for name, some in splits.items()}, "left_out": {}}
    return Source(str(path), split, fingerprint(path), len(rows), " documents", items, told=told)


def _hub(name: str, config: str | None, asked: str, revision: str | None) -> Source:
    from datasets import load_dataset_builder

    full_name = "Salesforce/wikitext" if name == "wikitext" else name
    try:
        builder = load_dataset_builder(full_name, config, revision=revision)
        splits = builder.as_streaming_dataset()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name} ({config or 'default'}) from disk or hub: {error}") from error
    split = choose_split(asked, splits, name)
    known = builder.info.splits or {}

    def items(place: Place) -> Iterator[Item]:
        column, number = None, place[1]
        for row in splits[split].skip(number):
            column = column or find_column(row, name)
            yield Item(document(row.get(column), column, f"{name}, row {number}"), (0, number + 1), number + 1)
            number += 1

    rows = {some: {"rows": known[some].num_examples} if some in known else {} for some in splits}
    label = full_name if config is None else f"{full_name}:{config}"
    told = {"splits": rows, "left_out": {}}
    return Source(label, split, str(builder.hash), rows[split].get("rows"), " documents", items, told=told)


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
