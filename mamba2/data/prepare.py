"""Documents to a folder of tokens: threads encode, one writer keeps the order, and a kill loses some seconds of work.

Threads are enough, because tiktoken releases Python's lock while it encodes a batch of documents. All is written to
`.NAME.preparing`, beside the final folder NAME. The files of tokens grow there, and every few seconds, after an fsync,
`journal.json` records their lengths and the place in the source. A restart cuts the files to these lengths and reads on
from that place, so it ends with the same bytes. When all is written and flushed, the folder is renamed.

Memory: some batches of documents per thread, whatever the size of the source. A document is held as a whole, except for
a text file, which comes in pieces.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from mamba2.data.readers import Document, Place
from mamba2.data.sources import Source
from mamba2.data.tokens import SIDECAR, edges_sha256, files_sha256, write_sidecar
from mamba2.files import atomic_file, flush
from mamba2.tokenizer import Tokenizer

BATCH = 2**20  # characters or ids that a thread encodes at a time
COMMIT_SECONDS = 10.0  # at least, between two records in the journal
JOURNAL = "journal.json"
COUNTS = ("tokens", "documents", "empty", "largest")  # of a file of tokens; `empty` documents are left out


@dataclass(frozen=True)
class Plan:
    """What to make: for each file of tokens its source, and what is held out of "train" for "val".

    `validation_share`: about this share of the documents is held out, chosen by the hash of their content, so that
    copies stay together. `validation_documents`: so many documents at the beginning are held out.
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
        train, val = self.sources.get("train"), self.sources.get("val")
        if train and val and train.split == val.split:
            raise ValueError(f"train and val would both be the split {val.split} of {val.name}")

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
    def vocab_size(self) -> int:
        return 2**32 if self.tokenizer is None else self.tokenizer.vocab_size

    @property
    def dtype(self) -> str:
        return "<u4" if self.vocab_size > 2**16 else "<u2"

    def record(self) -> dict:
        """All that the bytes depend on. It is written to the sidecar, and a restart compares it."""
        sources = self.sources.items()
        return {
            "tokenizer": None if self.tokenizer is None else self.tokenizer.identity,
            "sources": {name: {key: getattr(s, key) for key in ("name", "split", "revision")} for name, s in sources},
            "validation_share": self.validation_share,
            "validation_documents": self.validation_documents,
        }


def prepare(output: Path, plan: Plan, workers: int | None = None, wait: bool = False) -> None:
    """Make the folder `output` from `plan`, or continue where an earlier call was stopped.

    `workers`: threads that encode, by default one per core; the bytes do not depend on it. `wait`: if another process
    is making the same folder, wait for it instead of raising an error.

    Raises FileExistsError if `output` exists; BlockingIOError if another process is making it; ValueError if an earlier
    call left unfinished work for another plan, if the source is empty or holds ids outside the vocabulary, or if the
    tokenizer fails on a document; OSError if the disk is full. After the last two a later call continues.
    """
    if output.exists() and not wait:
        raise FileExistsError(f"{output} exists already and is not overwritten; remove it, or choose another place")
    with working_folder(output, wait) as work:
        if work is None:
            return
        try:
            if (work / SIDECAR).exists():
                _check_plan(json.loads((work / SIDECAR).read_text(encoding="utf-8"))["plan"], plan, work)
            else:
                _make(work, plan, workers or os.cpu_count() or 1)
        except Refused:
            raise
        except ValueError:
            shutil.rmtree(work)  # the error is in the source: another call would fail in the same way
            raise
        (work / JOURNAL).unlink(missing_ok=True)
        publish(work, output)


class Refused(ValueError):
    """An error after which the unfinished work is kept, because a later call can use it."""


def _check_plan(recorded: dict, plan: Plan, work: Path) -> None:
    if recorded != plan.record():
        raise Refused(
            f"{work} holds the unfinished preparation of another source, tokenizer or choice of validation; "
            "remove it to start anew, or choose another output"
        )


@contextmanager
def working_folder(output: Path, wait: bool) -> Iterator[Path | None]:
    """The folder in which `output` is made, locked against other processes; None if `output` exists by then.

    The lock ends with the process, even if it is killed.
    """
    if output.exists():
        yield None
        return
    work = output.with_name(f".{output.name}.preparing")
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work.with_suffix(".lock"))
    try:
        lock.acquire(blocking=wait)
    except Timeout as error:
        raise BlockingIOError(f"another process is preparing {output} at this moment") from error
    try:
        if output.exists():  # made while this waited
            yield None
            return
        work.mkdir(exist_ok=True)
        for leftover in work.glob(".*.tmp"):  # temporary files of a call that was killed
            leftover.unlink()
        yield work
    finally:
        lock.release()
        if output.exists():  # nobody needs the lock any more
            work.with_suffix(".lock").unlink(missing_ok=True)


