"""Simulated GPUs (kit/simt_gpu.py) with host memory: `simulated(monkeypatch, path, **flags)`.

Copies of the link are made as late as they may be, into slots that hold NaN until then, so that
whoever doesn't wait for them is found out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import simt_gpu
from kit.simt_gpu import SimtGpu

import mlacli
from mlacli.backends import cuda_device
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_weights import HostBlock
from mlacli.engine import Engine


class Link:
    """Holds copies back until they are waited for; a slot in use takes none."""

    def __init__(self, device: HostGpu) -> None:
        self.device = device
        self.pending: dict[int, Sequence[tuple[int, int, int]]] = {}
        self.in_use: set[int] = set()
        self.nbytes = 0

    def copy(self, slot: int, copies: Sequence[tuple[int, int, int]]) -> None:
        if self.device.noting:
            return
        assert slot not in self.in_use, "copies into a slot that launches still read"
        for target, _, nbytes in copies:
            ctypes.memset(target, 0xFF, nbytes)
        self.pending[slot] = copies

    def wait(self, slot: int) -> None:
        if self.device.noting:
            return
        assert not simt_gpu._CAPTURED, "a captured step waits for copies"
        for target, source, nbytes in self.pending.pop(slot):
            ctypes.memmove(target, source, nbytes)
            self.nbytes += nbytes
        self.in_use.add(slot)

    def release(self, slot: int) -> None:
        self.in_use.discard(slot)


class HostGpu(SimtGpu):
    """A simulated GPU beside host memory; `mapped` False: none of it is page-locked."""

    def __init__(self, *args: Any, mapped: bool = True, **more: Any) -> None:
        super().__init__(*args, **more)
        self.mapped, self.host_bytes = mapped, 0
        self.link = Link(self)
        self._blocks: list[np.ndarray] = []

    @property
    def noting(self) -> bool:
        return self._quiet

    def get(self, array: Array) -> np.ndarray:
        assert not simt_gpu._CAPTURED, "a captured step reads back to the host"
        return super().get(array)

    def take_host(self, shape: tuple[int, ...]) -> HostBlock:
        nbytes = int(np.prod(shape))
        memory = np.full(nbytes + 64, 0xFF, np.uint8)
        self._blocks.append(memory)
        memory = memory[-memory.ctypes.data % 64 :][:nbytes].reshape(shape)
        self.host_bytes += nbytes
        return HostBlock(Array.dense(memory.ctypes.data, shape, np.uint8), memory, self.mapped)

    @property
    def host_problem(self) -> str | None:
        return None if self.mapped else "nothing is page-locked"

    def keep(self, memory: np.ndarray, host: np.ndarray) -> None:
        memory[...] = host

    def send_back(self, memory: np.ndarray, array: Array) -> None:
        memory[...] = self.get(array)

    def bring(self, array: Array, source: Array) -> None:
        copy = partial(ctypes.memmove, array.ptr, source.ptr, source.nbytes)
        if simt_gpu._CAPTURED:
            simt_gpu._CAPTURED[-1].append(copy)
        elif not self._quiet:
            copy()


def simulated(
    monkeypatch: pytest.MonkeyPatch, path: Path, mapped: bool = True, **flags: Any
) -> Engine:
    """An engine of the file on such GPUs, cuda0 by default."""
    simt_gpu.simulated(monkeypatch)
    monkeypatch.setattr(cuda_device, "CudaDevice", partial(HostGpu, mapped=mapped))
    return mlacli.load(path, **{"device": "cuda0"} | flags)


def device_of(engine: Engine, rank: int = 0) -> HostGpu:
    return engine._ops(rank).device
