"""Causal self-attention, the mixer of the layers in the config's `attn_layer_idx`.

The interface of a mixer is described in `mamba2.mixer`. Names, shapes and options (`attn_cfg`) are those of mamba-ssm's
`MHA`, which state-spaces' mamba2attn-2.7b uses.

    q, k, v = conv(in_proj(u))        q, k rotated by position in the document (RoPE, Su et al. 2021, arXiv:2104.09864)
    y = out_proj(softmax(q kᵀ / √d) v)             over the tokens of the same document up to this one

b batch, l seqlen, t tokens in the state, h heads, g heads of keys and values, d head_dim, r rotary_emb_dim, K d_conv.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from mamba2.config import AttentionConfig, Mamba2Config
from mamba2.mixer import Linear, Parameters, draw_uniform, init_linear
from mamba2.ops import causal_conv1d, causal_conv1d_step
from mamba2.ops.documents import document_numbers


@dataclass
class AttentionState:
    """Keys and values of the document so far. Rows are padded on the left: only the last `lengths` tokens count."""

    conv: torch.Tensor  # (b, K - 1, (h + 2 g) d), the last inputs of the convolution
    k: torch.Tensor  # (b, t, g, d), rotated
    v: torch.Tensor  # (b, t, g, d)
    lengths: torch.Tensor  # (b,) int64

    def _map(self, function: Any) -> Self:
        return AttentionState(*(function(getattr(self, field.name)) for field in fields(self)))

    def detach(self) -> Self:
        """The same values without gradient."""
        return self._map(torch.Tensor.detach)

    def rows(self, index: list[int] | slice) -> Self:
        """A copy of the rows `index` of the batch."""
        return self._map(lambda tensor: tensor[index].clone())

    @staticmethod
    def join(states: Sequence["AttentionState"]) -> "AttentionState":
        """Concatenate along the batch; k and v are padded on the left to the longest."""
        longest = max(state.k.shape[1] for state in states)
        k, v = (
            torch.cat([F.pad(part, (0, 0, 0, 0, longest - part.shape[1], 0)) for part in parts])
            for parts in ([state.k for state in states], [state.v for state in states])
        )
        conv = torch.cat([state.conv for state in states])
        return AttentionState(conv, k, v, torch.cat([state.lengths for state in states]))


class AttentionMixer(nn.Module):
    """(b, l, hidden_size) -> (b, l, hidden_size)."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config, self.shape = config, AttentionConfig.of(config)
        heads, groups, d = self.shape.num_heads, self.shape.num_heads_kv, self.shape.head_dim
        self.widths = heads * d, groups * d, groups * d
        self.in_proj = Linear(config.hidden_size, sum(self.widths), bias=self.shape.qkv_proj_bias)
        self.conv1d = Parameters(sum(self.widths), 1, self.shape.d_conv, bias=True) if self.shape.d_conv else None
        self.out_proj = Linear(heads * d, config.hidden_size, bias=self.shape.out_proj_bias)

    def forward(
        self,
        u: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        state: AttentionState | None = None,
        return_state: bool = True,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, AttentionState | None]:
        """As in the Mamba-2 mixer."""
        numbers = seq_idx  # (b, l)
        if cu_seqlens is not None:
            numbers = document_numbers(cu_seqlens, u, seq_idx=seq_idx, state=state)
        qkv = self.in_proj(u)  # (b, l, (h + 2 g) d)
        conv = None if state is None else state.conv
        if self.conv1d is not None:
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            options = {"activation": False, "return_final_state": return_state, "cu_seqlens": cu_seqlens}
            qkv = causal_conv1d(qkv, weight, bias, seq_idx, conv, **options)
            qkv, conv = qkv if return_state else (qkv, None)
        elif return_state and conv is None:
            rows = len(qkv) if cu_seqlens is None else len(cu_seqlens) - 1
            conv = qkv.new_empty(rows, 0, qkv.shape[-1])
        past = 0 if state is None else state.k.shape[1]
        places, document = self._places(u, numbers, state)  # (b, l) each
        q, k, v = self._heads(qkv, places)
        if past:
            k, v = (torch.cat(parts, dim=1) for parts in ((state.k.to(k.dtype), k), (state.v.to(v.dtype), v)))
        mask = None
        if past or document is not None:
            mask = self._visible(u.shape[1], document, state)  # (b, 1, l, t + l)
        y = self._attend(q, k, v, mask)
        if not return_state:
            return y, None
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().long()  # (documents,)
            longest = int(lengths.max())
            index = cu_seqlens[1:, None] - longest + torch.arange(longest, device=u.device)  # (documents, longest)
            index = index.clamp(min=0)
            return y, AttentionState(conv, k[0, index], v[0, index], lengths)
        lengths = places[:, -1] + 1
        # Keep the last document only.
        kept = k.shape[1] if document is None else int(lengths.max())
        return y, AttentionState(conv, k[:, k.shape[1] - kept :], v[:, v.shape[1] - kept :], lengths)

    def step(self, u: torch.Tensor, state: AttentionState) -> torch.Tensor:
        """`forward` for one token: u (b, hidden_size) to y of the same shape. Updates `state` in place."""
        qkv = self.in_proj(u)
        if self.conv1d is not None:
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            qkv = causal_conv1d_step(state.conv, qkv, weight, bias, activation=False)
        q, k, v = self._heads(qkv[:, None], state.lengths[:, None])
        mask = self._visible(1, None, state)
        state.k, state.v = (torch.cat(parts, dim=1) for parts in ((state.k, k), (state.v, v)))
        state.lengths += 1
        return self._attend(q, state.k, state.v, mask)[:, 0]

    def _places(
        self, u: torch.Tensor, seq_idx: torch.Tensor | None, state: AttentionState | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each token's position in its document and, with seq_idx, the number of the document, (b, l) each. Document 0
        is the one that `state` belongs to."""
        b, l, _ = u.shape
        index = torch.arange(l, device=u.device).expand(b, l)
        before = torch.zeros(b, 1, dtype=torch.int64, device=u.device) if state is None else state.lengths[:, None]
        if seq_idx is None:
            return index + before, None
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        document = begins.cumsum(1)
        start = torch.where(begins, index, 0).cummax(1).values
        return index - start + torch.where(document == 0, before, 0), document

    def _visible(self, l: int, document: torch.Tensor | None, state: AttentionState | None) -> torch.Tensor:
        """The attention mask, (b or 1, 1, l, t + l): True for keys of the query's document up to the query itself."""
        device = self.out_proj.weight.device
        visible = torch.ones(l, l, dtype=torch.bool, device=device).tril()[None]
        if document is not None:
            visible = visible & (document[:, :, None] == document[:, None, :])
        if state is not None and state.k.shape[1]:
            t = state.k.shape[1]
            past = torch.arange(t, device=device) >= t - state.lengths[:, None]  # (b, t)
            past = past[:, None].expand(-1, l, -1)
            if document is not None:
                past = past & (document == 0)[:, :, None]
            visible = torch.cat([past, visible.expand(len(past), -1, -1)], dim=2)
        return visible[:, None]

    def _heads(self, qkv: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split qkv (b, l, (h + 2 g) d) into q (b, l, h, d), k and v (b, l, g, d), and rotate q and k."""
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)) for part in qkv.split(self.widths, dim=-1))
        r, base = self.shape.rotary_emb_dim, self.shape.rotary_emb_base
        if r == 0:
            return q, k, v
        frequencies = base ** (-torch.arange(0, r, 2, dtype=torch.float32, device=qkv.device) / r)
        angles = places[..., None] * frequencies  # (b, l, r / 2)
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second = x[..., : r // 2].float(), x[..., r // 2 : r].float()
            turned = first * cos - second * sin, second * cos + first * sin
            return torch.cat([*(part.to(x.dtype) for part in turned), x[..., r:]], dim=-1)

        return rotate(q), rotate(k), v

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention and out_proj, (b, l, hidden_size). `mask` None: plain causal attention."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, h or g, tokens, d)
        scale, grouped = self.shape.softmax_scale, q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def new_state(self, batch: int) -> AttentionState:
        weight, shape = self.out_proj.weight, self.shape
        empty = weight.new_empty(batch, 0, shape.num_heads_kv, shape.head_dim)
        conv = weight.new_zeros(batch, max(0, shape.d_conv - 1), sum(self.widths))
        return AttentionState(conv, empty, empty, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def init_parameters(self, generator: torch.Generator) -> None:
        """As in the Mamba-2 mixer."""
        for linear in (self.in_proj, self.out_proj):
            init_linear(linear, generator)
        if self.config.rescale_prenorm_residual:
            self.out_proj.weight.div_(self.config.num_hidden_layers**0.5)
        if self.conv1d is not None:
            for tensor in (self.conv1d.weight, self.conv1d.bias):
                draw_uniform(tensor, self.shape.d_conv**-0.5, generator)

    def in_proj_rows(self) -> tuple[int, ...]:
        return self.widths

    def flops_per_token(self, length: int) -> int:
        """Projections, convolution, scores and their product with v. A token attends to half the window on average."""
        inner = self.widths[0]
        projections = 2 * self.config.hidden_size * (sum(self.widths) + inner)
        return projections + 2 * self.shape.d_conv * sum(self.widths) + 2 * inner * length
