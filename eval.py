"""Compare trained models by perplexity.

    python eval.py                                              the tiny study, into runs/tiny/perplexity_results.json
    python eval.py --model-base-path trained --seeds 1 2 3      the final models seed-S-INITIALIZATION-final in trained/
    python eval.py --model-base-path trained --checkpoint 2000  trained/seed-S-INITIALIZATION/checkpoint-2000
    python eval.py ... --dataset-name wikitext data.txt --dataset-split test train --protocol stateful lm_eval
    python eval.py ... --dataset-name synthetic:mqar            accuracy by distance, of models trained on the task
    python eval.py ... --report FOLDER                          report.html: which is better, how sure is that, and why
    python eval.py --study configs/study-text.toml --report     every run of a study; what is measured stays measured

Prints a table by initialisation and seed, and writes JSON: {initialization: {"mean": [one perplexity per model],
"all_perplexities": [[one per document] per model], "model_paths": [...], "details": [all results per model]}};
"mean" and "all_perplexities" are of the first data set, split and protocol.
"""

import argparse
import json
from pathlib import Path

import torch

from mamba2.checkpoint import weights_sha256
from mamba2.cli import json_ready, parse_arguments, run
from mamba2.data import is_synthetic, synthetic_samples
from mamba2.device import choose_device
from mamba2.evaluation.corpus import Corpus, load_corpus
from mamba2.evaluation.diagnostics import batches, diagnose
from mamba2.evaluation.perplexity import PROTOCOLS, Perplexity, evaluate, exp
from mamba2.evaluation.recall import recall
from mamba2.files import write_text
from mamba2.generate import generate
from mamba2.host_memory import keep_freed_memory
from mamba2.model import Mamba2LM, num_parameters
from mamba2.study import add_study
from mamba2.study.report import write_report
from mamba2.study.runs import Evaluated, Key, check_comparable, read_history
from mamba2.tokenizer import Tokenizer, load_tokenizer

