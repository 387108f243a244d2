"""Replacements for a GPU where there is none: its name and properties, clocks without meaning, a CUDA graph.

`pretend_gpu` changes nothing about where tensors are: they stay on the processor, and kernels run in the interpreter.
"""

import contextlib
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROPERTIES = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 * 2**30)


class Graph:
    """A CUDA graph: `replay` runs the captured operations again and writes results to the same memory."""

    def __init__(self):
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, before in self.calls:
            after = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{function} waits for the device, which a capture does not allow")
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, result))
        return result


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        """Nothing to wait for: on a CPU operations run in program order."""


def _time_once(function: Callable[[], object], **options: Any) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, what the code asks of a GPU is answered as an H100 would; `torch.cuda.is_available()` stays False."""
    answers: dict[str, Any] = {
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.get_device_name": lambda *_: PROPERTIES.name,
        "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.device": lambda *_: contextlib.nullcontext(),
        "torch.cuda.Stream": _Stream,
        "torch.cuda.current_stream": lambda *_: _Stream(),
        "torch.cuda.stream": lambda *_: contextlib.nullcontext(),
        "torch.cuda.CUDAGraph": Graph,
        "torch.cuda.graph": _Capture,
        "triton.testing.do_bench": _time_once,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        yield
