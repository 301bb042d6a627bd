"""Cache rows and index keys of a device to and from the host, as float32 whatever their type."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Device
from mlacli.loading.quant_types import BF16, Q8_0
from mlacli.loading.weights import from_float32, to_float32

Floats = NDArray[np.float32]
_BLOCK = 34  # bytes of a Q8_0 block: its float16 scale, then 32 int8


class Rows(Protocol):
    """What CacheRows and IndexRows share: q8_0 keeps int8 and scales apart."""

    @property
    def cache_type(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def values(self) -> Array: ...

    @property
    def scales(self) -> Array | None: ...


def read(device: Device, rows: Rows, n: int) -> Floats:
    """Rows 0..n-1 [n, width]."""
    values = device.get(rows.values[:n])
    if rows.scales is not None:
        scales = device.get(rows.scales[:n])
        blocks = values.reshape(n, -1, 32).astype(np.float32)
        return (blocks * scales.astype(np.float32)[:, :, None]).reshape(n, -1)[:, : rows.width]
    if rows.cache_type == "bf16":
        return to_float32(values.view(np.uint8), BF16)
    return np.asarray(values, np.float32)


def write(device: Device, rows: Rows, values: Floats) -> None:
    """The inverse of read(), rounded as the kernels that store rows do."""
    n = len(values)
    if rows.scales is None:
        kinds: dict[str, Any] = {"f32": np.float32, "f16": np.float16}
        if rows.cache_type == "bf16":
            cells = from_float32(values, BF16).view(np.uint16)
        else:
            cells = values.astype(kinds[rows.cache_type])
        device.copy_in(rows.values[:n], cells)
        return
    raw = from_float32(np.pad(values, ((0, 0), (0, -rows.width % 32))), Q8_0)
    blocks = raw.reshape(n, -1, _BLOCK)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).reshape(n, -1)
    device.copy_in(rows.scales[:n], scales)
    device.copy_in(rows.values[:n], np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8))
