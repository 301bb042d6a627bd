"""Unpacks the commonest quant types in half the time that the gguf package takes, bit for bit.

Unpacking is most of a CPU token's time wherever the float32 copies don't fit in memory. Rows go
through the caches a chunk at a time, straight into the result; block layouts: ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mlacli.loading.quant_types import QType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_CHUNK = 1 << 18  # elements; their bytes and temporaries stay in a core's cache


def unpack(raw: Bytes, qtype: QType) -> Floats:
    """Rows of GGUF bytes [..., row bytes] of a type in `UNPACKERS` as float32."""
    work, n = UNPACKERS[qtype.name], _CHUNK // qtype.block
    blocks = np.ascontiguousarray(raw).reshape(-1, qtype.nbytes)
    out = np.empty((len(blocks), qtype.block), np.float32)
    for start in range(0, len(blocks), n):
        work(blocks[start : start + n], out[start : start + n])
    return out.reshape(*raw.shape[:-1], -1)


def _half(b: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(b[:, at : at + 2]).view(np.float16).astype(np.float32)


def _q8_0(b: Bytes, out: Floats) -> None:
    out[:] = b[:, 2:].view(np.int8)
    out *= _half(b, 0)


def _q4_0(b: Bytes, out: Floats) -> None:
    out[:, :16], out[:, 16:] = b[:, 2:] & 15, b[:, 2:] >> 4
    out -= np.float32(8)
    out *= _half(b, 0)


def _q5_0(b: Bytes, out: Floats) -> None:
    q = np.unpackbits(b[:, 2:6], axis=1, bitorder="little")  # the fifth bits
    q <<= 4
    q[:, :16] |= b[:, 6:] & 15
    q[:, 16:] |= b[:, 6:] >> 4
    out[:] = q
    out -= np.float32(16)
    out *= _half(b, 0)


def _scales_k(b: Bytes) -> tuple[Floats, Floats]:
    """Scale and minimum of the eight sub-blocks of Q4_K and Q5_K, [n, 8, 1] each."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], axis=1)
    least = np.concatenate([mid & 63, (high >> 4) | (mid >> 2 & 48)], axis=1)
    return (_half(b, 0) * scale)[:, :, None], (_half(b, 2) * least)[:, :, None]


def _q4_k(b: Bytes, out: Floats) -> None:
    scale, least = _scales_k(b)
    q, pairs = b[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32)
    pairs[:, :, 0], pairs[:, :, 1] = q & 15, q >> 4
    values = out.reshape(-1, 8, 32)
    values *= scale
    values -= least


def _q5_k(b: Bytes, out: Floats) -> None:
    scale, least = _scales_k(b)
    q, high = b[:, 48:].reshape(-1, 4, 32), b[:, 16:48]
    values = out.reshape(-1, 8, 32)
    for i in range(8):  # sub-block i has bit i of each high byte
        values[:, i] = (q[:, i // 2] >> 4 * (i % 2) & 15) | (high >> i & 1) << 4
    values *= scale
    values -= least


def _q6_k(b: Bytes, out: Floats) -> None:
    scale = _half(b, 208) * b[:, 192:208].view(np.int8)
    low, high = b[:, :128].reshape(-1, 2, 2, 32), b[:, 128:192].reshape(-1, 2, 32)
    quarters = out.reshape(-1, 2, 4, 32)
    for i in range(4):
        quarters[:, :, i] = (low[:, :, i % 2] >> 4 * (i // 2) & 15) | (high >> 2 * i & 3) << 4
    values = out.reshape(-1, 16, 16)
    values -= np.float32(32)
    values *= scale[:, :, None]


UNPACKERS: Mapping[str, Callable[[Bytes, Floats], None]] = MappingProxyType(
    {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
)
