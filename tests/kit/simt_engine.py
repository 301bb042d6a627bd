"""Whole models through the CUDA ops on the CPU: `simulated(monkeypatch, path, **flags)`.

Memory is this machine's, kernels run under kit/simt.h. Copies of the link are made as late as they
may be, into slots that hold NaN until then, so that whoever doesn't wait for them is found out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.simt_device import SimtDevice

import mlacli
from mlacli import devices, engine
from mlacli.backends import cuda_device, cuda_devices
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_weights import HostBlock
from mlacli.devices import Device
from mlacli.engine import Engine

_ALIGN, _SPARE = 256, 8 << 20


class Link:
    """Holds copies back until they are waited for; a slot in use takes none."""

    def __init__(self, device: ModelDevice) -> None:
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
        assert not self.device.capturing, "a captured step waits for copies"
        for target, source, nbytes in self.pending.pop(slot):
            ctypes.memmove(target, source, nbytes)
            self.nbytes += nbytes
        self.in_use.add(slot)

    def release(self, slot: int) -> None:
        self.in_use.discard(slot)


class ModelDevice(SimtDevice):
    """As CudaDevice, with an arena of the planned size."""

    n_compiled, compile_s = 0, 0.0

    def __init__(self, name: str, nbytes: int, mapped: bool = True) -> None:
        super().__init__()
        self._memory = np.full(nbytes + _SPARE + _ALIGN, 0xFF, np.uint8)
        self._base, self._at = -(-self._memory.ctypes.data // _ALIGN) * _ALIGN, 0
        self._end = self._base + nbytes // _ALIGN * _ALIGN
        self.noting = self.capturing = False
        self.mapped, self.host_bytes = mapped, 0
        self.link = Link(self)

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = Array.dense(self._base + self._at, shape, dtype)
        self._at += -(-array.nbytes // _ALIGN) * _ALIGN
        assert self._base + self._at <= self._end, "the plan's scratch is too small"
        return array

    def mark(self) -> int:
        return self._at

    def rewind(self, mark: int) -> None:
        self._at = mark

    def spare(self, most: int) -> Array:
        return Array.dense(self._end, (min(most, _SPARE),), np.uint8)

    @contextmanager
    def prepared(self, report: Any = None) -> Iterator[None]:
        self.noting = True
        yield
        self.noting = False

    def launch(self, name: str, *args: Any, **how: Any) -> None:
        if not self.noting:
            super().launch(name, *args, **how)

    def capture(self, launches: Callable[[], Any]) -> Callable[[], None]:
        with self.prepared():
            launches()

        def replay() -> None:
            self.capturing = True
            launches()
            self.capturing = False

        return replay

    def send(self, array: Array, host: np.ndarray) -> None:
        self.copy_in(array, np.ascontiguousarray(host))

    def end_sends(self) -> None:
        """Copies are made at once."""

    def synchronize(self) -> None:
        """So are launches."""

    def get(self, array: Array) -> np.ndarray:
        assert not self.capturing, "a captured step reads back to the host"
        return super().get(array)

    def take_host(self, shape: tuple[int, ...]) -> HostBlock:
        memory = np.full(int(np.prod(shape)) + 64, 0xFF, np.uint8)
        self._held.append(memory)
        memory = memory[-memory.ctypes.data % 64 :][: int(np.prod(shape))].reshape(shape)
        self.host_bytes += memory.nbytes
        return HostBlock(
            Array.dense(memory.ctypes.data, shape, np.uint8), memory, self.mapped
        )  # fmt: skip

    @property
    def host_problem(self) -> str | None:
        return None if self.mapped else "nothing is page-locked"

    def keep(self, memory: np.ndarray, host: np.ndarray) -> None:
        memory[...] = host

    def send_back(self, memory: np.ndarray, array: Array) -> None:
        memory[...] = self.get(array)


def simulated(
    monkeypatch: pytest.MonkeyPatch, path: Path, mapped: bool = True, **flags: Any
) -> Engine:
    """An engine of the file on one such device."""
    real = devices._device

    def found(name: str) -> Device:
        return real(name) if name == "cpu" else Device(name, "cuda", 1 << 36, 1 << 36, 80)

    monkeypatch.setattr(devices, "_device", found)
    monkeypatch.setattr(cuda_devices, "use_device", lambda name: None)
    monkeypatch.setattr(cuda_device, "CudaDevice", partial(ModelDevice, mapped=mapped))
    monkeypatch.setattr(engine, "bytes_in_use", lambda name: 0)
    return mlacli.load(path, device="cuda0", **flags)


def device_of(engine: Engine) -> ModelDevice:
    return engine._ops(0).device
