"""Arithmetic between products of matrices, which torch.compile can fuse into one loop over memory.

The blocked torch forms keep it in small functions marked `fusable`. These run as they are written, or, after `fuse()`,
compiled: on a processor about twice as fast, after half a minute of compiling, for whoever has a C++ compiler.
"""

import functools
from collections.abc import Callable

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


def fusable(function: Callable) -> Callable:
    """Mark a function of tensors; any others of its arguments are constants.

    Each set of shapes is compiled by itself; after as many as `SHAPES`, others run as written.
    """

    @functools.cache
    def compiled() -> Callable:
        # Not before it is asked for: the compiler takes a second and a tenth of a gigabyte to import.
        return torch.compile(function, dynamic=False, recompile_limit=SHAPES)

    @functools.wraps(function)
    def call(*args):
        return (compiled() if _fused else function)(*args)

    return call
