"""Documents to a folder of tokens: threads encode, one writer keeps the order, and a kill costs some seconds of work.

Threads and not processes, because tiktoken encodes a batch of documents in one call in which the others run. All that
is made lies in `.NAME.preparing` beside the folder NAME that is to be. There the files of tokens grow, and
`journal.json` says now and then, after an fsync, how long they are and where the source goes on. A restart cuts the
files to that length and goes on from there, so it ends with the same bytes. When everything is there and flushed, the
folder is renamed.

Memory: the documents of some batches per thread, whatever the size of the source. A document of text or ids is held
whole, but for a text file, which comes in pieces.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mamba2.data.readers import Document, Place
from mamba2.data.sources import Source
from mamba2.data.tokens import SIDECAR, edges_sha256, write_sidecar
from mamba2.files import atomic_file, flush
from mamba2.tokenizer import Tokenizer

BATCH = 2**20  # characters or ids that a thread encodes at a time
COMMIT_SECONDS = 10.0
JOURNAL = "journal.json"
COUNTS = ("tokens", "documents", "empty", "largest")  # of a file of tokens; `empty`: documents that are left out


@dataclass(frozen=True)
class Plan:
    """What is to be made: for each file of tokens its source, and what is held out of "train" for "val".

    `validation_share`: a document is held out if the hash of its text says so: copies fall on the same side.
    `validation_documents`: the first so many are held out.
    """

    sources: dict[str, Source]
    tokenizer: Tokenizer | None
    validation_share: float = 0.0
    validation_documents: int = 0

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"the share held out for validation must be from 0 to below 1, not {self.validation_share}"
            )
        if self.validation_documents < 0:
            raise ValueError(f"the documents held out must be 0 or more, not {self.validation_documents}")
        if self.holds_out and "val" in self.sources:
            raise ValueError("validation comes either from a split of the source or from what is held out, not both")
        splits = {name: source.split for name, source in self.sources.items()}
        if "val" in splits and splits["val"] == splits.get("train"):
            raise ValueError(f"train and val would both be the split {splits['val']} of {self.sources['val'].name}")

    @property
    def holds_out(self) -> bool:
        return bool(self.validation_share or self.validation_documents)

    @property
    def files(self) -> list[str]:
        return [*self.sources, *(["val"] if self.holds_out else [])]

    @property
    def eot_id(self) -> int:
        return 0 if self.tokenizer is None else self.tokenizer.eot_id

    @property
    def dtype(self) -> str:
        # what ready ids without a tokenizer need is not known
        wide = self.tokenizer is None or self.tokenizer.vocab_size > 2**16
        return "<u4" if wide else "<u2"

    def record(self) -> dict:
        """All that the bytes depend on, for the sidecar, and for a restart to compare."""
        return {
            "tokenizer": None if self.tokenizer is None else self.tokenizer.identity,
            "sources": {
                name: {"name": source.name, "split": source.split, "revision": source.revision}
                for name, source in self.sources.items()
            },
            "validation_share": self.validation_share,
            "validation_documents": self.validation_documents,
        }


def prepare(output: Path, plan: Plan, workers: int | None = None, wait: bool = False) -> None:
    """Make the folder `output` from `plan`, or go on where an earlier call was stopped.

    `workers`: threads that encode, by default one per core; the bytes do not depend on it. `wait`: when another process
    is making the same folder, wait until it is there instead of refusing.

    Raises FileExistsError if `output` is there; BlockingIOError if another process makes it; ValueError if what is left
    of an earlier call is of another source or tokenizer, if the source is empty or holds ids outside the vocabulary, or
    if the tokenizer fails on a document; OSError if the disk does not take it. After the last two a later call goes on.
    """
    if output.exists() and not wait:
        raise FileExistsError(f"{output} exists already and is not overwritten; remove it, or choose another place")
    with working_folder(output, wait) as work:
        if work is None:
            return
        try:
            if not (work / SIDECAR).exists():
                _make(work, plan, workers or os.cpu_count() or 1)
            elif json.loads((work / SIDECAR).read_text(encoding="utf-8"))["plan"] != plan.record():
                raise _of_another_plan(work)
        except Refused:
            raise
        except ValueError:
            shutil.rmtree(work)  # the source is at fault, and will not do better the next time
            raise
        (work / JOURNAL).unlink(missing_ok=True)
        publish(work, output)


class Refused(ValueError):
    """What is not the source's fault: the work of an earlier call, or of this one so far, is not thrown away."""


