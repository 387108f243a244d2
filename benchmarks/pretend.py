"""Tells the launcher of ssd another number of multiprocessors than the device has."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from mamba2.ops.ssd import op


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Inside, ssd launches as for `count` multiprocessors: with very many it cuts every sequence, even a short one."""
    with mock.patch.object(op, "multiprocessors", lambda _: count), mock.patch.object(op, "FEW_CHUNKS", 0):
        yield
