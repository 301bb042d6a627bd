"""Cache rows of the NumPy backend in the types of -ctk and -ctv."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlacli.loading.quant_types import BF16, Q8_0, QType
from mlacli.loading.weights import from_float32, to_float32

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
STORED = {"bf16": BF16, "q8_0": Q8_0}
_CELLS: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.uint8,
}  # fmt: skip


class LatentRows:
    """Cache rows [n_ctx, width] of one layer; `transposed` keeps them as [width, n_ctx]."""

    def __init__(self, n_ctx: int, width: int, cache_type: str, transposed: bool = False) -> None:
        assert not (transposed and cache_type == "q8_0"), "a block would span tokens"
        self.width = width
        self._qtype: QType | None = STORED.get(cache_type)
        cell = np.dtype(_CELLS[cache_type])
        cells = width if self._qtype is None else self._qtype.row_bytes(width) // cell.itemsize
        self._rows: Any = np.empty((n_ctx, cells), cell, "F" if transposed else "C")

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes)

    def poison(self) -> None:
        """Fill with NaN bits (tests: nothing may read a row before it is written)."""
        self._rows.ravel(order="K").view(np.uint8)[:] = 0xFF

    def write(self, pos: Ints, values: Floats) -> None:
        if self._qtype is not None:
            padding = ((0, 0), (0, -self.width % self._qtype.block))
            values = from_float32(np.pad(values, padding), self._qtype).view(self._rows.dtype)
        self._rows[pos] = values

    def read(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32 [t, width]."""
        return self._float32(self._rows[start:stop])

    def take(self, wanted: Ints) -> Floats:
        """The wanted rows as float32 [t, width]."""
        return self._float32(self._rows[wanted])

    def _float32(self, rows: Any) -> Floats:
        if self._qtype is not None:
            raw = np.ascontiguousarray(rows).view(np.uint8)
            return to_float32(raw, self._qtype)[:, : self.width]
        values: Floats = rows.astype(np.float32, copy=False)
        return values