def publish(work: Path, output: Path) -> None:
    """Give a finished, flushed working folder its final name."""
    flush(work)
    os.rename(work, output)
    flush(output.parent)


# --------------------------------------------------------------------------------------------------------- the pipeline


@dataclass(frozen=True)
class State:
    """How far the work is: the source that is being read, the place to read on from, and the document begun there."""

    stage: int = 0
    place: Place = (0, 0)
    seen: int = 0  # documents of the source so far
    read: int = 0
    unfinished: str | None = None  # the file of tokens whose last document continues


@dataclass
class Batch:
    """Documents for one thread, each with the place after it, by the file of tokens that they go to."""

    documents: dict[str, list[tuple[Document, Place]]] = field(default_factory=dict)
    begins: bool = True  # False: a piece of a document that began in an earlier batch
    after: State = State()

    @property
    def ends(self) -> bool:  # False: a piece of a document that continues
        return self.after.unfinished is None


def _make(work: Path, plan: Plan, workers: int) -> None:
    state, counts = _read_journal(work, plan)
    with ExitStack() as stack:
        files = {name: TokenFile(work, name, counts[name], plan.dtype, stack) for name in plan.files}
        _commit(work, plan, state, files)  # from now on the folder tells which plan it belongs to
        for stage in range(state.stage, len(plan.sources)):
            state = _run_stage(work, plan, state if stage == state.stage else State(stage), files, workers)
        _commit(work, plan, state, files)
    entries = {}
    for name, file in files.items():
        source = plan.sources.get(name) or plan.sources["train"]
        if file.counts["tokens"] == 0:
            if plan.holds_out and any(other.counts["tokens"] for other in files.values()):
                raise ValueError(f"{source.name}: not one of its {state.seen} documents falls to {name}")
            raise ValueError(
                f"{source.name} ({source.split}) is empty: not one document with text or ids; of a table with both "
                "columns, text and input_ids, only input_ids is read"
            )
        ids, starts = file.paths
        entries[name] = {
            "files": [{"path": ids.name, "bytes": ids.stat().st_size, "edges": edges_sha256(ids)}],
            "starts": starts.name,
            **file.counts,
            "source": {"split": source.split, **source.told},
            "sha256": files_sha256([ids]),
            "starts_sha256": files_sha256([starts]),
        }
    write_sidecar(work, entries, plan.tokenizer, plan.eot_id, plan.dtype, plan.record())


def _run_stage(work: Path, plan: Plan, state: State, files: dict[str, "TokenFile"], workers: int) -> State:
    """Read one source to its end. `workers` batches are encoded at a time, and as many wait to be."""
    name, source = list(plan.sources.items())[state.stage]
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
    waiting: deque[tuple[Batch, Future]] = deque()

    def write_next() -> None:
        nonlocal committed, state
        batch, result = waiting.popleft()
        for target, encoded in result.result().items():
            files[target].append(*encoded)
        state = batch.after
        bar.update(state.read - bar.n)
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
    return state


def _batches(source: Source, name: str, plan: Plan, state: State) -> Iterator[Batch]:
    """The rest of a source in batches of about BATCH characters or ids. A piece of a document is its own batch."""
    stage, seen, target = state.stage, state.seen, state.unfinished
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
        batch.documents.setdefault(target, []).append((item.document, item.after))
        size += len(item.document)
        target = None if item.ends else target
        batch.begins, batch.after = begins, State(stage, item.after, seen, item.read, target)
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
    content = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document.tobytes()
    fraction = int.from_bytes(hashlib.sha256(content).digest()[:8], "little") / 2**64
    return "val" if fraction < plan.validation_share else "train"


def _encode(batch: Batch, plan: Plan, source: Source) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """For each file of tokens: ids (tokens,) of the plan's dtype, starts (documents,) int64 relative to the first id,
    and the number of empty documents, which are left out."""
    results = {}
    for target, documents in batch.documents.items():
        some = [pair for pair in documents if len(pair[0])]
        empty = len(documents) - len(some) if batch.begins and batch.ends else 0
        parts = [(np.empty(0, plan.dtype), np.empty(0, np.int64))]
        # one run of documents, unless files of text and files of ids lie in one folder
        for is_text, run in itertools.groupby(some, key=lambda pair: isinstance(pair[0], str)):
            parts.append((_encode_text if is_text else _check_ids)(list(run), plan, source))
        ids, lengths = map(np.concatenate, zip(*parts))
        ids = ids.astype(plan.dtype)
        starts = np.cumsum(lengths) - lengths if batch.begins else np.empty(0, np.int64)
        results[target] = ids if batch.ends else ids[:-1], starts, empty
    return results


