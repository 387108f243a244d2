"""SSD by chunks, in plain torch: matrix products inside a chunk, a recurrence between chunks.

With cs the inclusive cumulative sum of dt·A inside a chunk, S_c the state after chunk c, and i, j tokens of one chunk:

    Y_i = Σ_{j<=i} (C_i·B_j) exp(cs_i - cs_j) dt_j x_j + exp(cs_i) S_{c-1} C_i
    S_c = exp(cs_last) S_{c-1} + Σ_j exp(cs_last - cs_j) dt_j x_j ⊗ B_j

(Dao & Gu 2024, section 6.) Cost per token and head: O(q (n / heads_per_group + p) + p n), linear in the length.

Products take operands in the input's dtype; decays, sums and the carried state are float32 (float64 for float64 input).
Every decay factor that crosses a document boundary is set to zero by `masked_fill`, never by a multiplication, so that
inf · 0 cannot occur.
"""

import torch
import torch.nn.functional as F

from mamba2.ops.ssd.reference import SSDInputs, activate_dt, skip_and_gate


def ssd_chunked(inputs: SSDInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`. Returns y (b, l, h, p), and the last state (b, h, p, n) if asked for."""
    x, B, C, seq_idx = inputs.x, inputs.B, inputs.C, inputs.seq_idx
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    r = h // g  # heads per group
    q = min(inputs.chunk_size, l)
    c = -(-l // q)  # chunks
    wide = torch.promote_types(x.dtype, torch.float32)
    narrow = x.dtype

    # Past the end dt is 0: the state neither decays nor is written.
    padding = c * q - l
    dt = activate_dt(inputs.dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit, wide)
    dt_c = _pad(dt, padding).view(b, c, q, g, r).permute(0, 1, 3, 4, 2)  # (b, c, g, r, q)
    x_c = _pad(x, padding).view(b, c, q, g, r, p).permute(0, 1, 3, 4, 2, 5)  # (b, c, g, r, q, p)
    B_c = _pad(B, padding).view(b, c, q, g, n).transpose(2, 3)  # (b, c, g, q, n)
    C_c = _pad(C, padding).view(b, c, q, g, n).transpose(2, 3)  # (b, c, g, q, n)
    cs = torch.cumsum(dt_c * inputs.A.to(wide).view(g, r, 1), dim=-1)  # (b, c, g, r, q)

    # decay[i, j] = exp(cs_i - cs_j) for j <= i. The difference is never positive there; the clamp keeps exp finite
    # above the diagonal, whose values `masked_fill` drops.
    visible = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()  # (q, q)
    decay_in = torch.exp(cs)  # (b, c, g, r, q), from the state before the chunk to token i
    decay_out = torch.exp(cs[..., -1:] - cs)  # (b, c, g, r, q), from token j to the state after the chunk
    decay_chunk = decay_in[..., -1]  # (b, c, g, r)
    if seq_idx is not None:
        document = _document_number(seq_idx, padding).view(b, c, q)
        before = F.pad(document[:, :-1, -1], (1, 0))[:, :, None]  # (b, c, 1), of the token before the chunk
        visible = visible & (document[:, :, :, None] == document[:, :, None, :])[:, :, None, None]  # (b, c, 1, 1, q, q)
        continues = (document == before)[:, :, None, None]  # (b, c, 1, 1, q)
        survives = (document == document[:, :, -1:])[:, :, None, None]  # (b, c, 1, 1, q)
        decay_in = decay_in.masked_fill(~continues, 0.0)
        decay_out = decay_out.masked_fill(~survives, 0.0)
        decay_chunk = decay_chunk.masked_fill(~continues[..., -1], 0.0)
    decay = torch.exp((cs[..., :, None] - cs[..., None, :]).clamp(max=0.0)).masked_fill(~visible, 0.0)

    # Inside the chunk: one score matrix per group, weighted by each head's decay.
    CB = C_c @ B_c.transpose(-1, -2)  # (b, c, g, q, q)
    scores = CB.unsqueeze(3) * decay * dt_c.unsqueeze(-2)  # (b, c, g, r, q, q)
    y = scores.to(narrow) @ x_c  # (b, c, g, r, q, p)

    # Between chunks: what each chunk writes, then the recurrence, then what each token reads.
    x_out = (x_c * (decay_out * dt_c).unsqueeze(-1)).to(narrow)  # (b, c, g, r, q, p)
    written = x_out.transpose(-1, -2).reshape(b, c, g, r * p, q) @ B_c  # (b, c, g, r p, n)
    written = written.view(b, c, h, p, n).to(wide)
    if inputs.initial_states is None:
        state = written.new_zeros(b, h, p, n)
    else:
        state = inputs.initial_states.to(wide)
    states = []
    for chunk in range(c):
        states.append(state)
        state = decay_chunk[:, chunk].reshape(b, h, 1, 1) * state + written[:, chunk]
    incoming = torch.stack(states, dim=1).to(narrow).view(b, c, g, r * p, n)
    read = (C_c @ incoming.transpose(-1, -2)).view(b, c, g, q, r, p).transpose(3, 4)  # (b, c, g, r, q, p)
    y = y.to(wide) + read * decay_in.unsqueeze(-1)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, c * q, h, p)[:, :l]
    y = skip_and_gate(y, x, inputs.D, inputs.z)
    return y.to(narrow), state if inputs.return_final_states else None


def _pad(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """Append zeros along the second dimension, (b, l, ...) -> (b, l + tokens, ...), contiguous."""
    if tokens:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, tokens))
    return tensor.contiguous()


def _document_number(seq_idx: torch.Tensor, padding: int) -> torch.Tensor:
    """Count of changes of `seq_idx` up to each token, (b, l + padding); padding belongs to the last document."""
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(dim=1)
    number = F.pad(changes, (1, 0))
    return torch.cat([number, number[:, -1:].expand(-1, padding)], dim=1)
