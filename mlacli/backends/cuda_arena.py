"""All device memory of a rank: one block of planned size, handed out from fixed addresses.

What stays (weights, cache) is taken from the front; what a forward needs for a moment comes from a
scratch part that is rewound after each half layer. Nothing is freed, so captured graphs stay valid.
"""

from __future__ import annotations

from typing import Any

import cupy as cp

from mlacli.backends.cuda_array import Array
from mlacli.errors import MemoryBudgetError

_ALIGN = 256


class Arena:
    """`nbytes` of device memory; takes raise MemoryBudgetError when it is used up."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.device, self.size = device, nbytes
        try:
            self._memory = cp.cuda.Memory(nbytes)
        except cp.cuda.runtime.CUDARuntimeError:
            free = cp.cuda.runtime.memGetInfo()[0]
            raise MemoryBudgetError(
                device, nbytes, free, "other programs use the device: free it, or use a smaller -c"
            ) from None
        self._at = 0
        self.peak = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array at the next free address; its content is whatever was there."""
        array = Array.dense(self._memory.ptr + self._at, shape, dtype)
        if self._at + array.nbytes > self.size:
            raise MemoryBudgetError(
                self.device, self._at + array.nbytes, self.size, "the plan's scratch is too small"
            )
        self._at += -(-array.nbytes // _ALIGN) * _ALIGN
        self.peak = max(self.peak, self._at)
        return array

    def mark(self) -> int:
        return self._at

    def rewind(self, mark: int) -> None:
        """Everything taken since `mark` may be overwritten."""
        self._at = mark
