"""Weights of the NumPy backend: GGUF bytes, and a bounded cache of their float32 copies."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlacli.loading.quant_types import QType
from mlacli.loading.weights import to_float32

Floats = NDArray[np.float32]
_CHUNK = 1 << 18  # elements of a product at a time: unpacked, they stay in a core's cache


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
        return self.unpack(self.raw[index])

    def unpack(self, rows: NDArray[np.uint8]) -> Floats:
        """Some of `raw`'s rows as float32."""
        return to_float32(rows, self.qtype)[..., self.skip : self.skip + self.shape[-1]]


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

    def expert(self, w: NumpyWeight, e: int) -> Floats | None:
        """Expert `e` of a weight that holds it; None when it neither is cached nor fits."""
        if w.qtype.name == "F32":
            return w.float32(e - w.first)
        found = self._experts.get((w.name, e))
        if found is not None:
            self._experts.move_to_end((w.name, e))
            return found
        size = 4 * int(np.prod(w.shape[1:]))
        if not self._make_room(size, self.budget - sum_bytes(self._whole)):
            return None
        found = self._experts[w.name, e] = w.float32(e - w.first)
        self.used += size
        return found

    def product(self, x: Floats, w: NumpyWeight, e: int | None = None) -> Floats:
        """x w^T, or x w[e]^T for expert `e`: [n, in] -> [n, out].

        Always by the same rows at a time, so that no bit depends on what is cached.
        """
        dense = self.whole(w) if e is None else self.expert(w, e)
        raw = w.raw if e is None else w.raw[e - w.first]
        n_rows, n_columns = w.shape[-2:]
        step = max(1, _CHUNK // n_columns)
        y = np.empty((len(x), n_rows), np.float32)
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            part = w.unpack(raw[rows]) if dense is None else dense[rows]
            np.matmul(x, part.T, out=y[:, rows])
        return y

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