def _of_another_plan(work: Path) -> Refused:
    return Refused(
        f"{work} holds the unfinished preparation of another source, tokenizer or choice of validation; "
        "remove it to start anew, or choose another output"
    )


@contextmanager
def working_folder(output: Path, wait: bool) -> Iterator[Path | None]:
    """The folder in which `output` is made, locked against other processes; None if one has just made it.

    The lock goes with the process, however that ends.
    """
    work = output.with_name(f".{output.name}.preparing")
    while True:
        if output.exists():
            yield None
            return
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise BlockingIOError(f"another process is preparing {output} at this moment") from error
            # while waiting, the folder may have been renamed to `output`, or removed
            if work.exists() and os.path.samestat(os.fstat(descriptor), work.stat()):
                for leftover in work.glob(".*.tmp"):  # of a call that was killed
                    leftover.unlink()
                yield work
                return
        finally:
            os.close(descriptor)


def publish(work: Path, output: Path) -> None:
    """Give a finished, flushed working folder its final name."""
    flush(work)
    os.rename(work, output)
    flush(output.parent)


# --------------------------------------------------------------------------------------------------------- the pipeline


@dataclass
class Batch:
    """Documents for one thread, by the file of tokens that they go to, and the place after each of them."""

    documents: dict[str, list[Document]] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    begins: bool = True  # False: a piece of a document whose beginning was in an earlier batch
    ends: bool = True  # False: a piece of a document that goes on
    after: Place = (0, 0)
    read: int = 0
    seen: int = 0  # documents of the source so far


@dataclass
class State:
    """What the journal holds: the source that is being read, where it goes on, and the files' contents so far."""

    stage: int = 0
    place: Place = (0, 0)
    seen: int = 0
    read: int = 0
    unfinished: str | None = None  # file whose last document goes on
    files: dict[str, dict[str, int]] = field(default_factory=dict)


def _make(work: Path, plan: Plan, workers: int) -> None:
    state = _read_journal(work, plan)
    with ExitStack() as stack:
        files = {name: stack.enter_context(TokenFile(work, name, state.files[name], plan.dtype)) for name in plan.files}
        _commit(work, plan, state, files)  # from here on the folder says whose it is
        for stage, source in list(enumerate(plan.sources.values()))[state.stage :]:
            if stage > state.stage:
                state.stage, state.place, state.seen, state.read = stage, (0, 0), 0, 0
            _run_stage(work, plan, state, source, list(plan.sources)[stage], files, workers)
        _commit(work, plan, state, files)
        for name, file in files.items():
            if file.tokens == 0:
                source = plan.sources.get(name) or plan.sources["train"]
                if plan.holds_out and any(other.tokens for other in files.values()):
                    raise ValueError(f"{source.name}: not one of its {state.seen} documents falls to {name}")
                raise ValueError(
                    f"{source.name} ({source.split}) is empty: not one document with text or ids; of a table with both "
                    "columns, text and input_ids, only input_ids is read"
                )
        entries = {name: file.entry(plan) for name, file in files.items()}
    write_sidecar(work, entries, plan.tokenizer, plan.eot_id, plan.dtype, plan.record())


