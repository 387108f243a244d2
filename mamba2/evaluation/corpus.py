"""Text to evaluate on: documents, each a list of lines where the source is a file of lines."""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from mamba2.data import STDLIB, NoSplit, open_source, wikitext_articles
from mamba2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """One split. `documents` holds the lines of each document; a document of another source is a single line."""

    documents: list[list[str]]
    name: str
    config: str | None
    split: str
    revision: str

    @property
    def label(self) -> str:
        """NAME or NAME:CONFIG, and the split."""
        return f"{self.name}{f':{self.config}' if self.config else ''}, {self.split}"

    def texts(self) -> list[str]:
        """Each document as one text."""
        return ["".join(lines) for lines in self.documents]

    def pages(self) -> list[str]:
        """Each document as WikiText's file has it, an empty line being a space: what lm-evaluation-harness reads."""
        if not self.of_lines:
            return self.texts()
        documents = [list(itertools.dropwhile(lambda line: not line, self.documents[0])), *self.documents[1:]]
        pages = ["\n".join(line.removesuffix("\n") or " " for line in lines) for lines in documents]
        return [*pages[:-1], pages[-1] + "\n"]

    @property
    def of_lines(self) -> bool:
        """WikiText comes as lines, which make up articles."""
        return "wikitext" in Path(self.name).name

    def first_tokens(self, tokenizer: Tokenizer, count: int) -> Self:
        """The first documents, as many as begin within `count` tokens; the last is cut, at a whole character."""
        kept, total = [], 0
        for lines in self.documents:
            if total >= count:
                break
            text = "".join(lines)
            ids = tokenizer.encode(text)
            if len(ids) > count - total:
                text = tokenizer.decode_bytes(ids[: count - total]).decode("utf-8", errors="ignore")
                lines = text.splitlines(keepends=True) if self.of_lines else [text]
            total += len(ids)
            kept.append(lines)
        return replace(self, documents=kept)


def load_corpus(name: str, split: str | None, config: str | None = None) -> Corpus:
    """Documents of a data set (see mamba2/data for what it can be): articles where it is WikiText.

    `split`: None for the split test, or the only one if there is one alone. A file is one split, whatever `split` says.

    Raises FileNotFoundError or ValueError when it is not there, is empty, or holds ids instead of text.
    """
    try:
        source = open_source(name, split or "test", config)
    except NoSplit as error:
        if len(error.names) != 1 or not (split is None or Path(name).is_file()):
            raise
        source = open_source(name, error.names[0], config)
    texts, split = list(source.documents()), source.split
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} holds ids and not text; perplexity needs the text")
    if "wikitext" in Path(name).name:
        documents = list(wikitext_articles(texts))
    else:
        documents = [[text] for text in texts if text]
    if not documents:
        raise ValueError(f"{name}, {split}: the data set is empty: not one document with text")
    # A config says nothing about files that do not lie in a folder of its name.
    has_config = config is not None and name != STDLIB and (not Path(name).exists() or (Path(name) / config).is_dir())
    return Corpus(documents, name, config if has_config else None, split, source.revision)


# Rules of lm-evaluation-harness (lm_eval/tasks/wikitext) in its order, as (pattern, replacement).
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_DETOKENIZE: list[tuple[str, str]] = [
    ("s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),  # a slip in the harness, which must be repeated to give its numbers
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}") for left, right in _PAIRS),
    *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenize(page: str) -> str:
    """Undo WikiText's spacing of punctuation, by the rules of lm-evaluation-harness."""
    for pattern, replacement in _DETOKENIZE:
        page = re.sub(pattern, replacement, page)
    return page
