"""Host memory that a GPU reads over the link: page-locked and mapped; and copies out of it.

Pages are made by several threads, huge where the system has such, then locked a weight at a time:
cudaHostAlloc makes them with one thread. What can't be locked stays pageable, only copies reach it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import cupy as cp
import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_weights import HostBlock

if TYPE_CHECKING:
    from mlacli.backends.cuda_device import CudaDevice

_HUGE = 2 << 20  # a huge page
_MOST_THREADS = 16
_PORTABLE_MAPPED = 3  # flags of cudaHostRegister


class HostMemory:
    """Blocks that live until this object does; `refused` says why some could not be locked."""

    def __init__(self) -> None:
        self.refused: str | None = None
        self.n_locked = self.n_pageable = 0  # bytes
        self._maps: list[mmap.mmap] = []
        locked: list[int] = []
        self._locked = locked
        weakref.finalize(self, _unlock, locked, self._maps)

    def take(self, shape: tuple[int, ...]) -> HostBlock:
        """Memory for `shape` bytes; pages are there, with zeros."""
        nbytes = max(1, math.prod(shape))
        pages = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._maps.append(pages)
        whole = np.frombuffer(pages, np.uint8)
        start = -whole.ctypes.data % _HUGE
        memory = whole[start : start + nbytes]
        _touch(memory.ctypes.data, nbytes)
        mapped = self._lock(memory.ctypes.data, nbytes)
        if mapped:
            self.n_locked += nbytes
        else:
            self.n_pageable += nbytes
        array = Array.dense(memory.ctypes.data, shape, np.uint8)
        return HostBlock(array, memory.reshape(shape), mapped)

    def _lock(self, ptr: int, nbytes: int) -> bool:
        """Whether the pages are locked, and the device knows them by the same address."""
        if self.refused is None:
            try:
                _register(ptr, nbytes)
                self._locked.append(ptr)
            except cp.cuda.runtime.CUDARuntimeError as e:
                self.refused = str(e).partition(":")[0]
        return self.refused is None

    @property
    def problem(self) -> str | None:
        """What could not be locked, and what that means; None where all was."""
        if self.refused is None:
            return None
        part = f"{self.n_pageable >> 20} of {(self.n_locked + self.n_pageable) >> 20} MiB"
        return f"{part} of host memory could not be page-locked ({self.refused}): slower copies"


def _register(ptr: int, nbytes: int) -> None:
    cp.cuda.runtime.hostRegister(ptr, nbytes, _PORTABLE_MAPPED)


def _unlock(locked: list[int], maps: list[mmap.mmap]) -> None:
    for ptr in locked:
        cp.cuda.runtime.hostUnregister(ptr)
    locked.clear()
    maps.clear()


def _touch(ptr: int, nbytes: int) -> None:
    """Make the pages: the system zeroes them when they are first written."""
    n_threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), nbytes >> 23))
    step = -(-nbytes // n_threads)

    def part(i: int) -> None:
        ctypes.memset(ptr + i * step, 0, max(0, min(step, nbytes - i * step)))

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(part, range(n_threads)))


class CopyLink:
    """The link of a CudaDevice."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stream = cp.cuda.Stream(non_blocking=True)
        self._ready: dict[int, cp.cuda.Event] = {}
        self._free: dict[int, cp.cuda.Event] = {}

    def copy(self, slot: int, copies: Sequence[tuple[int, int, int]]) -> None:
        if self._device.noting:
            return
        if slot in self._free:
            self._stream.wait_event(self._free[slot])
        runtime = cp.cuda.runtime
        for target, source, nbytes in copies:
            runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDefault, self._stream.ptr)
        self._event(self._ready, slot).record(self._stream)

    def wait(self, slot: int) -> None:
        if not self._device.noting:
            self._device.stream.wait_event(self._ready[slot])
            self._device.kernels.follow()

    def release(self, slot: int) -> None:
        if not self._device.noting:
            self._event(self._free, slot).record(self._device.stream)

    @staticmethod
    def _event(events: dict[int, cp.cuda.Event], slot: int) -> cp.cuda.Event:
        if slot not in events:
            events[slot] = cp.cuda.Event(disable_timing=True)
        return events[slot]
