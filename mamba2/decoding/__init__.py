"""Decoders, which advance a state one token at a time with `step(input_ids)` and `state()`, and sampling."""

import torch

from mamba2.decoding.compiled import CompiledDecoder
from mamba2.decoding.plain import GraphDecoder, PlainDecoder
from mamba2.model import Mamba2LM, State
from mamba2.ops.backend import choose_backend

__all__ = ["CompiledDecoder", "GraphDecoder", "PlainDecoder", "make_decoder"]


def make_decoder(
    model: Mamba2LM, state: list[State], compiled: bool = False
) -> CompiledDecoder | GraphDecoder | PlainDecoder:
    """The decoder that starts from a copy of `state`: on a GPU a CUDA graph, with `compiled` on a CPU a compiled step,
    else `Mamba2LM.step`.

    `Mamba2LM.step` also serves MAMBA2_BACKEND=reference, sharded weights, autocast, and layers of attention, whose
    state grows. Raises ValueError if `compiled` is asked for in one of these cases.
    """
    weight = model.lm_head.weight
    backend = choose_backend(weight, ("reference", "torch", "triton"))
    obstacles = {
        "layers of attention": bool(model.config.attn_layer_idx),
        "sharded weights": type(model.backbone.layers[0].norm.weight.data) is not torch.Tensor,
        "autocast": torch.is_autocast_enabled(weight.device.type),
        "backend reference": backend == "reference",
    }
    if compiled:
        obstacles |= {f"backend {backend}": backend != "torch", weight.device.type: weight.is_cuda}
        if any(obstacles.values()):
            present = ", ".join(name for name, is_present in obstacles.items() if is_present)
            raise ValueError(f"compiled decoding is for whole weights on a processor, backend torch; here: {present}")
        return CompiledDecoder(model, state)
    return GraphDecoder(model, state) if weight.is_cuda and not any(obstacles.values()) else PlainDecoder(model, state)
