"""Times of the model: training steps and their memory, decoding, prefill; and whether a repeated run is identical."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks.gpu.worker import Bench, Case, Wrong
from benchmarks.train_step import CONFIG, build_transformers
from mamba2.config import Mamba2Config
from mamba2.cuda_graph import GraphGradients
from mamba2.decoding import GraphDecoder
from mamba2.model import Mamba2LM, flops_per_token
from mamba2.training import autocast, make_optimizer
from mamba2.training.hardware import memory_estimate, peak_flops
from tests.oracles import mamba_ssm_classes
from tests.runs import arguments, contents, interrupt_after, make_study, run_train

# A file of configs/, windows at a time, tokens of a window.
SHAPES = [("config.json", 8, 1024), ("130m.json", 8, 2048), ("config.json", 58, 1024)]
LARGE = 20_000  # tokens of a step above which the section compile leaves it out


def cases(bench: Bench) -> dict[str, Case]:
    found: dict[str, Case] = {}
    shapes = [("tiny.json", 1, 8)] if bench.rehearse else SHAPES  # and smaller yet: see `read_config`
    modes = ("off", "graph") if bench.rehearse else ("off", "graph", "blocks", "model")
    for mode, (file, batch, length), lean in itertools.product(modes, shapes, (False, True)):
        if bench.compiling and (batch * length > LARGE or mode == "graph"):  # which compiles nothing of its own
            continue
        name = f"{file}, {batch} x {length}, bf16, " + ("eager" if mode == "off" else f"--compile {mode}")
        name += ", --keep-products-only" * lean
        found[name] = functools.partial(our_step, bench, CONFIG.with_name(file), batch, length, mode, lean)
        if mode == "off" and not lean and not bench.compiling:
            for who in ("transformers", "mamba_ssm")[: 0 if bench.rehearse else None]:
                title = f"{file}, {batch} x {length}, bf16, {who.replace('_', '-')}"
                found[title] = functools.partial(their_step, bench, who, CONFIG.with_name(file), batch, length)
    if not bench.compiling:
        found["decoding"] = lambda: decoding(bench)
        found["a run, again, and resumed"] = lambda: repeats(bench)
    return found


def read_config(bench: Bench, path: Path) -> Mamba2Config:
    config = Mamba2Config.from_json(path)
    if bench.rehearse:
        sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16, "vocab_size": 300}
        config = dataclasses.replace(config, **sizes, n_groups=1, expand=2, num_hidden_layers=1)
    return config


def our_step(bench: Bench, path: Path, batch: int, length: int, mode: str, lean: bool) -> dict[str, float]:
    config = read_config(bench, path)
    model = Mamba2LM(config).to(bench.device)
    for layer in model.backbone.layers:
        layer.keep_products_only = lean
        if mode == "blocks":
            layer.compile()
    if mode == "model":
        model.compile()
    values = training_step(bench, model, model, config, batch, length, graphed=mode == "graph")
    estimate = memory_estimate(config, batch, length, torch.bfloat16, 0, lean)
    return {**values, "estimated GB": estimate / 1e9}


def their_step(bench: Bench, who: str, path: Path, batch: int, length: int) -> dict:
    config = read_config(bench, path)
    if who == "mamba_ssm" and importlib.util.find_spec("mamba_ssm") is None:
        return {"not run": "mamba_ssm is not installed"}
    model, loss = build_transformers(config, path) if who == "transformers" else build_mamba_ssm(config)
    return training_step(bench, model.to(bench.device), loss, config, batch, length)


def build_mamba_ssm(config: Mamba2Config) -> tuple[nn.Module, Callable]:
    """Its model with its own kernels; the convolution is torch's, where its extension is not built."""
    classes = mamba_ssm_classes()
    layer = {"layer": "Mamba2", "d_state": config.state_size, "headdim": config.head_dim, "expand": config.expand}
    layer |= {"ngroups": config.n_groups, "chunk_size": config.chunk_size}
    shape = {"d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": config.vocab_size}
    model = classes.MambaLMHeadModel(classes.MambaConfig(**shape, ssm_cfg=layer))
    for block in model.backbone.layers:
        block.mixer.use_mem_eff_path = importlib.util.find_spec("causal_conv1d") is not None

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(ids).logits[..., : config.vocab_size]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return model, loss


