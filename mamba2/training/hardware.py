"""The device: which one, its peak speed, and how much memory a run needs on it."""

import contextlib
import platform
import re
import subprocess
import time
from collections.abc import Iterator

import torch

from mamba2.cli import INSTALLED, ROOT
from mamba2.config import Mamba2Config
from mamba2.model import num_parameters
from mamba2.ops.language import HAS_TRITON, triton

# Peak of dense matrix products in 1e12 FLOP/s, from the vendors' data sheets: (float32 without TF32, bfloat16, or
# float16 if the device lacks bfloat16). The first key that occurs as a word in the device's name counts.
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


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the matrix products: `bf16`, `fp32`, or `auto`, which is bf16 if the hardware supports it."""
    if name == "auto":
        capabilities = torch.cpu.get_capabilities()
        in_hardware = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        if device.type == "cuda":  # GPUs older than Ampere only emulate bfloat16
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type != "cpu":
            in_hardware = device.type == "xpu" and torch.xpu.is_bf16_supported(including_emulation=False)
        name = "bf16" if in_hardware else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype` over float32 weights; dt, A, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of matrix products in `dtype`. A GPU's is from PEAKS, None if it is not listed; a CPU's is the best
    of a few products timed now, on all threads."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
        return peaks and peaks[dtype != torch.float32] * 1e12
    size, best, spent = 1024, 0.0, 0.0
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    while spent < 0.5:  # seconds; bfloat16 without instructions of its own takes several for one product
        started = time.perf_counter()
        torch.mm(a, b)
        took = time.perf_counter() - started
        best, spent = max(best, 2 * size**3 / took), spent + took
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
    """Peak bytes of training on one device, within about 25 %: weights, gradients and AdamW's moments in float32
    (divided among `shards` devices), activations kept for the backward pass, and one chunk of the logits."""
    tokens, e = micro_batch * length, torch.finfo(dtype).bits // 8
    d, inner = config.hidden_size, config.d_inner
    # Bytes per token of one block: if it is recomputed, only its output and the residual stream; if not, also inputs
    # and outputs of in_proj, convolution, scan and gated norm, dt, and the share of a token in the chunks' states.
    between = d * (e + 4)
    states = e * inner * config.state_size // min(128, length)
    products = 4 * d + e * (d + config.d_in_proj + inner) + states
    block = products + e * (d + config.conv_dim + inner) + 8 * config.num_heads
    recomputed = 0 if checkpoint_every == 0 else -(-config.num_hidden_layers // checkpoint_every)
    whole = config.num_hidden_layers - recomputed
    kept = recomputed * between + whole * (products if keep_products_only else block)
    again = bool(recomputed or keep_products_only)  # the backward pass recomputes one block at a time
    kept += again * block
    copies = 0
    if e < 4:  # autocast's copies of the projections' weights
        copies = (again + whole * (not keep_products_only)) * e * d * (config.d_in_proj + inner)
    logits = 8 * config.vocab_size * min(tokens, 1024)
    return 16 * num_parameters(config) // shards + tokens * kept + copies + logits


def memory_used(device: torch.device) -> int:
    """Peak bytes in use so far: by a GPU's allocator, or by this process; 0 on Windows, which does not say."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    if platform.system() == "Windows":
        return 0
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def explain_out_of_memory(micro_batch: int, length: int, accumulation: int, checkpoint_every: int) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryError that suggests flags that need less memory for the same step."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, and the plain RuntimeError of the CPU's allocator
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
    """Python's, torch's and Triton's version, and this code's git revision, with a + if files were modified."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        if INSTALLED:  # perhaps in an environment inside of somebody else's checkout
            raise FileNotFoundError(ROOT / ".git")
        revision = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown (not a git checkout)"
    kernels = f"triton {triton.__version__}" if HAS_TRITON else "no triton"
    return f"python {platform.python_version()}, torch {torch.__version__}, {kernels}, revision {revision}"
