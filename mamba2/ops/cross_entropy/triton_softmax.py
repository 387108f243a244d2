"""The Triton form of `chunked.torch_softmax`: one launch, in the logits' own memory."""

import torch
import triton

from mamba2.ops.cross_entropy.triton_kernel import _softmax_kernel
from mamba2.ops.triton_launch import alignment


def triton_softmax(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, want_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (t,), float32; `logits` (t, v), rows of contiguous columns, become their gradient if it is wanted.

    A row may be overwritten up to the next multiple of 8 that its stride leaves room for.
    """
    rows, v = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # Sixteen logits per thread: two loads of 16 bytes on the way at once, and few enough registers for full occupancy.
    block = min(4096, max(256, triton.next_power_of_2(v)))
    with torch.cuda.device_of(logits):
        _softmax_kernel[(rows,)](
            logits,
            targets.contiguous(),
            losses,
            logits.stride(0),
            ignore_index,
            z_loss,
            v=v,
            BLOCK=block,
            GRADIENT=want_gradient,
            ALIGN=alignment(logits),
            num_warps=max(1, block // 512),
        )
    return losses, logits if want_gradient else None
