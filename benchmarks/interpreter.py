"""Patches of Triton's interpreter: bfloat16 rounded as hardware does, and every memory access counted.

`prepare_interpreter` repairs two things in Triton's interpreter, which keeps bfloat16 as the bits of a uint16: casts
truncate where hardware rounds to nearest even, and `tl.dot` multiplies the bits as integers. And one in that of 3.6.0:
its scalars are arrays of one element, which NumPy from 2.4 on does not convert to numbers.

`record` counts what each launch moves. DRAM bytes are the unique 32-byte sectors that a launch reads, plus those that
it writes: what a cache large enough for one launch leaves. The addresses are kept, so that the same record tells
whether two programs of one launch wrote to one address.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

SECTOR = 32


def prepare_interpreter() -> None:
    """Patch the interpreter for the rest of the process: bfloat16 as on devices, and half the time. A second call does
    nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "exact_bfloat16", False):
        return
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def cast(self, source, target):
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_from_bfloat16(source.data), tl.float32)
        return plain_cast(self, source, target)

    def dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        a, b = (
            interpreter.TensorHandle(_from_bfloat16(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
            for t in (a, b)
        )
        return plain_dot(self, a, b, acc, input_precision, max_num_imprecise_acc)

    builder.cast_impl = cast
    builder.create_dot = dot
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))
    builder.create_fp_to_fp = lambda self, source, target, rounding: self.cast_impl(source, target)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_scalars(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_scalars
    builder.exact_bfloat16 = True
    _patch_once_a_launch()


def _patch_once_a_launch() -> None:
    """The interpreter replaces the functions of `triton.language` by its own in every call of a device function, which
    takes half of its time. Once in a launch, for each module that has such functions, is enough."""
    plain_patch, plain_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch(function):
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return plain_patch(function)

    def launch(self, *args, **kwargs):
        patched.clear()  # the previous launch has restored some of them
        return plain_launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _from_bfloat16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).astype(np.uint32) << 16).view(np.float32)


@dataclass
class Launch:
    """One kernel launch as the interpreter saw it."""

    name: str
    requested: int = 0  # bytes read and written, every access counted
    flops: int = 0  # of tl.dot: 2 m n k
    read: list[np.ndarray] = field(default_factory=list)  # sectors, unique per access
    written: list[np.ndarray] = field(default_factory=list)
    stores: list[tuple[tuple, np.ndarray]] = field(default_factory=list)  # (program, byte addresses), if asked for

    @property
    def dram(self) -> int:
        """Bytes of the unique sectors read, plus those of the unique sectors written."""
        return SECTOR * (_unique(self.read).size + _unique(self.written).size)

    def shared_stores(self) -> int:
        """Number of addresses that more than one program wrote to."""
        by_program: dict[tuple, list[np.ndarray]] = {}
        for program, addresses in self.stores:
            by_program.setdefault(program, []).append(addresses)
        everything = np.concatenate([_unique(parts) for parts in by_program.values()] or [np.empty(0)])
        return int((np.unique(everything, return_counts=True)[1] > 1).sum())


def _unique(parts: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


@contextlib.contextmanager
def record(keep_stores: bool = False) -> Iterator[list[Launch]]:
    """Record the kernel launches made inside the block, in order."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    plain = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_dot")}
    plain |= {name: getattr(builder, name) for name in ("create_atomic_rmw", "create_atomic_cas")}
    plain_call = executor.__call__
    launches: list[Launch] = []

    def touch(pointers, mask) -> tuple[np.ndarray, int]:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        launches[-1].requested += addresses.size * size
        return addresses, np.unique(addresses // SECTOR)

    def load(self, pointers, mask, *rest):
        launches[-1].read.append(touch(pointers, mask)[1])
        return plain["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        addresses, sectors = touch(pointers, mask)
        launches[-1].written.append(sectors)
        if keep_stores:
            launches[-1].stores.append((tuple(self.grid_idx), addresses))
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(name):
        def update(self, *args):
            pointers = args[1] if name == "create_atomic_rmw" else args[0]
            mask = args[3] if name == "create_atomic_rmw" else interpreter.TensorHandle(np.ones(1, bool), tl.int1)
            sectors = touch(pointers, mask)[1]
            launches[-1].read.append(sectors)
            launches[-1].written.append(sectors)
            return plain[name](self, *args)

        return update

    def dot(self, a, b, acc, *rest):
        launches[-1].flops += 2 * a.data.shape[-1] * int(np.prod(acc.data.shape))
        return plain["create_dot"](self, a, b, acc, *rest)

    def call(self, *args, **kwargs):
        launches.append(Launch(self.fn.__name__))
        return plain_call(self, *args, **kwargs)

    patched = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_dot": dot,
        "create_atomic_rmw": atomic("create_atomic_rmw"),
        "create_atomic_cas": atomic("create_atomic_cas"),
    }
    try:
        for name, function in patched.items():
            setattr(builder, name, function)
        executor.__call__ = call
        yield launches
    finally:
        for name, function in plain.items():
            setattr(builder, name, function)
        executor.__call__ = plain_call


@contextlib.contextmanager
def torch_operations() -> Iterator[list[int]]:
    """Bytes of arguments and results of each operation that torch runs on data inside the block.

    Allocations and views move nothing and are left out, and so is what the interpreter itself does to run a kernel.
    Custom operations are not looked into.
    """
    free = (
        "empty",
        "view",
        "as_strided",
        "detach",
        "expand",
        "slice",
        "select",
        "alias",
        "transpose",
        "permute",
        "unbind",
        "t.",
    )
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = str(function).removeprefix("aten.")
            if not any(part in name for part in free) and not name.startswith(("mamba2.", "unsqueeze")):
                tensors = tree_leaves((args, result))
                sizes.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)))
            return result

    plain_call = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        with _disable_current_modes():
            return plain_call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call
    try:
        with Watch():
            yield sizes
    finally:
        interpreter.GridExecutor.__call__ = plain_call
