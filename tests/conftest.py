"""Before anything imports Triton: with no GPU its kernels run in the interpreter, on a machine with one compiled.

`@triton.jit` looks at TRITON_INTERPRET when it decorates, so the choice holds for the whole process; the tests that
compile for real targets start a process of their own.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.interpreter import use_exact_bfloat16

    use_exact_bfloat16()
