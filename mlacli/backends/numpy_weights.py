"""Weights of the NumPy backend: GGUF bytes, and a bounded cache of their float32 copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlacli.loading.quant_types import QType
from mlacli.loading.weights import to_float32

Floats = NDArray[np.float32]
_CHUNK = 64 << 20  # bytes of float32 that an uncached product unpacks at a time


@dataclass(frozen=True, slots=True, eq=False)
class NumpyWeight:
    """GGUF bytes [*leading, row bytes] of a shard of local `shape`.

    `skip` columns of the first block belong to the rank before; `first` is the id of the first
    expert when the leading axis is cut.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    raw: NDArray[np.uint8]
    skip: int = 0
    first: int = 0

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def float32(self, index: Any = ...) -> Floats:
        """raw[index] unpacked; `index` addresses leading axes only."""
        unpacked = to_float32(self.raw[index], self.qtype)
        return unpacked[..., self.skip : self.skip + self.shape[-1]]


class DequantCache:
    """Float32 copies within `budget` bytes. Whole tensors stay; experts go by last use."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._whole: dict[str, Floats] = {}
        self._experts: OrderedDict[tuple[str, int], Floats] = OrderedDict()

    def whole(self, w: NumpyWeight) -> Floats | None:
        """The weight as float32; None when it neither is cached nor fits."""
        if w.qtype.name == "F32":
            return w.float32()
        found = self._whole.get(w.name)
        if found is None:
            size = 4 * int(np.prod(w.shape))
            if not self._make_room(size, self.budget - sum_bytes(self._whole)):
                return None
            found = self._whole[w.name] = w.float32()
            self.used += size
        return found

    def expert(self, w: NumpyWeight, e: int) -> Floats:
        """Expert `e` of a weight that holds it."""
        if w.qtype.name == "F32":
            return w.float32(e - w.first)
        found = self._experts.get((w.name, e))
        if found is not None:
            self._experts.move_to_end((w.name, e))
            return found
        unpacked = w.float32(e - w.first)
        if self._make_room(unpacked.nbytes, self.budget - sum_bytes(self._whole)):
            self._experts[w.name, e] = unpacked
            self.used += unpacked.nbytes
        return unpacked

    def _make_room(self, size: int, most: int) -> bool:
        """Drop least recently used experts until `size` bytes fit; False if they can't."""
        if size > most:
            return False
        while self.used + size > self.budget:
            _, dropped = self._experts.popitem(last=False)
            self.used -= dropped.nbytes
        return True


def sum_bytes(arrays: dict[str, Floats]) -> int:
    return sum(a.nbytes for a in arrays.values())


def row_chunks(w: NumpyWeight) -> Iterator[tuple[slice, Floats]]:
    """A weight too large for the cache, some rows at a time."""
    step = max(1, _CHUNK // (4 * w.shape[-1]))
    for start in range(0, w.shape[0], step):
        rows = slice(start, min(start + step, w.shape[0]))
        yield rows, w.float32(rows)
