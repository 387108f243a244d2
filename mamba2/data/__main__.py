"""Turn a source of text into a folder of tokens that train.py reads by memory map.

    python -m mamba2.data SOURCE --tokenizer gpt-neox-20b --output FOLDER
    python -m mamba2.data corpus.jsonl.gz --tokenizer gpt2 --output tokens --validation-share 0.001
    python -m mamba2.data allenai/c4:en --tokenizer gpt-neox-20b --output c4 --revision COMMIT

Writes FOLDER/train.bin, val.bin (uint16, or uint32 where the tokenizer has more than 65 536 ids), *.starts (where the
documents start) and tokens.json (tokenizer, counts, hashes, source). FOLDER appears when all is done. If the command is
stopped or killed, the same command given again continues the work and ends with the same bytes.
"""

import argparse
import json
import time
from pathlib import Path

from mamba2.cli import run
from mamba2.data.prepare import Plan, prepare
from mamba2.data.sources import Source, open_source
from mamba2.data.splits import VALIDATION_SPLITS, NoSplit, describe
from mamba2.data.tokens import SIDECAR
from mamba2.tokenizer import BUILTIN, get_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mamba2.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="hub name, file, folder or stdlib; see mamba2/data/__init__.py")
    add("--tokenizer", help=f"{', '.join(BUILTIN)}, or a tokenizer.json; not needed for the column input_ids")
    add("--output", required=True, help="folder to make")
    add("--config", help="configuration of a hub data set, or folder in a local one laid out as the hub's")
    add("--revision", help="commit, branch or tag of a hub data set")
    add("--split", default="train", help="that becomes train.bin [train]")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--validation-split", help="that becomes val.bin [validation or test, if there is one]")
    held_out.add_argument("--validation-share", type=float, help="share of the documents held out, chosen by content")
    held_out.add_argument("--validation-documents", type=int, help="hold out the first so many documents")
    held_out.add_argument("--no-validation", action="store_true", help="write no val.bin")
    add("--workers", type=int, help="threads that encode; the result does not depend on it [one per core]")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, not {args.workers}")

    output = Path(args.output)
    if Path(args.source).is_dir() and output.resolve().is_relative_to(Path(args.source).resolve()):
        raise ValueError(f"{output} lies inside the source {args.source}, which it would change; choose another place")
    tokenizer = None if args.tokenizer is None else get_tokenizer(args.tokenizer)
    sources = {"train": open_source(args.source, args.split, args.config, args.revision)}
    if validation := find_validation(args, sources["train"].split):
        sources["val"] = validation
    plan = Plan(sources, tokenizer, args.validation_share or 0.0, args.validation_documents or 0)
    for line in describe({name: {"split": source.split, **source.told} for name, source in sources.items()}):
        print(line, flush=True)
    started = time.perf_counter()
    prepare(output, plan, args.workers)
    seconds = time.perf_counter() - started
    for name, entry in json.loads((output / SIDECAR).read_text(encoding="utf-8"))["splits"].items():
        print(f"{name}.bin: {entry['tokens']:,} tokens, {entry['documents']:,} documents, sha256 {entry['sha256']}")
        if entry["empty"]:
            print(f"{name}.bin: {entry['empty']:,} empty documents were left out")
    print(f"wrote {output} in {seconds:.1f} s")


def find_validation(args: argparse.Namespace, train: str) -> Source | None:
    """What becomes val.bin: a split other than `train`, or None."""
    if args.no_validation or args.validation_share is not None or args.validation_documents is not None:
        return None
    if args.validation_split is not None:
        return open_source(args.source, args.validation_split, args.config, args.revision)
    for split in VALIDATION_SPLITS:
        try:
            source = open_source(args.source, split, args.config, args.revision)
        except NoSplit:
            continue
        if source.split != train:
            return source
    return None


if __name__ == "__main__":
    run(main)
