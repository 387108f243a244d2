"""The state after each of many documents in one row, in plain torch, for every backend.

    S = Σ_t exp(cs_last - cs_t) dt_t x_t ⊗ B_t        over the tokens t of the document, cs the cumulative sum of dt A

Documents are cut into windows of q tokens, the last one filled with zeros, whose sums are matrix products. Shapes alone
bound the number of windows, so nothing waits for a GPU to learn the lengths. A GPU adds the windows of a document in
any order: the last bits of a state of more than two windows may differ between two runs.
"""

import torch

from mamba2.device import widen
from mamba2.ops.ssd.blocked import best_chunk
from mamba2.ops.ssd.reference import SSDInputs, activate_dt


def document_states(inputs: SSDInputs, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """States (documents, h, p, n) in float32, or float64 for float64 input; zeros after an empty document.

    Arguments: `inputs` of a batch of 1 with `seq_idx` made from `cu_seqlens` (documents + 1,), without initial states.
    """
    l, h, p = inputs.x.shape[1:]
    g, n = inputs.B.shape[2:]
    q, documents = best_chunk(p, n), len(cu_seqlens) - 1
    wide = torch.promote_types(inputs.x.dtype, torch.float32)
    dt = activate_dt(inputs.dt, inputs.dt_bias, inputs.dt_softplus, inputs.dt_limit, wide).squeeze(0)  # (l, h)
    # Sums over all tokens are far larger than their differences inside a document: float32 would lose these.
    cs = (widen(dt) * widen(inputs.A)).cumsum(0)  # (l, h)
    starts, ends = (cu_seqlens.long().narrow(0, i, documents) for i in (0, 1))  # (documents,)
    document = inputs.seq_idx.squeeze(0)  # (l,)
    last = cs.index_select(0, ends.index_select(0, document) - 1)  # (l, h), of the last token of its document
    weight = dt * torch.exp(last - cs).to(wide)  # (l, h)

    windows = (ends - starts + q - 1) // q  # (documents,)
    until = windows.cumsum(0)
    moved = q * (until - windows) - starts  # (documents,), how far the tokens of each are from their slots
    slot = torch.arange(l, device=dt.device) + moved.index_select(0, document)  # (l,)
    count = l // q + documents  # at least the windows that there are; more hold zeros

    def by_window(tokens: torch.Tensor) -> torch.Tensor:
        empty = tokens.new_zeros(count * q, *tokens.shape[1:])
        return empty.index_copy(0, slot, tokens).unflatten(0, (count, q))

    x = weight.unsqueeze(-1) * inputs.x.squeeze(0).to(wide)  # (l, h, p)
    x = by_window(x).unflatten(2, (g, h // g))  # (count, q, g, h / g, p)
    B = by_window(inputs.B.squeeze(0).to(wide))  # (count, q, g, n)
    written = torch.einsum("cqgrp,cqgn->cgrpn", x, B).flatten(1, 2)  # (count, h, p, n)
    owner = torch.searchsorted(until, torch.arange(count, device=dt.device), right=True).clamp(max=documents - 1)
    return written.new_zeros(documents, h, p, n).index_add(0, owner, written)