def training_step(
    bench: Bench,
    model: nn.Module,
    loss_of: Callable,
    config: Mamba2Config,
    batch: int,
    length: int,
    graphed: bool = False,
) -> dict[str, float]:
    """Forward, backward and AdamW on random ids: the best of some steps."""
    torch.manual_seed(0)
    optimizer = make_optimizer(model.train(), 1e-4, (0.9, 0.95), 0.1)
    ids = torch.randint(config.vocab_size, (batch, length + 1), device=bench.device)

    total = torch.zeros((), dtype=torch.float64, device=bench.device)

    def add(batch: list[torch.Tensor], tokens: int | torch.Tensor, total: torch.Tensor) -> None:
        with autocast(bench.device, torch.bfloat16):
            loss = loss_of(*batch) / tokens
        loss.backward()
        total += loss.detach()

    if graphed:
        add = GraphGradients(model, add)

    def step() -> None:
        add([ids[:, :-1], ids[:, 1:]], batch * length, total)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graphed)

    def seconds() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds()
    if bench.compiling:
        return {}
    torch.cuda.reset_peak_memory_stats()
    best = min(seconds() for _ in range(1 if bench.rehearse else 5))
    busy = sum(bench.kernel_milliseconds(step).values()) / 1e3
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    values = {"tokens/s": batch * length / best, "ms": 1e3 * best, "waits for the host": max(0.0, 1 - busy / best)}
    if peak is not None:
        values["MFU"] = batch * length / best * flops_per_token(config, length) / peak
    return {**values, "GB": torch.cuda.max_memory_allocated() / 1e9}


def decoding(bench: Bench) -> dict[str, float]:
    """Tokens per second of one sequence, greedy: the plain step and the CUDA graph; a prompt of 8192 tokens."""
    config = read_config(bench, CONFIG)
    dtype = torch.float32 if bench.rehearse else torch.bfloat16
    model = Mamba2LM(config).to(bench.device, dtype)
    ids = torch.randint(config.vocab_size, (1, 8 if bench.rehearse else 8192), device=bench.device)
    _, state = model.prefill(ids)
    prefill = bench.milliseconds(lambda: model.prefill(ids))
    values = {"prefill tokens/s": 1e3 * ids.shape[1] / prefill}
    graph, plain = GraphDecoder(model, state), [s.rows(slice(None)) for s in state]
    steps = {"eager": lambda drawn: model.step(drawn, plain)[0], "CUDA graph": graph.step}
    texts = []
    for name, step in steps.items():
        drawn, text = ids[:, -1], []
        with torch.no_grad():
            for i in range(4 if bench.rehearse else 210):
                if i == 10:
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                drawn = step(drawn).argmax(-1)
                text.append(drawn)
        torch.cuda.synchronize()
        texts.append(torch.stack(text).tolist())
        if not bench.rehearse:
            values[f"{name} tokens/s"] = (len(text) - 10) / (time.perf_counter() - began)
    if texts[0] != texts[1]:
        raise Wrong({**values, "the graph's text": "differs from the step's"})
    return values


def repeats(bench: Bench) -> dict[str, str]:
    """train.py three times: as it is, again, and stopped half way and resumed. Every file must be equal."""
    # A whole model in the interpreter would take minutes.
    environment = {"MAMBA2_BACKEND": "torch"} if bench.rehearse else {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", environment):
        study = make_study(Path(folder))
        for name in ("first", "again", "resumed"):
            if name == "resumed":
                with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
                    interrupt_after(patch, steps=2)  # at a step that is saved anyway
                    run_train(*arguments(study, study / name, "--max-steps", 4))
            run_train(*arguments(study, study / name, "--max-steps", 4))
        runs = {name: contents(study / name) for name in ("first", "again", "resumed")}
    different = {
        name: [file for file, content in runs["first"].items() if runs[name].get(file) != content]
        for name in ("again", "resumed")
    }
    values = {
        name: f"{len(files)} files differ: {files[:3]}" if files else "equal" for name, files in different.items()
    }
    if any(different.values()):
        raise Wrong(values)
    return values
