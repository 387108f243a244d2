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
    if not return_final_state:
        return ys, None
    final_state = padded[:, l:]
    if seq_idx is not None:
        same = document[:, l:] == document[:, -1:]
        final_state = torch.where(same[:, :, None], final_state, torch.zeros_like(final_state))
    return ys, final_state
