"""All device memory of a rank: one block of planned size, handed out from fixed addresses.

What stays (weights, cache) is taken from the front; what a forward needs for a moment comes from a
scratch part that is rewound after each half layer. Nothing is freed, so captured graphs stay valid.
Under MLACLI_DEBUG=1 every array is allocated apart, so that compute-sanitizer sees overruns.
"""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_sources import debugging
from mlacli.errors import MemoryBudgetError

_ALIGN = 256


class Arena:
    """`nbytes` of device memory; takes raise MemoryBudgetError when it is used up."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.device, self.size = device, nbytes
        self._at = 0
        self.peak = 0
        # Under MLACLI_DEBUG by (place, bytes): what is taken again in the same order, as when a
        # step is captured after it ran once, gets the same memory.
        self._apart: dict[tuple[int, int], Any] | None = {} if debugging() else None
        self._memory = self._allocated(1 if debugging() else nbytes)

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array at the next free address; its content is whatever was there."""
        array = Array.dense(self._memory.ptr + self._at, shape, dtype)
        if self._at + array.nbytes > self.size:
            raise MemoryBudgetError(
                self.device, self._at + array.nbytes, self.size, "the plan's scratch is too small"
            )
        if self._apart is not None:
            array = Array.dense(self._own(array.nbytes), shape, dtype)
        self._at += -(-array.nbytes // _ALIGN) * _ALIGN
        self.peak = max(self.peak, self._at)
        return array

    def spare(self, most: int) -> Array:
        """At most `most` bytes at the end, where nothing lies until that much is taken."""
        nbytes = max(0, min(most, (self.size - self._at) // _ALIGN * _ALIGN))
        if self._apart is not None:
            return Array.dense(self._own(nbytes), (nbytes,), np.uint8)
        start = (self.size - nbytes) // _ALIGN * _ALIGN
        return Array.dense(self._memory.ptr + start, (nbytes,), np.uint8)

    def _own(self, nbytes: int) -> int:
        """Address of memory for this array alone, NaN at first."""
        assert self._apart is not None
        memory = self._apart.get((self._at, nbytes))
        if memory is None:
            memory = self._apart[self._at, nbytes] = self._allocated(max(1, nbytes))
            # The ranks' streams don't wait for the default one: what was written there would come
            # after their first writes. This stream may be waited for while others are captured.
            stream = cp.cuda.Stream(non_blocking=True)
            cp.cuda.runtime.memsetAsync(memory.ptr, 255, max(1, nbytes), stream.ptr)
            stream.synchronize()
        return int(memory.ptr)

    def _allocated(self, nbytes: int) -> Any:
        try:
            return cp.cuda.Memory(nbytes)
        except cp.cuda.runtime.CUDARuntimeError:
            free = cp.cuda.runtime.memGetInfo()[0]
            raise MemoryBudgetError(
                self.device, nbytes, free,
                "other programs use the device: free it, or use a smaller -c",
            ) from None  # fmt: skip

    def close(self) -> None:
        """Free everything; what was taken must not be used any more."""
        self._memory, self._apart, self.size = None, None if self._apart is None else {}, 0

    def mark(self) -> int:
        return self._at

    def rewind(self, mark: int) -> None:
        """Everything taken since `mark` may be overwritten."""
        self._at = mark
