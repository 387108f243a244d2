"""Arithmetic between products of matrices, which torch.compile can fuse into one loop over memory.

The blocked torch forms keep it in small functions marked `fusable`. These run as they are written, or, after `fuse()`,
compiled: on a processor about twice as fast, after half a minute of compiling, for whoever has a C++ compiler.
`block_elements` says how much they should take at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

SHAPES = 32
_fused = False


def fuse(enabled: bool = True) -> None:
    """Compile every `fusable` function when it is next called with shapes that are new, or stop doing so."""
    global _fused
    _fused = enabled


def is_fused() -> bool:
    return _fused


def require_cxx_compiler() -> None:
    """Raise ValueError where torch.compile, for a processor, would not find a C++ compiler."""
    # Not before compiling is asked for: a second and a tenth of a gigabyte.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compiling for a processor needs a C++ compiler; install g++ or clang++, name one in CXX, or do not compile"
        ) from error


def compile_like(function: Callable, *args: Any) -> Callable:
    """`function`, compiled for arguments like `args`: the same shapes, strides and dtypes, the same other values.

    The caller answers for that, and for no gradients being recorded. torch.compile's own checks at each call take
    longer than a small function does.
    """
    options = {"size_asserts": False}
    examples = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options).aot_compile((examples, {}))
    compiled.disable_guard_check()
    return compiled


def fusable(function: Callable) -> Callable:
    """Mark a function of tensors; any others of its arguments are constants, and what it writes overlaps with nothing.

    For backward passes of their own: while autograd records, it runs as written. Each set of shapes, strides and dtypes
    is compiled by itself; after as many as `SHAPES`, others run as written.
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


# Float32 elements per thread: half a megabyte, half of a second-level cache of today. Measured: with a quarter of the
# cache, starting operations costs more than is saved; with all of it float32 is slower again.
CACHED_ELEMENTS = 2**17


def block_elements(device: torch.device) -> int:
    """Elements of the largest intermediate that a torch form should make at once.

    On a processor about what the second-level caches of its cores hold in float32, so that the next operation finds it
    there; elsewhere as much as keeps the device busy.
    """
    return CACHED_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else 2**26
