"""Speed of `python -m mamba2.data` beside tiktoken alone, on the same documents, with all cores.

    python -m benchmarks.data_preparation [--source SOURCE] [--tokenizer gpt-neox-20b] [--megabytes 40]

The documents are written to a .jsonl file first. tiktoken alone is `encode_ordinary_batch` on the documents in memory,
with the ranks of the tokenizer and GPT-2's rule, and nothing written; preparation reads the file, normalises, takes out
runs of spaces, encodes, hashes, writes and flushes. The runs alternate, and the best of each counts. `command` is the
whole process, with the start of Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

from mamba2.data import STDLIB, Plan, open_source, prepare, read_documents
from mamba2.tokenizer import GPT2_SPLIT, _shipped, get_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=STDLIB, help="[stdlib]")
    parser.add_argument("--tokenizer", choices=("gpt2", "gpt-neox-20b"), default="gpt-neox-20b")
    parser.add_argument("--megabytes", type=float, default=40, help="of text, repeated if the source has less [40]")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    documents, size = [], 0
    while size < args.megabytes * 1e6:
        for text in read_documents(args.source, "train"):
            documents.append(text)
            size += len(text.encode())
            if size >= args.megabytes * 1e6:
                break
    cores = len(os.sched_getaffinity(0))
    ranks = {token: rank for rank, token in enumerate(_shipped(args.tokenizer))}
    alone = tiktoken.Encoding("alone", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokenizer = get_tokenizer(args.tokenizer)
    times: dict[str, list[float]] = {"tiktoken alone": [], "preparation": [], "command": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "documents.jsonl")
        file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
        command = [sys.executable, "-m", "mamba2.data", str(file), "--tokenizer", args.tokenizer, "--output"]
        for repeat in range(args.repeats):
            output = Path(folder, str(repeat))
            started = time.perf_counter()
            alone.encode_ordinary_batch(documents, num_threads=cores)
            times["tiktoken alone"].append(time.perf_counter() - started)
            started = time.perf_counter()
            prepare(output, Plan({"train": open_source(file, "train")}, tokenizer))
            times["preparation"].append(time.perf_counter() - started)
            started = time.perf_counter()
            subprocess.run([*command, f"{output}-command"], check=True, capture_output=True)
            times["command"].append(time.perf_counter() - started)
        tokens = json.loads((output / "tokens.json").read_text())["splits"]["train"]["tokens"]

    best = {name: min(seconds) for name, seconds in times.items()}
    print(f"{args.tokenizer}, {size / 1e6:.1f} MB of {args.source}, {len(documents)} documents, {cores} cores")
    print(f"{'':16}{'seconds':>9}{'MB/s':>8}{'tokens/s':>14}{'ratio':>8}")
    for name, seconds in best.items():
        ratio = best["tiktoken alone"] / seconds
        print(f"{name:16}{seconds:9.2f}{size / seconds / 1e6:8.1f}{tokens / seconds:14,.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