Run = list[tuple[Document, Place]]  # documents, each with the place after it


def _encode_text(run: Run, plan: Plan, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Ids of text, with end-of-text after each document, and the lengths of the documents in ids."""
    if plan.tokenizer is None:
        raise ValueError(
            f"{source.name} is text, and the model carries no tokenizer to encode it with "
            "(`python -m mamba2.data` takes --tokenizer)"
        )
    try:
        ids = plan.tokenizer.encode_documents([document for document, _ in run])
    except ValueError as error:
        if len(run) > 1:  # find the document
            return tuple(map(np.concatenate, zip(*(_encode_text([pair], plan, source) for pair in run))))
        raise Refused(
            f"cannot encode a document of {source.name} ({source.before(run[0][1])}): {error}; what is done is kept, "
            "and the same command goes on"
        ) from error
    return ids, np.diff(np.flatnonzero(ids == plan.eot_id), prepend=-1)  # text never yields eot_id


def _check_ids(run: Run, plan: Plan, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Ids that need no encoding, with end-of-text after each document, and the lengths of the documents."""
    size, arrays = plan.vocab_size, []
    for ids, place in run:
        if ids.min() < 0 or ids.max() >= size:
            of = f"the vocabulary of {size}" if plan.tokenizer is None else f"the {size} ids of {plan.tokenizer.name}"
            raise ValueError(
                f"{source.name} holds a document with ids from {ids.min()} to {ids.max()}, outside {of} "
                f"({source.before(place)})"
            )
        arrays.append(ids if ids[-1] == plan.eot_id else np.append(ids, plan.eot_id))
    return np.concatenate(arrays), np.array(list(map(len, arrays)))


# ------------------------------------------------------------------------------------------------------------ the files


class TokenFile:
    """NAME.bin and NAME.starts while they grow. Opening cuts them to what `counts`, from the journal, says."""

    def __init__(self, work: Path, name: str, counts: dict[str, int], dtype: str, stack: ExitStack):
        self.work, self.counts = work, counts
        self.paths = (work / f"{name}.bin", work / f"{name}.starts")
        self.files = []
        for path, length in zip(self.paths, (counts["tokens"] * np.dtype(dtype).itemsize, counts["documents"] * 8)):
            path.touch()
            if path.stat().st_size < length:
                raise ValueError(f"{path} is shorter than its journal says; what is left of an earlier call is damaged")
            os.truncate(path, length)
            self.files.append(stack.enter_context(path.open("ab", buffering=0)))

    def append(self, ids: np.ndarray, starts: np.ndarray, empty: int) -> None:
        """Write ids (tokens,) and `starts` (documents,), which are relative to the first of them."""
        for file, array in zip(self.files, (ids, (starts + self.counts["tokens"]).astype("<i8"))):
            _write(file, array.tobytes(), self.work)
        self.counts["tokens"] += len(ids)
        self.counts["documents"] += len(starts)
        self.counts["empty"] += empty
        self.counts["largest"] = max(self.counts["largest"], int(ids.max(initial=0)))


def _write(file, data: bytes, work: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise OSError(f"cannot write in {work}: {error}; what is done is kept, and the same call goes on") from error


def _commit(work: Path, plan: Plan, state: State, files: dict[str, TokenFile]) -> None:
    """Flush the files to the disk, and then record in the journal how far they are."""
    for file in files.values():
        for opened in file.files:
            os.fsync(opened.fileno())
    content = {"plan": plan.record(), **vars(state), "files": {name: file.counts for name, file in files.items()}}
    with atomic_file(work / JOURNAL) as temporary, open(temporary, "wb", buffering=0) as file:
        _write(file, (json.dumps(content) + "\n").encode(), work)


def _read_journal(work: Path, plan: Plan) -> tuple[State, dict[str, dict[str, int]]]:
    """How far an earlier call came, and the counts of each file. Without a journal, empty the folder and begin anew."""
    if not (work / JOURNAL).exists():
        for file in work.iterdir():
            file.unlink()
        return State(), {name: dict.fromkeys(COUNTS, 0) for name in plan.files}
    content = json.loads((work / JOURNAL).read_text(encoding="utf-8"))
    _check_plan(content.pop("plan"), plan, work)
    counts = content.pop("files")
    return State(**content), counts