DIAGNOSED = 8  # sequences, of LONGEST windows each
LONGEST = 32
RECORD_VERSION = 1  # of what `measure` gives


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-base-path", help="folder that holds the models")
    add("--seeds", type=int, nargs="+", default=[42], help="of the models to compare [42]")
    names = ["uniform", "linear_decay", "linear_decay_reverse"]
    what = f"of the models to compare [{' '.join(names)}]"
    add("--initializations", nargs="+", default=names, metavar="NAME", help=what)
    add("--checkpoint", type=int, metavar="N", help="evaluate checkpoint-N instead of the final model")
    add("--dataset-name", nargs="+", default=["wikitext"], help="hub names, local folders or files, stdlib [wikitext]")
    add("--dataset-config-name", nargs="+", help="one, or one for each name [of wikitext: wikitext-2-raw-v1]")
    add("--dataset-split", nargs="+", help="of every name but a single file [test, or the only one]")
    add(
        "--protocol",
        nargs="+",
        choices=list(PROTOCOLS),
        default=["stateful"],
        help="mamba2/evaluation/perplexity.py says",
    )
    add("--context", type=int, default=1024, help="tokens per window [1024]")
    add("--stride", type=int, help="of the protocol strided [half the context]")
    add("--max-tokens", type=int, help="evaluate the first documents only, up to this many tokens")
    add("--output-file", default="perplexity_results.json", help="[perplexity_results.json]")
    add("--batch-size", type=int, default=1, help="rows at a time; does not change the result [1]")
    add("--device", default="auto", help="auto (the GPU that is there), cpu, cuda, mps or xpu [auto]")
    add("--sample-tokens", type=int, default=0, help="tokens of text to show from each model [0]")
    add("--report", nargs="?", const="", metavar="FOLDER", help="write a report [report, beside --output-file]")
    add("--baseline", metavar="NAME", help="what the report compares with [log_uniform if it is there, else the first]")
    study = add_study(parser, "eval")
    args = parse_arguments(parser, "eval", required=("model_base_path",))
    args.study_file = study
    args.evaluations = study and study.output / "evaluations"
    for name in ("context", "stride", "batch_size", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.report is not None and args.checkpoint is not None:
        parser.error("--report is of whole runs; leave out --checkpoint")
    if args.baseline not in (None, *args.initializations):
        parser.error(f"--baseline {args.baseline} is not among --initializations {' '.join(args.initializations)}")
    if args.baseline is None:
        args.baseline = "log_uniform" if "log_uniform" in args.initializations else args.initializations[0]
    args.any_split = args.dataset_split is None
    args.dataset_split = args.dataset_split or ["test"]
    configs = args.dataset_config_name or [None]
    if len(configs) not in (1, len(args.dataset_name)):
        parser.error(f"--dataset-config-name has {len(configs)} values for {len(args.dataset_name)} data sets")
    args.dataset_config_name = configs * len(args.dataset_name) if len(configs) == 1 else configs
    return args


def main() -> None:
    args = parse()
    keep_freed_memory()

    # 1. Find the models, and refuse what cannot be compared before computing anything.
    base = Path(args.model_base_path)
    if not base.is_dir():
        raise FileNotFoundError(f"no folder at {base}")
    keys = [(name, seed) for name in args.initializations for seed in args.seeds]
    paths = {(name, seed): find_model(base, seed, name, args.checkpoint) for name, seed in keys}
    histories = {}
    if args.report is not None:
        histories = {key: read_history(base / f"seed-{key[1]}-{key[0]}") for key in keys}
        check_comparable({h.folder.name: h.settings for h in histories.values() if not h.diverged})
    tasks = [name for name in args.dataset_name if is_synthetic(name)]
    tokenizer = None if len(tasks) == len(args.dataset_name) else common_tokenizer(list(paths.values()))
    corpora = load_corpora(args, tokenizer)
    for corpus in corpora:
        print(f"data         {corpus.label}: {len(corpus.documents)} documents, revision {corpus.revision}")
    if tokenizer is not None:
        print(
            f"protocols    {', '.join(args.protocol)}, windows of {args.context}, float32, tokens of {tokenizer.name}"
        )

    # 2. Evaluate.
    records = {}
    for key, path in paths.items():
        file = args.evaluations and args.evaluations / f"seed-{key[1]}-{key[0]}.json"
        identity = identify(path, corpora, args)
        record = stored(file, identity)
        if record is None:
            record = measure(path, tokenizer, corpora, tasks, args)
            if file is not None:
                write_text(file, json.dumps({"identity": identity, "record": record}) + "\n")
        records[key] = record
        for result in record["results"]:
            print(f"{path}: {summary_line(result)}", flush=True)
        for result in record["recall"]:
            print(f"{path}: {result['source']}, {result['split']}: {result['accuracy']:.4f} right", flush=True)

    # 3. Print and write.
    results = {key: record["results"] for key, record in records.items()}
    for number, first in enumerate(next(iter(results.values()))):
        print(f"\n{first['protocol']}, {first['dataset']['label']}")
        print(table({key: entries[number] for key, entries in results.items()}, args.initializations, args.seeds))
    write_json(Path(args.output_file), records, paths)
    print(f"\nwrote {args.output_file}")
    if args.report is not None:
        folder = Path(args.report or Path(args.output_file).parent / "report")
        runs = {key: Evaluated(histories[key], records[key]) for key in keys}
        measured = f"{args.evaluations}/*.json" if args.evaluations else args.output_file
        sources = {"metrics": f"{base}/seed-*/metrics.jsonl", "evaluations": measured}
        plan, hypothesis = "", []
        if args.study_file:
            plan, hypothesis = args.study_file.plan, args.study_file.hypothesis
            sources["study"] = args.study_file.registered
        print(f"wrote {write_report(folder, runs, args.baseline, sources, plan, hypothesis)}")


def identify(path: Path, corpora: list[Corpus], args: argparse.Namespace) -> dict:
    """All that a measurement depends on; a stored one with the same identity is used again."""
    options = ("dataset_name", "dataset_split", "protocol", "context", "stride", "max_tokens")
    return {
        "version": RECORD_VERSION,
        "weights": weights_sha256(path),
        "data": [[corpus.label, corpus.revision] for corpus in corpora],
        "diagnosed": args.report is not None,
        **{name: getattr(args, name) for name in options},
    }


def stored(file: Path | None, identity: dict) -> dict | None:
    """The record of an earlier call, if it is of the same model, data and options."""
    if file is None or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the run is evaluated again") from error
    same = {**content["identity"], "diagnosed": identity["diagnosed"] and content["identity"]["diagnosed"]}
    return content["record"] if same == identity else None


def measure(
    path: Path, tokenizer: Tokenizer | None, corpora: list[Corpus], tasks: list[str], args: argparse.Namespace
) -> dict:
    """Evaluate one model: results, recall, diagnostics and settings, JSON-ready."""
    device = choose_device(args.device)
    model = Mamba2LM.from_pretrained(path, device, finite=True).eval()
    results = [
        described(evaluate(model, tokenizer, corpus, protocol, args.context, args.batch_size, args.stride), corpus)
        | {"context": args.context, "reset": PROTOCOLS[protocol], "tokenizer": tokenizer.name, "dtype": "float32"}
        | ({"stride": args.stride or args.context // 2} if protocol == "strided" else {})
        for corpus in corpora
        for protocol in args.protocol
    ]
    recalled = [recall(model, task, split, args.batch_size) for task in tasks for split in args.dataset_split]
    diagnostics = {}
    if args.report is not None:
        if corpora:
            documents = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in corpora[0].texts()]
            length = min(LONGEST * args.context + 1, sum(map(len, documents)))
        else:
            documents = synthetic_samples(tasks[0], args.dataset_split[0]).ids.tolist()
            length = len(documents[0])
        ids = batches(documents, length, DIAGNOSED).to(device)
        diagnostics = diagnose(model, ids, args.context, args.batch_size, positions=bool(corpora))
    if args.sample_tokens and tokenizer is not None:
        text = sample(model, tokenizer, args.sample_tokens)
        print(f"--- text of {path}, temperature 0.8\n{text}\n---", flush=True)
    settings = {"tokenizer": tokenizer and tokenizer.name, "parameters": num_parameters(model.config)}
    settings["data"] = [corpus.label for corpus in corpora] + tasks
    record = {"results": results, "recall": recalled, "diagnostics": diagnostics, "settings": settings}
    return json_ready(record)


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


def load_corpora(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[Corpus]:
    """Every split of every data set of text that the command line names."""
    corpora = []
    for name, config in zip(args.dataset_name, args.dataset_config_name):
        if is_synthetic(name):
            continue
        if config is None and "wikitext" in Path(name).name:
            config = "wikitext-2-raw-v1"
        for split in args.dataset_split[:1] if Path(name).is_file() else args.dataset_split:
            corpora.append(load_corpus(name, None if args.any_split else split, config))
            if corpora[-1].split != split:
                print(f"data         {name} has no split {split}: its split {corpora[-1].split} is evaluated")
    if args.max_tokens is not None:
        corpora = [corpus.first_tokens(tokenizer, args.max_tokens) for corpus in corpora]
    return corpora


def described(result: Perplexity, corpus: Corpus) -> dict:
    """A result with its protocol and data set, JSON-ready."""
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
    """Text sampled after one end-of-text token, with a fixed seed."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    start = torch.tensor([[tokenizer.eot_id]], device=device)
    ids = generate(model, start, tokens, temperature=0.8, generator=generator)[0, 1:].tolist()
    known = [i for i in ids if i < tokenizer.vocab_size]  # ids that only pad the vocabulary have no text
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


def write_json(file: Path, records: dict[Key, dict], paths: dict[Key, Path]) -> None:
    """Write the schema of the module's docstring; all results are under "details"."""
    content: dict[str, dict[str, list]] = {}
    for (name, seed), record in records.items():
        entry = content.setdefault(name, {"mean": [], "all_perplexities": [], "model_paths": [], "details": []})
        if results := record["results"]:
            entry["mean"].append(results[0]["perplexity"])
            entry["all_perplexities"].append(results[0]["per_document"])
        entry["model_paths"].append(str(paths[name, seed]))
        kept = [{key: value for key, value in result.items() if key != "per_document"} for result in record["results"]]
        entry["details"].append({"seed": seed, **record, "results": kept})
    write_text(file, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
