"""Memory that several GPUs reach: device memory under peer access, page-locked host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import cupy as cp
import numpy as np
from numpy.typing import NDArray

_ALREADY = 704  # cudaErrorPeerAccessAlreadyEnabled


def without_access(devices: Sequence[int]) -> str:
    """Which two GPUs can't reach each other's memory; empty when all can."""
    for a in devices:
        for b in devices:
            if a != b and not cp.cuda.runtime.deviceCanAccessPeer(a, b):
                return f"cuda{a} can't reach the memory of cuda{b}"
    return ""


def enable_access(devices: Sequence[int]) -> None:
    """Let kernels and copies of each device use the memory of all others that it can reach."""
    for a in devices:
        with cp.cuda.Device(a):
            for b in devices:
                if a != b and cp.cuda.runtime.deviceCanAccessPeer(a, b):
                    try:
                        cp.cuda.runtime.deviceEnablePeerAccess(b)
                    except cp.cuda.runtime.CUDARuntimeError as e:
                        if e.status != _ALREADY:
                            raise


class HostPage:
    """Page-locked memory that all devices reach at one address, zero at first."""

    def __init__(self, nbytes: int) -> None:
        flags = cp.cuda.runtime.hostAllocPortable | cp.cuda.runtime.hostAllocMapped
        self.ptr = int(cp.cuda.runtime.hostAlloc(nbytes, flags))
        memory = (ctypes.c_uint8 * nbytes).from_address(self.ptr)
        self.bytes = np.ctypeslib.as_array(memory)
        self.bytes[:] = 0

    def close(self) -> None:
        if self.ptr:
            cp.cuda.runtime.freeHost(self.ptr)
            self.ptr = 0


class PeerMemory:
    """Memory of `devices`, which reach each other's where `shared`."""

    def __init__(self, devices: Sequence[int], shared: bool) -> None:
        if shared:
            enable_access(devices)
        self._held: list[Any] = []

    def take(self, device: int, nbytes: int) -> int:
        """The address of new memory on a device."""
        with cp.cuda.Device(device):
            self._held.append(cp.cuda.Memory(nbytes))
        return int(self._held[-1].ptr)

    def page(self, nbytes: int) -> HostPage:
        self._held.append(HostPage(nbytes))
        page: HostPage = self._held[-1]
        return page

    def clear(self, device: int, ptr: int, nbytes: int) -> None:
        with cp.cuda.Device(device):
            cp.cuda.runtime.memset(ptr, 0, nbytes)
            cp.cuda.runtime.deviceSynchronize()

    def write(self, device: int, ptr: int, host: NDArray[Any]) -> None:
        runtime = cp.cuda.runtime
        with cp.cuda.Device(device):
            runtime.memcpy(ptr, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice)
            runtime.deviceSynchronize()

    def close(self) -> None:
        for one in self._held:
            if isinstance(one, HostPage):
                one.close()
        self._held.clear()
