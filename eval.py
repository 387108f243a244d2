"""Compare trained models by perplexity.

    python eval.py                                              the tiny study, into runs/tiny/perplexity_results.json
    python eval.py --model-base-path trained --seeds 1 2 3      the final models seed-S-INITIALIZATION-final in trained/
    python eval.py --model-base-path trained --checkpoint 2000  trained/seed-S-INITIALIZATION/checkpoint-2000
    python eval.py ... --dataset-name wikitext data.txt --dataset-split test train --protocol stateful lm_eval

Prints a table by initialisation and seed, and writes JSON: {initialization: {"mean": [one perplexity per model],
"all_perplexities": [[one per document] per model], "model_paths": [...], "details": [all results per model]}}; the
first two of the first data set, split and protocol.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from mamba2.cli import parse_arguments, run
from mamba2.evaluation.corpus import Corpus, load_corpus
from mamba2.evaluation.perplexity import PROTOCOLS, Perplexity, evaluate, exp, json_ready
from mamba2.generate import generate
from mamba2.model import Mamba2LM
from mamba2.tokenizer import Tokenizer, load_tokenizer
from mamba2.training import choose_device

Key = tuple[str, int]  # initialisation, seed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-base-path", help="folder that holds the models")
    add("--seeds", type=int, nargs="+", default=[42])
    add("--initializations", nargs="+", default=["uniform", "linear_decay", "linear_decay_reverse"], metavar="NAME")
    add("--checkpoint", type=int, metavar="N", help="evaluate checkpoint-N instead of the final model")
    add("--dataset-name", nargs="+", default=["wikitext"], help="hub names, local folders or files, stdlib [wikitext]")
    add("--dataset-config-name", nargs="+", help="one, or one for each name [of wikitext: wikitext-2-raw-v1]")
    add("--dataset-split", nargs="+", default=["test"], help="of every name [test]")
    add("--protocol", nargs="+", choices=PROTOCOLS, default=["stateful"], help="mamba2/evaluation/perplexity.py says")
    add("--context", type=int, default=1024, help="tokens per window [1024]")
    add("--stride", type=int, help="of the protocol strided [half the context]")
    add("--max-tokens", type=int, help="evaluate the first documents only, up to this many tokens")
    add("--output-file", default="perplexity_results.json", help="[perplexity_results.json]")
    add("--batch-size", type=int, default=1, help="rows at a time; does not change the result [1]")
    add("--sample-tokens", type=int, default=0, help="tokens of text to show from each model [0]")
    args = parse_arguments(parser, "eval", required=("model_base_path",))
    for name in ("context", "stride", "batch_size", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("dataset_name", "dataset_config_name", "dataset_split", "protocol"):
        if isinstance(getattr(args, name), str):  # from a preset
            setattr(args, name, [getattr(args, name)])
    configs = args.dataset_config_name or [None]
    if len(configs) not in (1, len(args.dataset_name)):
        parser.error(f"--dataset-config-name has {len(configs)} values for {len(args.dataset_name)} data sets")
    args.dataset_config_name = configs * len(args.dataset_name) if len(configs) == 1 else configs
    return args


def main() -> None:
    args = parse()

    # 1. Find the models, and refuse what cannot be compared before computing anything.
    base = Path(args.model_base_path)
    if not base.is_dir():
        raise FileNotFoundError(f"no folder at {base}")
    paths = {
        (name, seed): find_model(base, seed, name, args.checkpoint)
        for name in args.initializations
        for seed in args.seeds
    }
    tokenizer = common_tokenizer(list(paths.values()))
    corpora = load_corpora(args, tokenizer)
    for corpus in corpora:
        print(f"data         {corpus.label}: {len(corpus.documents)} documents, revision {corpus.revision}")
    print(f"protocols    {', '.join(args.protocol)}, windows of {args.context}, float32, tokens of {tokenizer.name}")

    # 2. Evaluate.
    results: dict[Key, list[dict]] = {}
    device = choose_device()
    for key, path in paths.items():
        model = Mamba2LM.from_pretrained(path, device).eval()
        results[key] = [
            described(evaluate(model, tokenizer, corpus, protocol, args.context, args.batch_size, args.stride), corpus)
            | {"context": args.context, "tokenizer": tokenizer.name, "dtype": "float32"}
            for corpus in corpora
            for protocol in args.protocol
        ]
        for result in results[key]:
            print(f"{path}: {summary_line(result)}", flush=True)
        if args.sample_tokens:
            text = sample(model, tokenizer, args.sample_tokens)
            print(f"--- text of {path}, temperature 0.8\n{text}\n---", flush=True)

    # 3. Say and write.
    for number, first in enumerate(next(iter(results.values()))):
        print(f"\n{first['protocol']}, {first['dataset']['label']}")
        print(table({key: entries[number] for key, entries in results.items()}, args.initializations, args.seeds))
    write_json(Path(args.output_file), results, paths)
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


def common_tokenizer(paths: list[Path]) -> Tokenizer:
    """The tokenizer of all models. Raises ValueError naming two that differ."""
    tokenizers = {path: load_tokenizer(path) for path in paths}
    first = next(iter(tokenizers.values()))
    if others := [path for path, other in tokenizers.items() if other.identity != first.identity]:
        raise ValueError(
            f"{others[0]} has the tokenizer {tokenizers[others[0]].name} and {paths[0]} has {first.name}: "
            "their perplexities cannot be compared"
        )
    return first


def load_corpora(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Corpus]:
    """Every split of every data set that the command line names."""
    corpora = []
    for name, config in zip(args.dataset_name, args.dataset_config_name):
        if config is None and "wikitext" in Path(name).name:
            config = "wikitext-2-raw-v1"
        corpora += [load_corpus(name, split, config) for split in args.dataset_split]
    if args.max_tokens is not None:
        corpora = [corpus.first_tokens(tokenizer, args.max_tokens) for corpus in corpora]
    return corpora


def described(result: Perplexity, corpus: Corpus) -> dict:
    """A result with all that it takes to name it, JSON-ready."""
    dataset = {key: getattr(corpus, key) for key in ("label", "name", "config", "split", "revision")}
    return {"protocol": result.protocol, "dataset": dataset, **result.summary(), "per_document": result.per_document}


def summary_line(result: dict) -> str:
    if result["nats_per_token"] is None:
        return f"{result['protocol']}, {result['dataset']['label']}: the loss is not finite"
    return (
        f"{result['protocol']}, {result['dataset']['label']}: {result['nats_per_token']:.4f} nats/token, "
        f"{result['bits_per_byte']:.4f} bits per byte, perplexity {number(result['perplexity'])}, "
        f"per word {number(result['word_perplexity'])}"
    )


def sample(model: Mamba2LM, tokenizer: Tokenizer, tokens: int) -> str:
    """Text that a model writes from nothing, the same at every call."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    start = torch.tensor([[tokenizer.eot_id]], device=device)
    ids = generate(model, start, tokens, temperature=0.8, generator=generator)[0, 1:].tolist()
    known = [i for i in ids if i < tokenizer.vocab_size]  # rows that only fill up the vocabulary have no text
    return tokenizer.decode(known)