def _run_stage(work: Path, plan: Plan, state: State, source: Source, name: str, files: dict, workers: int) -> None:
    """Read one source to its end, `workers` batches at a time and as many waiting."""
    committed = time.monotonic()
    bar = tqdm(
        total=source.total,
        initial=state.read,
        unit=source.unit,
        unit_scale=True,
        desc=f"encoding {source.name} ({source.split})",
        disable=None,
    )
    pool = ThreadPoolExecutor(workers)
    waiting: deque = deque()

    def write_next() -> None:
        nonlocal committed
        batch, result = waiting.popleft()
        for target, (ids, starts, empty) in result.result().items():
            files[target].append(ids, starts, empty)
        state.place, state.seen, state.read = batch.after, batch.seen, batch.read
        state.unfinished = None if batch.ends else next(iter(batch.documents))
        bar.update(batch.read - bar.n)
        if time.monotonic() - committed >= COMMIT_SECONDS:
            _commit(work, plan, state, files)
            committed = time.monotonic()

    try:
        for batch in _batches(source, name, plan, state):
            waiting.append((batch, pool.submit(_encode, batch, plan, source)))
            while len(waiting) > 2 * workers or (waiting and waiting[0][1].done()):
                write_next()
        while waiting:
            write_next()
    except Refused:
        _commit(work, plan, state, files)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _batches(source: Source, name: str, plan: Plan, state: State) -> Iterator[Batch]:
    """The rest of a source in batches of about BATCH. A piece of a document is a batch of its own."""
    seen, target = state.seen, state.unfinished
    batch, size = Batch(), 0
    for item in source.items(tuple(state.place)):
        begins = target is None
        if begins:
            target = _target(item.document, seen, name, plan)
            seen += 1
        piece = not (begins and item.ends)
        if (piece or size + len(item.document) > BATCH) and batch.documents:
            yield batch
            batch, size = Batch(), 0
        batch.documents.setdefault(target, []).append(item.document)
        batch.places.setdefault(target, []).append(item.after)
        batch.begins, batch.ends = begins, item.ends
        batch.after, batch.read, batch.seen = item.after, item.read, seen
        size += len(item.document)
        if item.ends:
            target = None
        if piece:
            yield batch
            batch, size = Batch(), 0
    if batch.documents:
        yield batch


def _target(document: Document, number: int, name: str, plan: Plan) -> str:
    if name != "train" or not plan.holds_out:
        return name
    if plan.validation_documents:
        return "val" if number < plan.validation_documents else "train"
    if isinstance(document, str):
        content = document.encode("utf-8", "surrogatepass")
    else:
        content = document.astype(np.int64).tobytes()
    fraction = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") / 2**64
    return "val" if fraction < plan.validation_share else "train"


def _encode(batch: Batch, plan: Plan, source: Source) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """For each file: ids (tokens,) of its type, starts (documents,) int64 counted from the first of them, and how many
    documents were empty and are left out."""
    results = {}
    for target, documents in batch.documents.items():
        some = [pair for pair in zip(documents, batch.places[target]) if len(pair[0]) > 0]
        empty = len(documents) - len(some) if batch.begins and batch.ends else 0
        runs = [(np.empty(0, plan.dtype), np.empty(0, np.int64))]
        # one run, but where files of text and files of ids meet
        for is_text, run in itertools.groupby(some, key=lambda pair: isinstance(pair[0], str)):
            ids, ends = (_encoded if is_text else _ready)(list(run), plan, source)
            runs.append((ids.astype(plan.dtype), np.diff(ends, prepend=0)))
        ids, lengths = map(np.concatenate, zip(*runs))
        starts = np.cumsum(lengths) - lengths if batch.begins else np.empty(0, np.int64)
        results[target] = ids if batch.ends else ids[:-1], starts, empty
    return results


Run = list[tuple[Document, Place]]  # documents, and the place after each


