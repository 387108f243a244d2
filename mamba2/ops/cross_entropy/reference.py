"""The loss in plain torch, with all logits at once."""

import torch


def token_losses_reference(
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
    z_loss: float,
) -> torch.Tensor:
    """Loss of each token, (t,), 0 where the target is `ignore_index`."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (hidden @ weight.to(hidden.dtype).t()).to(torch.promote_types(hidden.dtype, torch.float32))
    lse = logits.logsumexp(dim=-1)
    kept = targets != ignore_index
    picked = logits.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    return torch.where(kept, lse - picked + z_loss * lse.square(), 0.0)
