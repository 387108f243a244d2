"""The convolution as a sum of shifted copies: no transposition to channels first, and readable."""

import torch
import torch.nn.functional as F


def causal_conv1d_reference(
    x: torch.Tensor,  # (b, l, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    seq_idx: torch.Tensor | None,  # (b, l)
    initial_state: torch.Tensor | None,  # (b, K - 1, d)
    activation: bool,
    return_final_state: bool,
    splits: tuple[int, ...],
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """See `mamba2.ops.causal_conv1d`. Returns the pieces of y and, if asked for, the last K - 1 inputs."""
    b, l, d = x.shape
    window = weight.shape[1] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_zeros(b, window, d)
    padded = torch.cat([initial_state.to(x.dtype), x], dim=1)  # (b, window + l, d)
    weight = weight.to(wide)

    if seq_idx is not None:
        changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1)
        # the window before the sequence belongs to the document of the first token
        document = F.pad(changes, (window + 1, 0))  # (b, window + l)

    y = x.to(wide) * weight[:, window]
    if bias is not None:
        y = y + bias.to(wide)
    for back in range(1, window + 1):
        start = window - back
        earlier = padded[:, start : start + l].to(wide)  # (b, l, d), the token `back` places before
        if seq_idx is not None:
            same = document[:, start : start + l] == document[:, window:]
            earlier = torch.where(same[:, :, None], earlier, torch.zeros_like(earlier))
        y = y + earlier * weight[:, start]
    if activation:
        y = F.silu(y)

    ys = y.to(x.dtype).split(splits, dim=-1)
    return ys, last_inputs(x, window, initial_state, seq_idx) if return_final_state else None


def last_inputs(
    x: torch.Tensor,  # (b, l, d)
    window: int,
    initial_state: torch.Tensor | None,  # (b, window, d)
    seq_idx: torch.Tensor | None,  # (b, l)
) -> torch.Tensor:
    """The last inputs of each sequence, (b, window, d), those of documents before the last token's set to zero."""
    b, l, d = x.shape
    kept = x[:, max(0, l - window) :]
    if l < window:
        earlier = x.new_zeros(b, window - l, d) if initial_state is None else initial_state[:, l:].to(x.dtype)
        kept = torch.cat([earlier, kept], dim=1)
    if seq_idx is None:
        return kept
    document = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1), (window + 1, 0))[:, l:]  # (b, window)
    return torch.where((document == document[:, -1:])[:, :, None], kept, torch.zeros_like(kept)) if window else kept


def causal_conv1d_step_reference(
    window: torch.Tensor,  # (b, K - 1, d)
    x: torch.Tensor,  # (b, d)
    weight: torch.Tensor,  # (d, K)
    bias: torch.Tensor | None,  # (d,)
    activation: bool,
) -> torch.Tensor:
    """See `mamba2.ops.causal_conv1d_step`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window.to(x.dtype), x[:, None]], dim=1)  # (b, K, d)
    window.copy_(inputs[:, 1:])
    y = (inputs.to(wide) * weight.t().to(wide)).sum(dim=1)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)
