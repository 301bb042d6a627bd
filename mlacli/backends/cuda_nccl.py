"""Collectives through NCCL, for GPUs that can't reach each other's memory, or when asked for.

One process, one communicator a GPU. NVLink multicast stays off unless the user set
NCCL_NVLS_ENABLE: it has taken hosts' GPUs out of service.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import cupy as cp
import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import REDUCE_TYPES, Group, bits, pointers, power_of_two
from mlacli.errors import BackendError

_KEPT: dict[tuple[int, ...], list[Any]] = {}  # communicators by devices
_TAKEN: dict[tuple[int, ...], list[int]] = {}  # bytes of each device that went with them
_REST = 1.0  # seconds in which GPUs come to rest when a step was broken off
_WARM = (1, 1 << 10, 1 << 14, 1 << 18, 1 << 22)  # floats: NCCL sets up each size class once


def set_environment(environment: Any = os.environ) -> None:
    """Multicast off unless the user decided; before NCCL's first call, and for child processes."""
    environment.setdefault("NCCL_NVLS_ENABLE", "0")


def why_not() -> str:
    """Why NCCL can't be used; empty when it can."""
    set_environment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return "" if nccl.available else "NCCL is not installed (nvidia-nccl-cu13)"


def communicators(devices: tuple[int, ...]) -> list[Any]:
    """One for each GPU, made once a process and never destroyed.

    ncclCommDestroy waits until every graph that was captured with it is gone, forever if need be
    (seen on two H200, 2026-11-22): also at the interpreter's end, so each holds itself.
    """
    if devices not in _KEPT:
        set_environment()
        from cupy.cuda import nccl

        try:
            comms = nccl.NcclCommunicator.initAll(list(devices))
        except nccl.NcclError as e:
            raise BackendError(f"NCCL does not start: {e}", "NCCL_DEBUG=INFO says more") from None
        for comm in comms:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(comm))
        _KEPT[devices] = comms
    return _KEPT[devices]


def _in_use(device: int) -> int:
    with cp.cuda.Device(device):
        free, total = cp.cuda.runtime.memGetInfo()
    return int(total - free)


