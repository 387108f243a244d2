"""Text to documents, documents to files of tokens, tokens to batches.

    python -m mamba2.data SOURCE --tokenizer gpt-neox-20b --output FOLDER       prepare once,
    python train.py --dataset-path FOLDER ...                                   train as often as wanted
    python train.py --dataset-path SOURCE ...                                   or both at once, through the cache

A SOURCE is one of
    stdlib                      the source code of the Python standard library: real text on every machine
    a .txt, .jsonl, .json or .parquet file (text and JSON also .gz or .zst), or a folder of them; each text file is one
                                document, and the names of folders and files say the split: mamba2/data/splits.py
    a folder laid out like the hub's, NAME/CONFIG/SPLIT-*.parquet
    a folder written by save_to_disk of the library `datasets`
    NAME or NAME:CONFIG         a data set of the hub
with the column `text`, or `input_ids`, which are not encoded. --dataset-path also takes
    FOLDER                      from `python -m mamba2.data`: train.bin, val.bin, where documents start, tokens.json
    a .bin file, or a folder with train.bin and val.bin     of nanoGPT (uint16)
    a folder with *_train_*.bin and *_val_*.bin             shards of llm.c and modded-nanogpt (gpt2)
    synthetic:TASK              generated recall tasks; mamba2/data/synthetic.py lists tasks and options

Documents are encoded, each followed by end-of-text, into one flat file, and cut into windows of T + 1 tokens, one every
T tokens. A document that begins inside a window starts with an empty state (`seq_idx`).
"""

from mamba2.data.load import load_tokens, load_validation
from mamba2.data.prepare import Plan, prepare
from mamba2.data.sources import STDLIB, open_source, read_documents, wikitext_articles
from mamba2.data.splits import NoSplit, describe
from mamba2.data.synthetic import is_synthetic, synthetic_samples
from mamba2.data.tokens import Tokens
from mamba2.data.windows import INITIAL_STATES, Windows

__all__ = [
    "INITIAL_STATES",
    "STDLIB",
    "NoSplit",
    "Plan",
    "Tokens",
    "Windows",
    "describe",
    "is_synthetic",
    "load_tokens",
    "load_validation",
    "open_source",
    "prepare",
    "read_documents",
    "synthetic_samples",
    "wikitext_articles",
]
