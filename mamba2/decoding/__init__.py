"""A token at a time, as fast as the device allows: decoders with `step(input_ids)` and `state()`, and how to draw."""

import torch

from mamba2.decoding.compiled import CompiledDecoder
from mamba2.decoding.plain import GraphDecoder, PlainDecoder
from mamba2.model import Mamba2LM, State
from mamba2.ops.backend import choose_backend

__all__ = ["CompiledDecoder", "GraphDecoder", "PlainDecoder", "make_decoder"]


def make_decoder(
    model: Mamba2LM, state: list[State], compiled: bool = False
) -> CompiledDecoder | GraphDecoder | PlainDecoder:
    """What advances `state`: `Mamba2LM.step`; if asked for, a compiled one on a processor; on a GPU a CUDA graph.

    MAMBA2_BACKEND=reference asks for the readable form, and so do weights of which each process holds a part, which are
    gathered when used, and layers of attention, whose state grows. Raises ValueError where a compiled step is asked for
    and cannot serve.
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
            there = ", ".join(name for name, is_there in obstacles.items() if is_there)
            raise ValueError(f"compiled decoding is for whole weights on a processor, backend torch; here: {there}")
        return CompiledDecoder(model, state)
    return GraphDecoder(model, state) if weight.is_cuda and not any(obstacles.values()) else PlainDecoder(model, state)