class NcclWay:
    """all_reduce of each GPU's own sum; all_gather of padded columns."""

    def __init__(self, group: Group, max_floats: int) -> None:
        devices = tuple(gpu.index for gpu in group.gpus)
        before = [_in_use(i) for i in devices]
        self.comms = communicators(devices)
        from cupy.cuda import nccl

        self.group, self.stride, self.nccl, self.aborted = group, max_floats, nccl, False
        # Slots of the ranks, then what NCCL reads, then what it writes: a message of each GPU.
        n = len(group.gpus)
        sizes = [(len(gpu.ranks) + 1 + n) * self.stride * 4 for gpu in group.gpus]
        self.nbytes = sizes
        self.memory = []
        for gpu, size in zip(group.gpus, sizes, strict=True):
            with cp.cuda.Device(gpu.index):
                self.memory.append(cp.cuda.Memory(size))
        self._warm()
        more = [_in_use(i) - b - n for i, b, n in zip(devices, before, sizes, strict=True)]
        self.kept = _TAKEN.get(devices, [0] * len(devices))  # by NCCL itself, since an earlier way
        self.taken = [a + max(0, b) for a, b in zip(self.kept, more, strict=True)]
        _TAKEN[devices] = self.taken

    def _warm(self) -> None:
        """Every size class once, before anything is captured."""
        for n in (*(size for size in _WARM if size < self.stride), self.stride):
            self._together(lambda g, n=n: self._all_reduce(g, n))
        self._together(lambda g: self._all_gather(g, min(self.stride, 1 << 14)))

    def _together(self, f: Any) -> None:
        self.nccl.groupStart()
        for g, gpu in enumerate(self.group.gpus):
            with cp.cuda.Device(gpu.index):
                f(g)
        self.nccl.groupEnd()
        for gpu in self.group.gpus:
            gpu.device.synchronize()

    # ---- memory -----------------------------------------------------------------------------

    def slot(self, rank: int) -> Array:
        gpu = self.group.home(rank)
        return self._part(gpu, self.group.gpus[gpu].ranks.index(rank))

    def _part(self, gpu: int, i: int) -> Array:
        at = self.memory[gpu].ptr + i * self.stride * 4
        return Array.dense(at, (self.stride,), np.float32)

    def _sent(self, gpu: int) -> Array:
        return self._part(gpu, len(self.group.gpus[gpu].ranks))

    def _received(self, gpu: int) -> Array:
        return self._part(gpu, len(self.group.gpus[gpu].ranks) + 1)

    def failed(self) -> int | None:
        return None  # NCCL says nothing: its waits have no end, see stop()

    def stop(self) -> bool:
        """NCCL's kernels wait for ever: they are aborted where GPUs come to no rest.

        Graphs refer to communicators when they are destroyed, so none may be after an abort. Where
        a GPU died, nothing is touched any more.
        """
        devices = [gpu.device for gpu in self.group.gpus]
        until = time.monotonic() + _REST
        while not self.aborted and not any(device.failure() for device in devices):
            if not any(device.is_busy for device in devices):
                return True
            if time.monotonic() > until:
                self._abort()
            time.sleep(0.001)
        return False

    def _abort(self) -> None:
        """In threads of their own: it may wait for a graph."""
        _KEPT.pop(tuple(gpu.index for gpu in self.group.gpus), None)
        self.aborted = True
        threads = [threading.Thread(target=comm.abort, daemon=True) for comm in self.comms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_REST)

    def reset(self) -> None:
        """NCCL keeps no state of ours, and can't be used after an abort."""
        if self.aborted:
            raise BackendError("NCCL was stopped after a failure", "load the model again")

    def close(self) -> None:
        self.memory.clear()

    # ---- collectives ------------------------------------------------------------------------

    def _all_reduce(self, gpu: int, n: int) -> None:
        nccl, stream = self.nccl, self.group.gpus[gpu].device.stream
        self.comms[gpu].allReduce(
            self._sent(gpu).ptr, self._received(gpu).ptr, n, nccl.NCCL_FLOAT32, nccl.NCCL_SUM,
            stream.ptr,
        )  # fmt: skip

    def _all_gather(self, gpu: int, n: int) -> None:
        nccl, stream = self.nccl, self.group.gpus[gpu].device.stream
        self.comms[gpu].allGather(
            self._sent(gpu).ptr, self._received(gpu).ptr, n, nccl.NCCL_FLOAT32, stream.ptr
        )

    def mail(self, rank: int, n: int) -> None:
        """NCCL sends what lies in slots."""

    def lone(self) -> bool:
        return False

    def reduce_add(
        self, gpu: int, streams: Sequence[Array], held: Sequence[bool], n: int, rounded: bool,
        sent: bool = False,
    ) -> None:  # fmt: skip
        """This GPU's ranks in rank order, then the GPUs in NCCL's."""
        assert not sent, "there is no mail"
        place = self.group.gpus[gpu]
        device, own = place.device, [held[rank] for rank in place.ranks]
        total, received = self._sent(gpu), self._received(gpu)
        dry = device.kernels.noting
        if not dry:
            cp.cuda.runtime.memsetAsync(total.ptr, 0, 4 * n, device.stream.ptr)
        if dry or any(own):
            device.launch(
                "reduce_few", (power_of_two(-(-n // 1024), 1 << 14),), 256, *pointers([total]),
                self.slot(place.ranks[0]), None, None, 0, (1 << len(own)) - 1, bits(own), 0, n, 0,
                self.stride, 0, 0, N_GPUS=1, N_RANKS=len(own), N_MINE=1,
                REDUCE_TYPE=REDUCE_TYPES[self.group.reduce_type] if rounded else 0,
            )  # fmt: skip
        if not dry:
            self._all_reduce(gpu, n)
        for stream in streams:
            device.launch("add_f32", (-(-n // 256),), 256, stream, stream, received, n)

    def gather(
        self, gpu: int, columns: Sequence[Array | None], widths: Sequence[int], out: Array
    ) -> None:
        """Every GPU sends as many values as the one with most of them."""
        place, device = self.group.gpus[gpu], self.group.gpus[gpu].device
        of_gpu = [[widths[rank] for rank in one.ranks] for one in self.group.gpus]
        most = max(sum(some) for some in of_gpu)
        at_once = self.stride // most
        assert at_once, "a row of logits is longer than a message"
        firsts = np.cumsum([0, *widths])
        dry = device.kernels.noting
        for t in range(0, len(out), at_once):
            n, rows = min(at_once, len(out) - t), out[t : t + at_once]
            offset = 0
            for rank, y in zip(place.ranks, columns, strict=True):
                if y is not None:
                    self._copy(device, self._sent(gpu)[offset:], y[t : t + n], n, widths[rank],
                               most, widths[rank])  # fmt: skip
                    offset += widths[rank]
            if not dry:
                self._all_gather(gpu, n * most)
            for g, one in enumerate(self.group.gpus):
                source = self._part(gpu, len(place.ranks) + 1)
                at = source.ptr + 4 * g * n * most
                for rank in one.ranks:
                    if widths[rank]:
                        part = Array.dense(at, (1,), np.float32)
                        first = int(firsts[rank])
                        self._copy(
                            device, rows[:, first:], part, n, widths[rank], out.shape[1], most
                        )
                    at += 4 * widths[rank]

    def _copy(
        self, device: Any, to: Array, source: Array, n: int, w: int, ldo: int, ldi: int
    ) -> None:
        device.launch("copy_columns", (n,), 256, to, source, w, ldo, ldi, N_GPUS=1, N_RANKS=1)
