"""Text to evaluate on, as documents. A WikiText document is a list of lines, any other a list of one string."""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from mamba2.data import STDLIB, NoSplit, open_source, wikitext_articles
from mamba2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """The documents of one split, and where they come from."""

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
        """Each document as lm-evaluation-harness reads it: WikiText's raw file, where empty lines hold a space."""
        if not self.of_lines:
            return self.texts()
        documents = [list(itertools.dropwhile(lambda line: not line, self.documents[0])), *self.documents[1:]]
        pages = ["\n".join(line.removesuffix("\n") or " " for line in lines) for lines in documents]
        return [*pages[:-1], pages[-1] + "\n"]

    @property
    def of_lines(self) -> bool:
        """Whether the documents are lists of lines: WikiText's are."""
        return "wikitext" in Path(self.name).name

    def first_tokens(self, tokenizer: Tokenizer, count: int) -> Self:
        """The documents that begin within the first `count` tokens, the last one cut there at a whole character."""
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
    """Load the documents of a data set (see mamba2/data for what `name` can be); WikiText is divided into articles.

    `split`: None means `test`, or the only split if there is just one. For a file it is ignored.

    Raises FileNotFoundError or ValueError when the data set is missing, is empty, or holds ids instead of text.
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
    # Local files have a config only if they are in a folder of that name.
    has_config = config is not None and name != STDLIB and (not Path(name).exists() or (Path(name) / config).is_dir())
    return Corpus(documents, name, config if has_config else None, split, source.revision)


# The rules of lm-evaluation-harness (lm_eval/tasks/wikitext) in its order, as (pattern, replacement).
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_DETOKENIZE: list[tuple[str, str]] = [
    ("s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),  # a bug of the harness, kept so that the numbers are the same
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
