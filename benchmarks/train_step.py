"""Time and memory of one training step of the study's model, beside other implementations.

    python -m benchmarks.train_step                # the table: a third of an hour on two cores
    python -m benchmarks.train_step --quick        # batch 1, length 1024, fewer repetitions
    python -m benchmarks.train_step --no-compile   # without a C++ compiler

A step is forward, backward and AdamW, on random ids. Each contender runs in its own process, which reports its best
step and its largest resident memory (on a GPU: the allocator's peak). Share of peak: FLOPs of the model (by
`flops_per_token`, for every contender) by time, over the best matrix product measured in the same dtype. "lean": as
with train.py's `--keep-products-only --checkpoint-every off`, norms, convolution and gate are computed again in the
backward pass. "compiled": on a processor `mamba2.ops.fusion.fuse`, on a GPU torch.compile of the model.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mamba2.config import Mamba2Config
from mamba2.device import choose_device
from mamba2.host_memory import keep_freed_memory
from mamba2.model import Mamba2LM, flops_per_token, num_parameters
from mamba2.ops.fusion import fuse
from mamba2.training import autocast, make_optimizer

CONFIG = Path(__file__).parent.parent / "configs" / "config.json"


@dataclasses.dataclass(frozen=True)
class Contender:
    title: str
    build: Callable[[Mamba2Config], tuple[nn.Module, Callable]]
    dtype: torch.dtype = torch.float32
    compile: bool = False
    lean: bool = False


# -------------------------------------------------------------------------------------------------- contenders


def build_ours(config: Mamba2Config) -> tuple[nn.Module, Callable]:
    return (model := Mamba2LM(config)), model


def build_transformers(config: Mamba2Config, path: Path = CONFIG) -> tuple[nn.Module, Callable]:
    from transformers import Mamba2Config as TheirConfig
    from transformers import Mamba2ForCausalLM

    model = Mamba2ForCausalLM(TheirConfig.from_pretrained(path))

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    return model, loss


def build_minimal(config: Mamba2Config) -> tuple[nn.Module, Callable]:
    model = MinimalLM(config)

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")

    return model, loss


class MinimalMixer(nn.Module):
    """Mamba-2 as the paper's listing has it: whole-sequence einsums over chunks, everything left to autograd."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.cfg = cfg = config
        self.in_proj = nn.Linear(cfg.hidden_size, cfg.d_in_proj, bias=False)
        self.conv = nn.Conv1d(
            cfg.conv_dim, cfg.conv_dim, cfg.conv_kernel, groups=cfg.conv_dim, padding=cfg.conv_kernel - 1
        )
        self.dt_bias = nn.Parameter(torch.full((cfg.num_heads,), -4.0))
        self.A_log = nn.Parameter(torch.arange(1.0, cfg.num_heads + 1).log())
        self.D = nn.Parameter(torch.ones(cfg.num_heads))
        self.norm = nn.Parameter(torch.ones(cfg.d_inner))
        self.out_proj = nn.Linear(cfg.d_inner, cfg.hidden_size, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:  # (b, l, d)
        cfg, l = self.cfg, u.shape[1]
        bc = cfg.n_groups * cfg.state_size
        z, xBC, dt = self.in_proj(u).split([cfg.d_inner, cfg.conv_dim, cfg.num_heads], dim=-1)
        xBC = F.silu(self.conv(xBC.transpose(1, 2))[..., :l].transpose(1, 2))
        x, B, C = xBC.split([cfg.d_inner, bc, bc], dim=-1)
        x = x.unflatten(-1, (cfg.num_heads, cfg.head_dim))
        repeats = cfg.num_heads // cfg.n_groups
        B, C = (t.unflatten(-1, (cfg.n_groups, -1)).repeat_interleave(repeats, dim=2) for t in (B, C))
        dt = F.softplus(dt + self.dt_bias)  # (b, l, h)
        y = minimal_ssd(x * dt[..., None], dt * -self.A_log.exp(), B, C, min(cfg.chunk_size, l))
        y = (y + x * self.D[:, None]).flatten(2) * F.silu(z)
        grouped = y.unflatten(-1, (cfg.n_groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + cfg.layer_norm_epsilon)
        return self.out_proj(grouped.flatten(2) * self.norm)


def minimal_ssd(x: torch.Tensor, a: torch.Tensor, B: torch.Tensor, C: torch.Tensor, q: int) -> torch.Tensor:
    """x (b, l, h, p), a (b, l, h), B and C (b, l, h, n), chunks of q tokens; l is a multiple of q."""
    x, B, C = (t.unflatten(1, (-1, q)) for t in (x, B, C))  # (b, c, q, h, ·)
    a = a.unflatten(1, (-1, q)).permute(0, 3, 1, 2)  # (b, h, c, q)
    cs = a.cumsum(-1)
    L = segment_sums(a).exp()  # (b, h, c, q, q)
    inside = torch.einsum("bcihn,bcjhn,bhcij,bcjhp->bcihp", C, B, L, x)
    states = torch.einsum("bcjhn,bhcj,bcjhp->bchpn", B, (cs[..., -1:] - cs).exp(), x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = segment_sums(F.pad(cs[..., -1], (1, 0))).exp()  # (b, h, c + 1, c + 1)
    states = torch.einsum("bhkc,bchpn->bkhpn", between, states)[:, :-1]
    across = torch.einsum("bcihn,bchpn,bhci->bcihp", C, states, cs.exp())
    return (inside + across).flatten(1, 2)


def segment_sums(a: torch.Tensor) -> torch.Tensor:
    """(..., t) -> (..., t, t): the sum of a over (j, i], -inf for j > i."""
    cs = a.cumsum(-1)
    visible = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    return (cs[..., :, None] - cs[..., None, :]).masked_fill(~visible, -torch.inf)


class MinimalLM(nn.Module):
    def __init__(self, config: Mamba2Config):
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_epsilon
        self.embeddings = nn.Embedding(config.vocab_size, d)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(nn.Sequential(nn.RMSNorm(d, eps), MinimalMixer(config)) for _ in layers)
        self.norm = nn.RMSNorm(d, eps)
        self.head = nn.Linear(d, config.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


CONTENDERS = {
    "transformers": Contender("transformers, float32", build_transformers),
    "minimal": Contender("minimal PyTorch, float32", build_minimal),
    "ours": Contender("mamba2, float32", build_ours),
    "ours-lean": Contender("mamba2, float32, lean", build_ours, lean=True),
    "ours-bf16": Contender("mamba2, bf16 autocast", build_ours, torch.bfloat16),
    "ours-compiled": Contender("mamba2, float32, compiled", build_ours, compile=True),
    "ours-bf16-compiled": Contender("mamba2, bf16, compiled", build_ours, torch.bfloat16, compile=True),
    "ours-bf16-compiled-lean": Contender("mamba2, bf16, compiled, lean", build_ours, torch.bfloat16, True, True),
}


# ------------------------------------------------------------------------------------------------ measurements


def measure(contender: Contender, batch: int, length: int, seconds: float) -> dict[str, float]:
    """Best step of those that fit in `seconds` (three at least) after a first one; runs in a process of its own."""
    torch.manual_seed(0)
    device, config = choose_device(), Mamba2Config.from_json(CONFIG)
    model, loss_of = contender.build(config)
    model.to(device).train()
    if contender.build is build_ours:
        keep_freed_memory()  # as train.py does
        for layer in model.backbone.layers:
            layer.keep_products_only = contender.lean
    if contender.compile:
        if device.type == "cpu":
            fuse()
        else:
            loss_of = torch.compile(loss_of)
    optimizer = make_optimizer(model, 1e-4, (0.9, 0.95), 0.1)
    ids = torch.randint(config.vocab_size, (batch, length + 1), device=device)

    def step() -> float:
        _synchronize(device)
        start = time.perf_counter()
        with autocast(device, contender.dtype):
            loss = loss_of(ids[:, :-1], ids[:, 1:]) / (batch * length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize(device)
        return time.perf_counter() - start

    step()
    times = [step() for _ in range(3)]
    while sum(times) < seconds:
        times.append(step())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes; kB on Linux
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    return {"seconds": min(times), "memory": memory}


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of some square products."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(a)
        for _ in range(15):
            _synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b, out=result)
            _synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def in_a_process(*arguments: object) -> dict:
    command = [sys.executable, "-m", "benchmarks.train_step", "--worker", *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1 at length 1024 alone, fewer repetitions")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a compiler")
    parser.add_argument(
        "--threads", type=int, default=None, help="of torch, in every process; torch's own choice if left out"
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    device = choose_device()
    if args.worker and args.worker[0] == "peaks":
        names = ("float32", "bfloat16")
        print(json.dumps({name: matmul_peak(getattr(torch, name), device) for name in names}))
        return
    if args.worker:
        name, batch, length, seconds = args.worker
        print(json.dumps(measure(CONTENDERS[name], int(batch), int(length), float(seconds))))
        return

    config = Mamba2Config.from_json(CONFIG)
    flops = flops_per_token(config, 1024)
    peaks = in_a_process("peaks")
    print(machine(device))
    print(f"matrix products: {', '.join(f'{name} {peak / 1e9:,.0f} GFLOP/s' for name, peak in peaks.items())}")
    print(f"model: {num_parameters(config):,} parameters, {flops / 1e6:.0f} MFLOP per token and step\n")
    seconds = 5.0 if args.quick else 15.0
    names = [name for name in CONTENDERS if not (args.no_compile and CONTENDERS[name].compile)]
    print(f"{'':30}{'batch':>6}{'length':>8}{'tokens/s':>10}{'ratio':>8}{'memory':>10}{'of peak':>9}", flush=True)
    speeds: dict[tuple[str, int, int], float] = {}
    for batch, length in ((1, 1024),) if args.quick else ((1, 1024), (4, 1024), (1, 16384)):
        for name in names:
            if length > 1024 and name in ("transformers", "minimal"):
                continue
            contender = CONTENDERS[name]
            result = in_a_process(name, batch, length, seconds)
            speed = batch * length / result["seconds"]
            speeds[name, batch, length] = speed
            base = speeds.get(("transformers", batch, length))
            ratio = f"{speed / base:.1f}x" if base else ""
            share = speed * flops / peaks[str(contender.dtype).removeprefix("torch.")]
            memory = f"{result['memory'] / 1e9:.2f} GB"
            row = f"{contender.title:30}{batch:6}{length:8}{speed:10,.0f}{ratio:>8}{memory:>10}{share:9.0%}"
            print(row, flush=True)
    for name in names:
        if (name, 1, 16384) in speeds:
            factor = speeds[name, 1, 1024] / speeds[name, 1, 16384]
            print(f"{CONTENDERS[name].title}: a token at length 16384 costs {factor:.2f} of one at length 1024")


if __name__ == "__main__":
    main()
