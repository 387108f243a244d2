"""Triton for the kernels' modules; where it is not installed, what lets them be imported.

Triton has no wheels for macOS and Windows. Tensors go to plain torch there, and starting a kernel says what is missing.
"""

from typing import Any, Self

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise

    class Absent:
        """Any name of Triton: a decorator, an annotation, a kernel that does not start."""

        def __getattr__(self, name: str) -> Self:
            return self

        def __call__(self, *arguments: Any, **options: Any) -> Self:
            return self

        def __getitem__(self, grid: Any) -> Self:
            raise ModuleNotFoundError("the Triton kernels need the package triton", name="triton")

    triton = tl = Absent()

HAS_TRITON = isinstance(getattr(triton, "__version__", None), str)

__all__ = ["HAS_TRITON", "tl", "triton"]
