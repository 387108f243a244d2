"""The device: which, how fast at best, how much memory a run takes on it."""

import contextlib
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from mamba2.config import Mamba2Config
from mamba2.model import num_parameters

# Dense matrix products, 1e12 FLOP/s by the vendors' data sheets: (float32 without TF32, bfloat16; float16 where the
# device has no bfloat16), for names that contain the entry as a word; the first that does counts.
PEAKS = {
    "B200": (75, 2250),
    "H200": (67, 989),
    "GH200": (67, 989),
    "H100 PCIe": (51, 756),
    "H100 NVL": (60, 835),
    "H100": (67, 989),
    "A100": (19.5, 312),
    "A800": (19.5, 312),
    "A10G": (31.5, 70),
    "A40": (37.4, 149.7),
    "RTX A6000": (38.7, 154.8),
    "L40S": (91.6, 362),
    "L40": (90.5, 181),
    "L4": (30.3, 121),
    "V100": (15.7, 125),
    "T4": (8.1, 65),
    "RTX 5090": (104.8, 209.5),
    "RTX 4090": (82.6, 165.2),
    "RTX 3090": (35.6, 71),
    "MI325X": (163.4, 1307),
    "MI300X": (163.4, 1307),
    "MI250X": (47.9, 191.5),
}


def choose_device(local_rank: int = 0) -> torch.device:
    """The GPU (of that number) if there is one."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the matrix products: `bf16`, `fp32`, or `auto`: bf16 on a device that computes in it."""
    if name == "auto":
        capabilities = torch.cpu.get_capabilities()
        in_hardware = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        if device.type == "cuda":  # before Ampere, products in bfloat16 are only emulated
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if in_hardware else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype` over float32 weights; dt, A, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that products in `dtype` reach at best: of a GPU from the table above, None where it has no entry; of a
    processor the best of a few products that are timed now, on all threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
        return peaks and peaks[dtype != torch.float32] * 1e12
    size, best = 1024, 0.0
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


# --------------------------------------------------------------------------------------------------------------- memory


def memory_estimate(
    config: Mamba2Config,
    micro_batch: int,
    length: int,
    dtype: torch.dtype,
    checkpoint_every: int,
    keep_products_only: bool = False,
    shards: int = 1,
) -> int:
    """Bytes that training takes on one device at its fullest, to about a quarter: weights, gradients and AdamW's
    moments in float32 (over `shards` devices), what blocks keep for the backward pass, and a piece of the logits."""
    tokens, e = micro_batch * length, torch.finfo(dtype).bits // 8
    d, inner = config.hidden_size, config.d_inner
    between = d * (e + 4)  # output and residual stream: all that a recomputed block keeps
    # The residual stream; inputs and outputs of in_proj, convolution, scan and gated norm; dt; some of the states.
    states = e * inner * config.state_size // min(128, length)
    products = 4 * d + e * (d + config.d_in_proj + inner) + states
    block = products + e * (d + config.conv_dim + inner) + 8 * config.num_heads
    recomputed = 0 if checkpoint_every == 0 else -(-config.num_hidden_layers // checkpoint_every)
    whole = config.num_hidden_layers - recomputed
    kept = recomputed * between + whole * (products if keep_products_only else block)
    again = bool(recomputed or keep_products_only)  # one block at a time is being recomputed
    kept += again * block
    copies = 0
    if e < 4:  # autocast's, of the weights of products
        copies = (again + whole * (not keep_products_only)) * e * d * (config.d_in_proj + inner)
    logits = 8 * config.vocab_size * min(tokens, 1024)
    return 16 * num_parameters(config) // shards + tokens * kept + copies + logits


def memory_used(device: torch.device) -> int:
    """Largest number of bytes in use so far: of a GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def explain_out_of_memory(micro_batch: int, length: int, accumulation: int, checkpoint_every: int) -> Iterator[None]:
    """Turn running out of memory into a MemoryError that says which flags take less for the same step."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what a processor's allocator raises
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        advice = []
        if checkpoint_every != 1:
            advice.append("--checkpoint-every 1 (recompute every block in the backward pass)")
        if micro_batch > 1:
            half = micro_batch // 2
            more = -(-micro_batch * accumulation // half)
            advice.append(f"--batch-size {half} --gradient-accumulation-steps {more}")
        else:
            advice.append("a shorter --max-length, or --parallel fsdp on more devices")
        raise MemoryError(
            f"out of memory with micro-batches of {micro_batch} windows of {length} tokens; try {', or '.join(advice)}"
        ) from error


def versions() -> str:
    """Python, torch, Triton, and the revision of this code, with a + where files have changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        revision = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown (not a git checkout)"
    parts = f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{parts}, revision {revision}"
