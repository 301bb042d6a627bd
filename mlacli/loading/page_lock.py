"""--mlock: keeps the pages of weights in memory, as far as the system allows."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any


class PageLock:
    """Locks arrays' pages when called; `problem` says why it couldn't, None while all went well."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.problem: str | None = None
        self._lock: Callable[..., int] | None = None

    def __call__(self, array: Any) -> None:
        if self.problem is None and array.nbytes:
            start, stop = _pages(array)
            if self._mlock(start, stop - start) == 0:
                self.nbytes += array.nbytes
            else:
                self.problem = os.strerror(ctypes.get_errno())

    def _mlock(self, start: int, n: int) -> int:
        if self._lock is None:
            self._lock = ctypes.CDLL(None, use_errno=True).mlock
        return self._lock(ctypes.c_void_p(start), ctypes.c_size_t(n))


def _pages(array: Any) -> tuple[int, int]:
    """First address and the one behind the last of the bytes that an array's view spans."""
    start: int = array.__array_interface__["data"][0]
    pairs = zip(array.shape, array.strides, strict=True)
    return start, start + sum((n - 1) * step for n, step in pairs) + array.itemsize