def _encoded(run: Run, plan: Plan, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Ids of text, each document ended once, and where each ends."""
    if plan.tokenizer is None:
        raise ValueError(
            f"{source.name} is text, and the model carries no tokenizer to encode it with "
            "(`python -m mamba2.data` takes --tokenizer)"
        )
    try:
        ids = plan.tokenizer.encode_documents([document for document, _ in run])
    except ValueError:  # of one of them
        ids = np.concatenate([_encoded_alone(*pair, plan.tokenizer, source) for pair in run])
    return ids, np.flatnonzero(ids == plan.eot_id) + 1  # text never yields that id


def _encoded_alone(document: str, place: Place, tokenizer: Tokenizer, source: Source) -> np.ndarray:
    try:
        return tokenizer.encode_documents([document])
    except ValueError as error:
        raise Refused(
            f"cannot encode a document of {source.name} ({source.before(place)}): {error}; what is done is kept, and "
            "the same command goes on"
        ) from error


def _ready(run: Run, plan: Plan, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Ids that need no encoding, each document ended once, and where each ends."""
    size = 2**32 if plan.tokenizer is None else plan.tokenizer.vocab_size
    arrays = []
    for document, place in run:
        ids = document.astype(np.int64)
        if ids.min() < 0 or ids.max() >= size:
            of = f"the vocabulary of {size}" if plan.tokenizer is None else f"the {size} ids of {plan.tokenizer.name}"
            raise ValueError(
                f"{source.name} holds a document with ids from {ids.min()} to {ids.max()}, outside {of} "
                f"({source.before(place)})"
            )
        arrays.append(ids if ids[-1] == plan.eot_id else np.append(ids, plan.eot_id))
    return np.concatenate(arrays), np.cumsum([len(ids) for ids in arrays])


# ------------------------------------------------------------------------------------------------------------ the files


class TokenFile:
    """NAME.bin and NAME.starts while they grow, cut to what the journal says of them."""

    def __init__(self, work: Path, name: str, counts: dict[str, int], dtype: str):
        self.name, self.work = name, work
        self.tokens, self.documents, self.empty, self.largest = (counts[name] for name in COUNTS)
        self.paths = (work / f"{name}.bin", work / f"{name}.starts")
        lengths = (self.tokens * np.dtype(dtype).itemsize, self.documents * 8)
        self.hashes = [hashlib.sha256(), hashlib.sha256()]
        self.files = []
        for path, length, digest in zip(self.paths, lengths, self.hashes):
            path.touch()
            if path.stat().st_size < length:
                raise ValueError(f"{path} is shorter than its journal says; what is left of an earlier call is damaged")
            os.truncate(path, length)
            with open(path, "rb") as kept:
                while block := kept.read(2**20):
                    digest.update(block)
            self.files.append(open(path, "ab", buffering=0))  # noqa: SIM115 (closed by close)

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(self, *_) -> None:
        for file in self.files:
            file.close()

    def append(self, ids: np.ndarray, starts: np.ndarray, empty: int) -> None:
        """`starts` are counted from the first of `ids`."""
        for file, digest, array in zip(self.files, self.hashes, (ids, (starts + self.tokens).astype("<i8"))):
            data = array.tobytes()
            _write(file, data, self.work)
            digest.update(data)
        self.tokens, self.documents = self.tokens + len(ids), self.documents + len(starts)
        self.empty += empty
        if len(ids):
            self.largest = max(self.largest, int(ids.max()))

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTS}

    def entry(self, plan: Plan) -> dict:
        """What the sidecar says of this file."""
        bin_path, starts_path = self.paths
        source = plan.sources.get(self.name) or plan.sources["train"]
        entry = {
            "files": [{"path": bin_path.name, "bytes": bin_path.stat().st_size, "edges": edges_sha256(bin_path)}],
            "starts": starts_path.name,
            **self.counts(),
            "source": {"split": source.split, **source.told},
            "sha256": self.hashes[0].hexdigest(),
            "starts_sha256": self.hashes[1].hexdigest(),
        }
        return entry


def _write(file, data: bytes, work: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise OSError(f"cannot write in {work}: {error}; what is done is kept, and the same call goes on") from error


def _commit(work: Path, plan: Plan, state: State, files: dict[str, TokenFile]) -> None:
    """Make all that was written count: first the files reach the disk, then the journal says so."""
    for file in files.values():
        for opened in file.files:
            os.fsync(opened.fileno())
    state.files = {name: file.counts() for name, file in files.items()}
    content = {"plan": plan.record(), **vars(state)}
    with atomic_file(work / JOURNAL) as temporary, open(temporary, "wb", buffering=0) as file:
        _write(file, (json.dumps(content) + "\n").encode(), work)


def _read_journal(work: Path, plan: Plan) -> State:
    """The state to go on from; the beginning, in an emptied folder, if there is no journal."""
    if not (work / JOURNAL).exists():
        for file in work.iterdir():
            file.unlink()
        return State(files={name: dict.fromkeys(COUNTS, 0) for name in plan.files})
    content = json.loads((work / JOURNAL).read_text(encoding="utf-8"))
    if content.pop("plan") != plan.record():
        raise _of_another_plan(work)
    return State(**content)
