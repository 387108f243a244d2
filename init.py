"""Create models that differ only in the initialisation of dt_bias, or also of factors named with it.

    python init.py                                              the tiny study, into runs/tiny/models
    python init.py --config-path configs --seeds 1 2 3          the study's 40M model, 3 seeds x 3 initialisations
    python init.py --study configs/study-text.toml              every model of a study
    python init.py --list                                       the initialisations and what they mean
    python init.py --config-path configs --preview              what they do before any training: table and preview.png

Writes {output-path}/seed-{seed}-{initialization}/ with config.json, model.safetensors and the tokenizer. For one seed
all tensors but dt_bias are bit-identical across initialisations; a product such as log_uniform+A=ones changes A, too.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mamba2.cli import parse_arguments, run, shipped
from mamba2.config import WEIGHT_INITS, Mamba2Config
from mamba2.data import load_tokens
from mamba2.data.correlation import measure_eigenvalue
from mamba2.evaluation.diagnostics import nominal_half_life, shares_remembering, signals
from mamba2.factors import parse_initialization
from mamba2.files import atomic_folder
from mamba2.initializers import INITIALIZERS, DtParams, Initializer, dt_table
from mamba2.model import Mamba2LM, num_parameters
from mamba2.study import Study, add_study, figures
from mamba2.tokenizer import Tokenizer, get_tokenizer, save_tokenizer

PREVIEWED = {
    "dt": "dt",
    "half_life": "half-life, tokens",
    "residual_rms": "rms of residual stream",
    "output_rms": "rms of mixer output",
    "gradient_norm": "gradient norm",
    "ssm_to_skip": "state / skip D x, rms",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-path", default="configs", help="folder with a config.json, or one .json [configs]")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[42], help="one model of each initialisation per seed [42]"
    )
    names = ["uniform", "linear_decay", "linear_decay_reverse"]
    what = f"of dt_bias and other factors, from --list [{' '.join(names)}]"
    parser.add_argument("--initializations", nargs="+", default=names, metavar="NAME", help=what)
    what = "folder for the models, seed-SEED-NAME each [./mamba2-40m]"
    parser.add_argument("--output-path", default="./mamba2-40m", help=what)
    parser.add_argument("--t-max", type=float, default=0.1, help="largest dt [0.1]")
    parser.add_argument("--t-min", type=float, default=0.001, help="smallest dt [0.001]")
    what = "any other parameter that --list names: half_life_max=256, or 0.5L, a share of --length"
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=what)
    parser.add_argument("--length", type=int, help="tokens of the windows to train on [a study's max_length]")
    what = "data that autocorrelation is measured in [a study's]"
    parser.add_argument("--dataset-path", help=what)
    parser.add_argument("--weight-init", choices=list(WEIGHT_INITS), help="all other weights [what the config says]")
    what = "hidden_size from which muP scales initial weights and rates, with one learning rate for all widths [off]"
    parser.add_argument("--mup-base-width", type=int, help=what)
    parser.add_argument("--tokenizer", help="bytes, gpt2, gpt-neox-20b, a tokenizer.json [by the vocabulary's size]")
    parser.add_argument("--list", action="store_true", help="list the initialisations and stop")
    parser.add_argument(
        "--preview", action="store_true", help="show memory and signals at the first seed, write no model"
    )
    study = add_study(parser, "init")
    args = parse_arguments(parser, "init")
    if args.list:
        for parameter, choices in INITIALIZERS.items():
            if parameter == "A":
                print("\nfactors, as in log_uniform+A=ones")
            for name, initializer in choices.items():
                reads = ", ".join(sorted(initializer.reads))
                name = name if parameter == "dt_bias" else f"{parameter}={name}"
                print(f"{name:24} {first_line(initializer)}{f' Reads {reads}.' if reads else ''}")
        return

    # Everything that can be wrong is found before the first folder is made.
    config = Mamba2Config.from_json(shipped(args.config_path))
    if args.weight_init:
        config = config.with_weight_init(args.weight_init)
    if args.mup_base_width is not None:
        config = dataclasses.replace(config, mup_base_width=args.mup_base_width)
    used = {name: initializers(name) for name in args.initializations}
    tokenizer = choose_tokenizer(args.tokenizer, config.vocab_size)
    parameters = read_parameters(args, study, config, used, tokenizer)
    if tokenizer is not None:
        pad = config.pad_token_id if config.pad_token_id == tokenizer.eot_id else None
        config = dataclasses.replace(
            config, bos_token_id=tokenizer.eot_id, eos_token_id=tokenizer.eot_id, pad_token_id=pad
        )
    if args.preview:
        preview(config, args.seeds[0], args.initializations, parameters, Path(args.output_path))
        return
    folders = {
        (seed, name): Path(args.output_path) / f"seed-{seed}-{name}"
        for seed in args.seeds
        for name in args.initializations
    }
    finished = {key for key, folder in folders.items() if folder.exists()}
    for seed, name in finished:
        require_same(folders[seed, name], used[name], parameters, config.mup_base_width)

    print(f"config       {args.config_path}: {num_parameters(config):,} parameters")
    print(f"layers       {config.num_hidden_layers} x {config.num_heads} heads of {config.head_dim}")
    none = "none: no built-in fits this vocabulary; train on input_ids"
    rows = f"rows for {config.vocab_size:,} ids"
    print(f"tokenizer    {f'{tokenizer.name}: {tokenizer.vocab_size:,} ids, {rows}' if tokenizer else none}")
    print(f"dt           {args.t_min} to {args.t_max}")
    for (seed, name), folder in folders.items():
        if (seed, name) in finished:
            print(f"\n{folder} is there already and stays as it is")
            continue
        model = Mamba2LM(config, seed, name, parameters)
        print(f"\nseed {seed}, {name}: {summary(name)}")
        print(dt_table(model.dt_bias(), model.A()))
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            if tokenizer is not None:
                save_tokenizer(tokenizer, temporary)
        print(f"wrote {folder}")


def initializers(name: str) -> dict[str, Initializer]:
    """The initialisers of a product, by parameter."""
    of_dt_bias, factors = parse_initialization(name)
    return {
        parameter: INITIALIZERS[parameter][choice] for parameter, choice in {"dt_bias": of_dt_bias, **factors}.items()
    }


def read_parameters(
    args: argparse.Namespace,
    study: Study | None,
    config: Mamba2Config,
    used: dict[str, dict[str, Initializer]],
    tokenizer: Tokenizer | None,
) -> DtParams:
    """The DtParams that the flags give, or the data. Raises ValueError where one has no effect on any of the
    initialisations, or is missing."""
    of_study = study.tables["train"] if study else {}
    length, data = args.length or of_study.get("max_length"), args.dataset_path or of_study.get("dataset_path")
    keys = [setting.partition("=")[0] for setting in args.set]
    for key in keys:
        if key in ("t_min", "t_max"):
            raise ValueError(f"--set {key}: use --{key.replace('_', '-')}")
    defaults = {"t_min": args.t_min, "t_max": args.t_max, "dt_floor": config.time_step_floor}
    parameters = DtParams.read(args.set, length, **defaults)
    read = {key: name for name, choices in used.items() for choice in choices.values() for key in choice.reads}
    if unread := [key for key in keys if key not in read]:
        raise ValueError(f"--set {unread[0]}: none of {', '.join(used)} reads it")
    if args.length is not None and "length" not in read and not any(setting.endswith("L") for setting in args.set):
        raise ValueError(
            f"--length {args.length} is for shares such as --set half_life_max=0.5L and for initialisations that read "
            "it (--list), and there is none"
        )
    if "length" in read and length is None:
        raise ValueError(f"{read['length']} reads the length of the windows to train on: give --length")
    if "eigenvalue" in read and parameters.eigenvalue is None:
        if data is None:
            raise ValueError(f"{read['eigenvalue']} is measured in data: give --dataset-path, or --set eigenvalue=")
        eigenvalue = measure_eigenvalue(load_tokens(data, "train", tokenizer), length)
        print(f"eigenvalue   {eigenvalue:.4g} of the autocorrelation in windows of {length} of {data}")
        return dataclasses.replace(parameters, eigenvalue=eigenvalue)
    if args.dataset_path is not None:
        raise ValueError(f"--dataset-path {data} is for autocorrelation to be measured in, and nothing reads it")
    return parameters


def require_same(folder: Path, used: dict[str, Initializer], parameters: DtParams, mup_base_width: int | None) -> None:
    """Raise ValueError where a model that is there already was initialised with other parameters."""
    config = Mamba2Config.from_json(folder)
    if config.mup_base_width != mup_base_width:
        raise ValueError(
            f"{folder} is there already, with mup_base_width = {config.mup_base_width}, and not {mup_base_width} as "
            "wanted now: choose another --output-path"
        )
    records = {"dt_bias": config.dt_bias_init, **(config.factors_init or {})}
    for parameter, initializer in used.items():
        record = records.get(parameter) or {}
        for key, value in initializer.record(parameters).items():
            if record.get(key, value) != value:
                raise ValueError(
                    f"{folder} is there already, with {key} = {record[key]:g}, and not {value:g} as wanted now: choose "
                    "another --output-path"
                )


def preview(config: Mamba2Config, seed: int, names: list[str], parameters: DtParams, output: Path) -> None:
    """Print and draw what each initialisation means for a model that has not been trained."""
    rows = {}
    for name in names:
        model = Mamba2LM(config, seed, name, parameters).eval()
        ids = torch.randint(0, config.vocab_size, (2, 257), generator=torch.Generator().manual_seed(seed))
        tau = nominal_half_life(model)
        measured = signals(model, ids)
        print(f"\nseed {seed}, {name}: {summary(name)}\n{dt_table(model.dt_bias(), model.A())}")
        shares = (f"{share:.0%} > {tokens}" for tokens, share in shares_remembering(tau).items())
        print(f"heads by half-life in tokens: {', '.join(shares)}")
        print(f"layer | {' | '.join(f'{PREVIEWED[key]:>24}' for key in measured)}")
        for layer, values in enumerate(zip(*measured.values())):
            print(f"{layer:5} | {' | '.join(f'{value:24.4g}' for value in values)}")
        dt = F.softplus(model.dt_bias().double()).numpy(force=True)
        rows[name] = {"dt": dt, "half_life": tau, **{key: np.array(values) for key, values in measured.items()}}
    output.mkdir(parents=True, exist_ok=True)
    figure = figures.preview(rows, PREVIEWED, [key for key in PREVIEWED if key not in ("dt", "half_life")])
    (output / "preview.png").write_bytes(figures.png(figure))
    print(f"\nactivations and gradients are those of 2 x 256 random ids\nwrote {output / 'preview.png'}")


def summary(name: str) -> str:
    """First lines of the docstrings of an initialisation and its factors."""
    return " ".join(first_line(initializer) for initializer in initializers(name).values())


def first_line(initializer: Initializer) -> str:
    return initializer.function.__doc__.splitlines()[0]


def choose_tokenizer(name: str | None, vocab_size: int) -> Tokenizer | None:
    """The named tokenizer, or the largest of gpt-neox-20b, gpt2 and bytes that fits the vocabulary.

    Raises ValueError when a named one has more ids than the model has rows.
    """
    if name is not None:
        tokenizer = get_tokenizer(name)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer {name} has {tokenizer.vocab_size} ids and the config's vocab_size is {vocab_size}; "
                "the model needs a row for each"
            )
        return tokenizer
    fitting = (get_tokenizer(candidate) for candidate in ("gpt-neox-20b", "gpt2", "bytes"))
    return next((tokenizer for tokenizer in fitting if tokenizer.vocab_size <= vocab_size), None)


if __name__ == "__main__":
    run(main)
