"""A device of any size, as the launcher of ssd is told of it."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from mamba2.ops.ssd import op


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Inside, ssd's launches are those for so many: of very many every sequence is cut, however short."""
    with mock.patch.object(op, "multiprocessors", lambda _: count), mock.patch.object(op, "FEW_CHUNKS", 0):
        yield
