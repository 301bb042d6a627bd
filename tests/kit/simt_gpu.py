"""GPUs whose memory is the host's and whose kernels run on the CPU, for whole engines.

`simulated(monkeypatch)` puts one in the place of every cudaN. Launch order is execution order, so
streams, events and copies between GPUs have nothing to do but to be asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from kit.simt_device import SimtDevice

from mlacli import devices
from mlacli.backends import cuda_collectives, cuda_device, cuda_devices, cuda_ways
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import GpuPlace, Mail
from mlacli.devices import Device
from mlacli.errors import MemoryBudgetError

_SPARE = 8 << 20
_CAPTURED: list[list[Callable[[], None]]] = []  # of captures under way, the same list in all
_ONE_AT_A_TIME = threading.Lock()  # kit/simt.h runs one kernel in a process


class SimtGpu(SimtDevice):
    """An arena of `nbytes` full of NaN bits, and kernels that run when they are launched."""

    n_sm, capability = 4, 80
    n_compiled = 0
    is_busy = False

    def __init__(self, name: str, nbytes: int, beside: Any = None) -> None:
        self.name, self.nbytes = name, nbytes
        self._memory = np.full(nbytes + _SPARE + 512, 0xFF, np.uint8)
        self._base = -(-self._memory.ctypes.data // 256) * 256
        self._at = 0
        self._quiet = False
        self.launches: list[str] = []

    def use(self) -> None:
        """There is no current device."""

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = Array.dense(self._base + self._at, shape, dtype)
        self._at += -(-array.nbytes // 256) * 256
        if self._at > self.nbytes:
            raise MemoryBudgetError(self.name, self._at, self.nbytes)
        return array

    @property
    def noting(self) -> bool:
        return self._quiet

    def mark(self) -> int:
        return self._at

    def rewind(self, mark: int) -> None:
        self._at = mark

    def spare(self, most: int) -> Array:
        at = self._base + -(-self.nbytes // 256) * 256
        return Array.dense(at, (min(most, _SPARE),), np.uint8)

    def follow(self, other: Any) -> None:
        """Everything launched is done."""

    def pull(self, target: Array, source: Array, other: Any) -> None:
        assert target.nbytes == source.nbytes
        if not self._quiet:
            self.copy_in(target, other.get(source))

    @contextmanager
    def prepared(self, report: Any = None) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def launch(self, name: str, *args: Any, **how: Any) -> None:
        if self._quiet:
            return
        if _CAPTURED:
            _CAPTURED[-1].append(partial(self.launch, name, *args, **how))
            return
        self.launches.append(name)
        with _ONE_AT_A_TIME:
            super().launch(name, *args, **how)

    def capture(self, launches: Callable[[], Any]) -> Callable[[], None]:
        """All GPUs' launches in their order, from the outermost of captures within each other."""
        _CAPTURED.append(_CAPTURED[-1] if _CAPTURED else [])
        outermost = len(_CAPTURED) == 1
        try:
            launches()
        finally:
            graph = _CAPTURED.pop()

        def replay() -> None:
            for launch in graph if outermost else ():
                launch()

        return replay

    def send(self, array: Array, host: np.ndarray) -> None:
        self.copy_in(array, np.ascontiguousarray(host))

    def end_sends(self) -> None:
        """Nothing is under way."""

    def fetch(self, array: Array) -> Callable[[], Any]:
        host = self.get(array)
        return lambda: host

    def close(self) -> None:
        """Memory is kept, to be looked at."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def failure(self) -> None:
        """It lives."""


class SimtCollectives:
    """Sums between SimtGpus: all at once, when the last GPU launches its part."""

    how, why = "simulated", ""

    def __init__(
        self, gpus: Sequence[GpuPlace], how: str, reduce_type: str, max_floats: int
    ) -> None:
        self.gpus, self.memory = gpus, SimtDevice()
        self.n_ranks = sum(len(gpu.ranks) for gpu in gpus)
        self.slots = [self.memory.take((max_floats,), "f4") for _ in range(self.n_ranks)]
        self.table = self._table(self.slots)
        self.products_send, self.n_sent = True, 0
        self.packets = [self.memory.take((max_floats, 2), "f4") for _ in range(self.n_ranks)]
        posts = [np.array([0] * 7 + [box.ptr], np.uint64) for box in self.packets]
        self.mails = [Mail(self._put(post), 1) for post in posts]
        self.streams: dict[int, Array] = {}
        self.streams_table: Array | None = None
        self.parts: dict[int, Array | None] = {}
        self.outs: list[Array] = []

    def _table(self, arrays: Sequence[Array]) -> Array:
        return self._put(np.array([array.ptr for array in arrays], np.int64))

    def _put(self, host: np.ndarray) -> Array:
        array = self.memory.take(host.shape, host.dtype)
        self.memory.copy_in(array, host)
        return array

    def slot(self, rank: int) -> Array:
        return self.slots[rank]

    def mail(self, rank: int, shape: tuple[int, ...]) -> Mail | None:
        alone = any(gpu.ranks == [rank] for gpu in self.gpus)
        return self.mails[rank] if alone and self.products_send and shape[0] <= 32 else None

    def lone(self) -> bool:
        return False  # GPUs run one after another here

    def reduce_add(
        self, gpu_index: int, streams: list[Array], held: tuple[bool, ...], n_floats: int,
        sent: bool = False,
    ) -> None:  # fmt: skip
        if sent:
            (rank,), device = self.gpus[gpu_index].ranks, self.gpus[gpu_index].device
            args, self.n_sent = (self.slots[rank], self.packets[rank], 1, 1, 2), self.n_sent + 1
            device.launch("copy_columns", (n_floats,), 1, *args, N_GPUS=1, N_RANKS=1)
        self.streams |= zip(self.gpus[gpu_index].ranks, streams, strict=True)
        if gpu_index < len(self.gpus) - 1:
            return
        if self.streams_table is None:
            self.streams_table = self._table([self.streams[r] for r in range(self.n_ranks)])
        bits = sum(has << rank for rank, has in enumerate(held))
        self.gpus[gpu_index].device.launch(
            "add_partials", (-(-n_floats // 256),), 256, self.table, self.streams_table, n_floats,
            self.n_ranks, bits, TYPE=0,
        )  # fmt: skip

    def gather(
        self, gpu_index: int, columns: list[Array | None], widths: list[int], out: Array
    ) -> None:
        self.parts |= zip(self.gpus[gpu_index].ranks, columns, strict=True)
        self.outs.append(out)
        if gpu_index < len(self.gpus) - 1:
            return
        for one in self.outs:
            for rank, width in enumerate(widths):
                grid = (-(-width // 256), len(out))
                args = (one, self.parts[rank], width, sum(widths), sum(widths[:rank]))
                self.gpus[gpu_index].device.launch("join_columns", grid, 256, *args)
        self.outs = []

    def check(self) -> None:
        """Nobody waits."""

    def stop(self) -> bool:
        return True

    def reset(self) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Its memory is an arena's."""


def simulated(monkeypatch: pytest.MonkeyPatch, capability: int = 80) -> None:
    """From now on every cudaN is a SimtGpu; cpu stays what it is.

    Below capability 80 only plain kernels run: far fewer variants to compile.
    """
    found = devices._device

    def device(name: str) -> Device:
        return found(name) if name == "cpu" else Device(name, "cuda", 1 << 36, 1 << 36, capability)

    monkeypatch.setattr(devices, "_device", device)
    monkeypatch.setattr(cuda_devices, "use_device", lambda name: None)
    monkeypatch.setattr(SimtGpu, "capability", capability)
    monkeypatch.setattr(cuda_ways, "obstacle", lambda way, devices: "")
    monkeypatch.setattr(cuda_collectives, "Collectives", SimtCollectives)
    monkeypatch.setattr(cuda_device, "CudaDevice", SimtGpu)
    monkeypatch.setattr(devices, "bytes_in_use", lambda name: 0)
