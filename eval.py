"""Compare trained models by perplexity.

    python eval.py                                              the tiny study, into runs/tiny/perplexity_results.json
    python eval.py --model-base-path trained --seeds 1 2 3      the final models seed-S-INITIALIZATION-final in trained/
    python eval.py --model-base-path trained --checkpoint 2000  trained/seed-S-INITIALIZATION/checkpoint-2000

Prints a table by initialisation and seed, and writes JSON: {initialization: {"mean": [one perplexity per model],
"all_perplexities": [[one per document] per model], "model_paths": [...], "details": [...]}}.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch

from mamba2.cli import parse_arguments, run
from mamba2.data import read_documents, wikitext_articles
from mamba2.evaluation.perplexity import PROTOCOLS, Perplexity, encode_documents, evaluate
from mamba2.generate import generate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import Tokenizer, load_tokenizer
from mamba2.training import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-base-path", help="folder that holds the models")
    add("--seeds", type=int, nargs="+", default=[42])
    add("--initializations", nargs="+", default=["uniform", "linear_decay", "linear_decay_reverse"], metavar="NAME")
    add("--checkpoint", type=int, metavar="N", help="evaluate checkpoint-N instead of the final model")
    add("--dataset-name", default="wikitext", help="hub name, local folder or file, or stdlib [wikitext]")
    add("--dataset-config-name", default="wikitext-2-raw-v1", help="[wikitext-2-raw-v1]")
    add("--dataset-split", default="test", help="[test]")
    add("--protocol", choices=PROTOCOLS, default="stateful", help="see mamba2/evaluation/perplexity.py [stateful]")
    add("--context", type=int, default=1024, help="tokens per window [1024]")
    add("--max-tokens", type=int, help="evaluate the first documents only, up to this many tokens")
    add("--output-file", default="perplexity_results.json", help="[perplexity_results.json]")
    add("--batch-size", type=int, default=1, help="rows at a time; does not change the result [1]")
    add("--sample-tokens", type=int, default=0, help="tokens of text to show from each model [0]")
    args = parse_arguments(parser, "eval", required=("model_base_path",))
    for name in ("context", "batch_size", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")

    # 1. Find the models, and refuse what cannot be compared before computing anything.
    base = Path(args.model_base_path)
    if not base.is_dir():
        raise FileNotFoundError(f"no folder at {base}")
    paths = {
        (name, seed): find_model(base, seed, name, args.checkpoint)
        for name in args.initializations
        for seed in args.seeds
    }
    tokenizers = {path: load_tokenizer(path) for path in paths.values()}
    tokenizer = next(iter(tokenizers.values()))
    if others := [path for path, other in tokenizers.items() if other.identity != tokenizer.identity]:
        raise ValueError(
            f"{others[0]} has the tokenizer {tokenizers[others[0]].name} and {next(iter(tokenizers))} has "
            f"{tokenizer.name}: their perplexities cannot be compared"
        )
    texts = load_texts(args)
    documents = encode_documents(texts, tokenizer, args.max_tokens)
    print(f"data         {args.dataset_name}, {args.dataset_split}: {len(documents)} documents", end=", ")
    print(f"{sum(map(len, documents)):,} tokens of {tokenizer.name}")
    print(f"protocol     {args.protocol}, windows of {args.context}, float32")

    # 2. Evaluate.
    results: dict[tuple[str, int], Perplexity] = {}
    device = choose_device()
    for (name, seed), path in paths.items():
        model = Mamba2LM.from_pretrained(path, device).eval()
        result = evaluate(model, tokenizer, documents, args.protocol, args.context, args.batch_size)
        results[name, seed] = result
        print(f"{path}: {result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.4f}", flush=True)
        if args.sample_tokens:
            print(
                f"--- text of {path}, temperature 0.8\n{sample(model, tokenizer, args.sample_tokens)}\n---", flush=True
            )

    # 3. Say and write.
    print(f"\n{table(results, args.initializations, args.seeds)}")
    write_json(Path(args.output_file), results, paths, args)
    print(f"\nwrote {args.output_file}")


def find_model(base: Path, seed: int, initialization: str, checkpoint: int | None) -> Path:
    """The final model of a run, else its last checkpoint, else a model folder of that name; or the asked checkpoint."""
    run_folder = base / f"seed-{seed}-{initialization}"
    if checkpoint is not None:
        candidates = [run_folder / f"checkpoint-{checkpoint}"]
    else:
        saved = sorted(run_folder.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
        candidates = [base / f"{run_folder.name}-final", *saved[:1], run_folder]
    found = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no model of seed {seed}, {initialization}: looked for {', '.join(map(str, candidates))}"
        )
    return found


def load_texts(args: argparse.Namespace) -> list[str]:
    """Documents of the data set: articles where it is WikiText, single lines for the protocol that means lines."""
    texts = read_documents(args.dataset_name, args.dataset_split, args.dataset_config_name)
    lines_of_one_file = "wikitext" in Path(args.dataset_name).name
    if lines_of_one_file and args.protocol != "hf_evaluate":
        texts = wikitext_articles(texts)
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{args.dataset_name} holds ids and not text; perplexity needs the text")
    return texts


def sample(model: Mamba2LM, tokenizer: Tokenizer, tokens: int) -> str:
    """Text that a model writes from nothing, the same at every call."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    start = torch.tensor([[tokenizer.eot_id]], device=device)
    ids = generate(model, start, tokens, temperature=0.8, generator=generator)[0, 1:].tolist()
    known = [i for i in ids if i < tokenizer.vocab_size]  # rows that only fill up the vocabulary have no text
    return tokenizer.decode(known)


def table(results: dict[tuple[str, int], Perplexity], initializations: list[str], seeds: list[int]) -> str:
    """Bits per byte by initialisation and seed, with the mean and its perplexity."""
    width = max(map(len, [*initializations, "bits per byte"]))
    columns = [*(f"seed {seed}" for seed in seeds), "mean", "nats/token", "+- (documents)"]
    lines = [f"{'bits per byte':{width}}  {''.join(f'{column:>16}' for column in columns)}"]
    for name in initializations:
        row = [results[name, seed] for seed in seeds]
        bits = [result.bits_per_byte for result in row]
        nats = sum(result.nats_per_token for result in row) / len(row)
        error = 1.96 * sum(result.standard_error for result in row) / len(row)
        interval = "-" if math.isnan(error) else f"{error:.4f}"
        cells = [*(f"{value:.4f}" for value in (*bits, sum(bits) / len(bits), nats)), interval]
        lines.append(f"{name:{width}}  {''.join(f'{cell:>16}' for cell in cells)}")
    return "\n".join(lines)


def write_json(
    file: Path, results: dict[tuple[str, int], Perplexity], paths: dict[tuple[str, int], Path], args: argparse.Namespace
) -> None:
    content: dict[str, dict[str, list]] = {}
    for (name, seed), result in results.items():
        entry = content.setdefault(name, {"mean": [], "all_perplexities": [], "model_paths": [], "details": []})
        entry["mean"].append(result.perplexity)
        entry["all_perplexities"].append(result.per_document)
        entry["model_paths"].append(str(paths[name, seed]))
        entry["details"].append(
            {
                "seed": seed,
                "protocol": result.protocol,
                "dataset": [args.dataset_name, args.dataset_config_name, args.dataset_split],
                "context": args.context,
                "nats_per_token": result.nats_per_token,
                "bits_per_byte": result.bits_per_byte,
                "standard_error": None if math.isnan(result.standard_error) else result.standard_error,
                **{key: [getattr(d, key) for d in result.documents] for key in ("nats", "tokens", "bytes", "words")},
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
