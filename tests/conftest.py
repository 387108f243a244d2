"""Before anything imports Triton: with no GPU its kernels run in the interpreter, on a machine with one compiled.

`@triton.jit` looks at TRITON_INTERPRET when it decorates, so the choice holds for the whole process; the tests that
compile for real targets start a process of their own.
"""

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)


def _teach_the_interpreter_bfloat16() -> None:
    """Make Triton 3.7.1's interpreter compute with bfloat16 as the hardware does.

    It keeps these values as the integers of their bits, multiplies the integers in `tl.dot`, and cuts float32 off where
    the hardware rounds to nearest. Widened first, products are exact in float32; the rounding is torch's.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        return dot(self, widen(a), widen(b), d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl


if not torch.cuda.is_available():
    _teach_the_interpreter_bfloat16()
