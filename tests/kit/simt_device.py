"""A Device whose memory is the host's and whose kernels run on the CPU through kit/simt.py.

So host code that launches kernels is tested with them, without a GPU. Clusters are left out, which
capability 80 has none of.
"""

import ctypes
from typing import Any

import numpy as np
from kit.simt import MOST_SHARED, C, kernel

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_sources import signatures

_BULK = {"mla_decode_mma": "attention_memory"}  # kernels whose bulk copies kit/bulk_sim.h runs


class SimtDevice:
    """Every take is a host array of its own, full of NaN bits."""

    def __init__(self, n_sm: int = 4, capability: int = 80) -> None:
        self.n_sm, self.capability = n_sm, capability
        self._held: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = Array.dense(0, shape, dtype)
        memory = np.full(array.nbytes + 512, 0xFF, np.uint8)
        self._held.append(memory)
        return Array.dense(-(-memory.ctypes.data // 256) * 256, shape, dtype)

    def mark(self) -> int:
        return 0

    def rewind(self, mark: int) -> None:
        """Nothing is used twice."""

    def follow(self, other: Any) -> None:
        """What is launched here has ended when the launch returns."""

    def copy_in(self, array: Array, host: np.ndarray) -> None:
        ctypes.memmove(array.ptr, np.ascontiguousarray(host).ctypes.data, array.nbytes)

    def get(self, array: Array) -> np.ndarray:
        host = np.empty(array.shape, array.dtype)
        ctypes.memmove(host.ctypes.data, array.ptr, array.nbytes)
        return host

    def launch(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        assert shared <= MOST_SHARED, "no SM has more shared memory"
        if self.capability >= 90 and name in _BULK:
            defines["BULK_SIM"] = _BULK[name]
        kinds = signatures()[name][1]
        values = [
            C[kind](0 if arg is None else arg.ptr if kind == "p" else arg)
            for kind, arg in zip(kinds, args, strict=True)
        ]
        x, y, z = (*grid, 1, 1)[:3]
        kernel(name, tuple(sorted(defines.items())))(x, y, z, block, *values)
