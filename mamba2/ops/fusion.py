"""Arithmetic between matrix products, which torch.compile can fuse into one loop over memory.

The blocked torch forms keep it in small functions marked `fusable`. These run as written or, after `fuse()`, compiled:
about twice as fast on a CPU, after half a minute of compiling, which needs a C++ compiler. `block_elements` gives the
size of their largest intermediates.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

SHAPES = 32
_fused = False


def fuse(enabled: bool = True) -> None:
    """Compile each `fusable` function on its next call with new shapes; if not `enabled`, run all as written."""
    global _fused
    _fused = enabled


def is_fused() -> bool:
    return _fused


def require_cxx_compiler() -> None:
    """Raise ValueError if torch.compile would find no C++ compiler for code on the CPU."""
    # Imported only when needed: it takes a second and a tenth of a gigabyte.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compiling for a processor needs a C++ compiler; install g++ or clang++, name one in CXX, or do not compile"
        ) from error


def compile_like(function: Callable, *args: Any) -> Callable:
    """`function`, compiled for arguments like `args`: tensors of the same shapes, strides and dtypes, others equal.

    The caller makes sure of that, and that no gradients are recorded: torch.compile's own checks at each call take
    longer than a small function.
    """
    options = {"size_asserts": False}
    examples = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options).aot_compile((examples, {}))
    compiled.disable_guard_check()
    return compiled


def fusable(function: Callable) -> Callable:
    """Mark a function of tensors; its other arguments are constants, and tensors that it writes overlap no other.

    For use inside custom ops: with gradients enabled it runs as written. Each set of shapes, strides and dtypes is
    compiled separately; after `SHAPES` of them, others run as written.
    """
    forms: dict[tuple, Callable] = {}

    @functools.wraps(function)
    def call(*args):
        if not _fused or torch.is_grad_enabled():
            return function(*args)
        key = (torch.get_num_threads(), torch.is_autocast_enabled("cpu"), *map(_kind, args))
        form = forms.get(key)
        if form is None:
            if len(forms) == SHAPES:
                return function(*args)
            form = forms[key] = compile_like(function, *args)
        return form(*args)

    return call


def _kind(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.shape, argument.stride(), argument.dtype, argument.device


# Float32 elements per thread: half a megabyte, half of a typical L2 cache. Measured: with a quarter of the cache, the
# overhead of starting operations exceeds the gain; with all of it float32 is slower again.
CACHED_ELEMENTS = 2**17


def block_elements(device: torch.device) -> int:
    """Elements of the largest intermediate that a torch form should make at once.

    On a CPU `CACHED_ELEMENTS` per thread, so that the next operation finds it in cache; elsewhere enough to keep the
    device busy.
    """
    return CACHED_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else 2**26