def table(results: dict[Key, dict], initializations: list[str], seeds: list[int]) -> str:
    """Nats per token by initialisation and seed, with the mean, its perplexity, and the test set's uncertainty."""
    width = max(map(len, [*initializations, "nats per token"]))
    columns = [*(f"seed {seed}" for seed in seeds), "mean", "perplexity", "bits per byte", "+- (documents)"]
    lines = [f"{'nats per token':{width}}  {''.join(f'{column:>16}' for column in columns)}"]
    for name in initializations:
        row = [results[name, seed] for seed in seeds]
        values = [result["nats_per_token"] for result in row]
        mean = None if None in values else sum(values) / len(values)
        bits = None if mean is None else sum(result["bits_per_byte"] for result in row) / len(row)
        ends = [result["interval_95"] for result in row]
        half = None if [None, None] in ends else sum(high - low for low, high in ends) / 2 / len(row)
        cells = [*map(number, [*values, mean, None if mean is None else exp(mean), bits, half])]
        lines.append(f"{name:{width}}  {''.join(f'{cell:>16}' for cell in cells)}")
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def write_json(file: Path, results: dict[Key, list[dict]], paths: dict[Key, Path]) -> None:
    """The replaced pipeline's schema, and beside it everything under "details"."""
    content: dict[str, dict[str, list]] = {}
    for (name, seed), entries in results.items():
        entry = content.setdefault(name, {"mean": [], "all_perplexities": [], "model_paths": [], "details": []})
        entry["mean"].append(entries[0]["perplexity"])
        entry["all_perplexities"].append(entries[0]["per_document"])
        entry["model_paths"].append(str(paths[name, seed]))
        kept = [{key: value for key, value in result.items() if key != "per_document"} for result in entries]
        entry["details"].append({"seed": seed, "results": kept})
    write_atomically(file, json.dumps(json_ready(content), indent=1) + "\n")


def write_atomically(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
