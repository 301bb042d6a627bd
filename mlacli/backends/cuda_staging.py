"""Page-locked buffers through which weights reach a GPU while the next ones are being read."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

from mlacli.backends.cuda_weights import PIECE

Host = NDArray[Any]
_SLOTS = 3  # one being filled, one on its way, one that keeps the copy engine busy
_SMALL = 1 << 20  # bytes of a buffer that CuPy keeps: a small model needs no other
_MOST_THREADS = 8  # more readers than this gain nothing: memory's own bandwidth is the limit


class Staging:
    """Copies host arrays to the device in the stream's order; returns before they are there."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._turn = stream, 0
        n_threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) - 1))
        self._readers = ThreadPoolExecutor(n_threads, "mlacli-read")
        self._n_threads = n_threads
        self._slots = [np.empty(0, np.uint8)] * _SLOTS  # made when needed: locking pages is slow
        self._sent = [cp.cuda.Event(block=True, disable_timing=True) for _ in range(_SLOTS)]

    def send(self, target: int, host: Host) -> None:
        """Copy at most PIECE bytes, of any strides, to device address `target`.

        `host` has been read when this returns. Several threads read it: one alone can't follow
        the bus, be it for page faults of a mapped file or for reading from disk.
        """
        turn = self._turn % _SLOTS
        self._turn += 1
        self._sent[turn].synchronize()  # at once for an event that was never recorded
        if host.nbytes > len(self._slots[turn]):
            self._slots[turn] = _locked(_SMALL if host.nbytes <= _SMALL else PIECE)
        slot = self._slots[turn][: host.nbytes].view(host.dtype).reshape(host.shape)
        parts = list(zip(self._parts(slot), self._parts(host), strict=True))
        others = [self._readers.submit(np.copyto, to, part) for to, part in parts[1:]]
        np.copyto(*parts[0])
        for done in others:
            done.result()
        kind = cp.cuda.runtime.memcpyHostToDevice
        cp.cuda.runtime.memcpyAsync(target, slot.ctypes.data, slot.nbytes, kind, self._stream.ptr)
        self._sent[turn].record(self._stream)

    def _parts(self, array: Host) -> list[Host]:
        """About equal slices along the longer of the first two axes, one per thread."""
        axis = 1 if array.ndim > 1 and array.shape[1] > array.shape[0] else 0
        n = min(self._n_threads, max(1, array.nbytes >> 18), max(1, array.shape[axis]))
        return np.array_split(array, n, axis)

    def close(self) -> None:
        """Wait for the copies, and let go of the buffers."""
        self._stream.synchronize()
        self._readers.shutdown()
        self._slots = []


def _locked(nbytes: int) -> Host:
    """Page-locked memory; large ones go back to the system."""
    if nbytes <= _SMALL:
        return np.frombuffer(cp.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
    pages = cp.cuda.PinnedMemoryPointer(cp.cuda.PinnedMemory(nbytes), 0)
    return np.frombuffer(pages, np.uint8, nbytes)
