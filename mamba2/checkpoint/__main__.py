"""Describe a model folder, convert it for another project, or export a checkpoint's optimizer state.

    python -m mamba2.checkpoint inspect MODEL [--strict] [--no-text]
    python -m mamba2.checkpoint convert SOURCE TARGET --to transformers
    python -m mamba2.checkpoint convert SOURCE TARGET --to mamba-ssm --dtype bfloat16
    python -m mamba2.checkpoint convert SOURCE TARGET.gguf --to gguf --dtype float16
    python -m mamba2.checkpoint push MODEL OWNER/MODEL
    python -m mamba2.checkpoint export-optimizer OUT/checkpoint-2000 moments.safetensors

MODEL and SOURCE can be folders of this project, transformers, mamba-ssm (state-spaces' mamba2-*) or Codestral Mamba.
"""

import argparse
import sys
from pathlib import Path

import torch

from mamba2.checkpoint.convert import LAYOUTS, convert
from mamba2.checkpoint.hub import fetch, push
from mamba2.checkpoint.inspect import report
from mamba2.checkpoint.training_state import export_optimizer
from mamba2.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="config, parameters, dt and half-lives, and what looks wrong")
    inspect.add_argument("model", help="model folder")
    inspect.add_argument("--strict", action="store_true", help="exit code 1 if something looks wrong")
    what = "do not load the model to see on text whether z and x are exchanged in in_proj"
    inspect.add_argument("--no-text", action="store_true", help=what)
    conversion = commands.add_parser("convert", help="write a folder or file that another project loads")
    conversion.add_argument("source", help="model folder of any layout")
    conversion.add_argument("target", help="folder or file to write; must not exist")
    conversion.add_argument("--to", choices=LAYOUTS, required=True)
    conversion.add_argument("--tokenizer", help="name or tokenizer.json, for a source that carries none")
    conversion.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="to store in"
    )
    moments = commands.add_parser(
        "export-optimizer", help="AdamW's moments of a checkpoint, sharded or not, as one file"
    )
    moments.add_argument("checkpoint", type=Path, help="checkpoint-N of a run")
    moments.add_argument("file", type=Path, help="safetensors file to write; must not exist")
    upload = commands.add_parser("push", help="upload a model folder to the hub")
    upload.add_argument("model", type=Path, help="model folder with safetensors")
    upload.add_argument("name", help="OWNER/MODEL; made if it is not there")
    upload.add_argument("--private", action="store_true", help="if it is made, for its owner alone")
    args = parser.parse_args()
    if args.command == "push":
        print(f"pushed {args.model} to {push(args.model, args.name, args.private)}")
        return
    if args.command == "inspect":
        text, found = report(fetch(args.model), not args.no_text)
        print(text)
        if found and args.strict:
            sys.exit(1)
        return
    if args.command == "export-optimizer":
        print(f"wrote {export_optimizer(args.checkpoint, args.file)} tensors to {args.file}")
        return
    tokenizer = convert(fetch(args.source), args.target, args.to, args.tokenizer, getattr(torch, args.dtype))
    if args.to == "gguf" and tokenizer and tokenizer.nfc:
        print("llama.cpp does not normalise text: it finds the ids of this tokenizer for text that is in NFC")
    print(f"wrote {args.target}, tokenizer {tokenizer.name if tokenizer else 'none: give one with --tokenizer'}")


if __name__ == "__main__":
    run(main)
