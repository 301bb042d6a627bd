"""Page-locked host memory that a step's inputs and outputs are copied through."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Host = NDArray[Any]


class Ring:
    """Page-locked buffers used in turns, with the event of the last copy of each."""

    def __init__(self, nbytes: int, count: int) -> None:
        import cupy as cp

        memory = np.frombuffer(
            cp.cuda.alloc_pinned_memory(nbytes * count), np.uint8, nbytes * count
        )
        self._pages = memory.reshape(count, nbytes)
        self._events = [cp.cuda.Event(disable_timing=True) for _ in range(count)]
        self._turn = -1

    def next(self) -> tuple[Host, Any]:
        self._turn = (self._turn + 1) % len(self._pages)
        return self._pages[self._turn], self._events[self._turn]
