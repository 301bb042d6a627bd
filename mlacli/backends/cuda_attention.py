"""Absorbed attention of one CUDA rank: latent() -> attend() -> combine(), three launches a layer.

Knows shapes and tuning, not models. Other cards' limits and the plain kernels for -gap f32 are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

import numpy as np

from mlacli.backends.cuda_array import Array

_KINDS = {"f16": 0, "bf16": 1, "f32": 2, "q8_0": 3}
_CELLS: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "q8_0": np.int8}
_MOST_SPLITS = 256  # MERGE_SPLITS of kernels/include/mla_merge.cuh
_TILE = 32  # cache rows at a time: SPLIT_ROWS of kernels/include/mla_splits.cuh
_SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 120: 99 << 10}
_SHARED_90 = 227 << 10


class Launcher(Protocol):
    """What this module needs of CudaOps."""

    n_sm: int
    capability: int

    def new(self, shape: tuple[int, ...], dtype: Any = "f4") -> Array: ...

    def run(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **defines: Any) -> None: ...


class Positions(Protocol):
    """What this module needs of a Step."""

    pos: Array
    n: int


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Cache rows [n_ctx, width]; q8_0 as int8 [n_ctx, 32 * blocks] and scales [n_ctx, blocks]."""

    cache_type: str
    width: int
    values: Array
    scales: Array | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, slots=True)
class Parts:
    """What attend() leaves: unnormalised sums of each split, their maxima and sums."""

    part: Array  # [n h, splits, r]
    stat: Array  # [n h, splits, 2]
    n: int
    h: int
    top_k: int

    @property
    def splits(self) -> int:
        return self.part.shape[1]


def new_rows(take: Any, n_ctx: int, width: int, cache_type: str) -> CacheRows:
    """Rows from an arena's `take(shape, dtype)`."""
    if cache_type != "q8_0":
        return CacheRows(cache_type, width, take((n_ctx, width), _CELLS[cache_type]))
    blocks = -(-width // 32)
    values, scales = take((n_ctx, 32 * blocks), np.int8), take((n_ctx, blocks), np.float16)
    return CacheRows(cache_type, width, values, scales)


def attend(
    ops: Launcher, q: Array, kv: CacheRows, step: Positions, r: int, scale: float,
    chosen: Array | None = None, early: bool = False,
) -> Parts:  # fmt: skip
    """Split-KV attention of q [n, h, r + p] (f16) over latent rows, or over `chosen` [n, top_k].

    `early`: the launch before this one is latent(), so that old rows may be read beside it.
    """
    n, h, width = q.shape
    rows, top_k = (n * h, 0) if chosen is None else (h, chosen.shape[1])
    limit = shared_limit(ops.capability)
    m_tiles = 1 if rows <= 16 else 2 if rows <= 32 else 4
    while m_tiles > 1 and decode_shared(r, width, m_tiles, kv.cache_type, 2, top_k) > limit:
        m_tiles //= 2
    groups = -(-rows // (16 * m_tiles))
    splits = max(1, min(ops.n_sm // (groups * (1 if chosen is None else n)), _MOST_SPLITS))
    slots = _slots(top_k, splits)
    stages = 2
    while stages < 6 and decode_shared(r, width, m_tiles, kv.cache_type, stages + 1, slots) <= limit:
        stages += 1
    shared = decode_shared(r, width, m_tiles, kv.cache_type, stages, slots)
    part, stat = ops.new((n * h, splits, r)), ops.new((n * h, splits, 2))
    ops.run(
        "mla_decode_mma", (splits, groups, 1 if chosen is None else n), 256, part, stat, q,
        kv.values, kv.scales, chosen, step.pos, rows, h, n, top_k, scale, shared=shared,
        R=r, P=width - r, MT=m_tiles, KIND=_KINDS[kv.cache_type], STAGES=stages,
        CHOSEN=int(chosen is not None), EARLY=int(early and chosen is None),
    )  # fmt: skip
    return Parts(part, stat, n, h, top_k)


def merge(ops: Launcher, parts: Parts, step: Positions) -> Array:
    """The latent result o [n, h, r]."""
    r = parts.part.shape[-1]
    width = gcd(r, 64)
    o = ops.new((parts.n, parts.h, r))
    ops.run(
        "mla_merge_f32", (r // width, parts.h, parts.n), 256, o, parts.part, parts.stat, step.pos,
        parts.n, parts.splits, r, parts.top_k, SLICE=width,
    )  # fmt: skip
    return o


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a CTA may have."""
    return _SHARED.get(capability, _SHARED_90)


def decode_shared(r: int, width: int, m_tiles: int, cache_type: str, stages: int, slots: int) -> int:
    """Shared bytes of mla_decode_mma, in the order of its carve()."""
    line = 2 * (-(-width // 16) * 16 + 8)
    raw = {"f16": line, "bf16": 2 * width, "f32": 4 * width, "q8_0": -(-width // 32) * 32}[cache_type]
    m = 16 * m_tiles
    size = stages * _TILE * raw
    size += _TILE * line if cache_type != "f16" else 0
    size += m * line if m_tiles > 2 else 0
    size += 4 * m * (_TILE + 8) * 4 + m * (_TILE + 8) * 2 + m * 4
    size += 2 * _TILE * -(-width // 32) * 4 if cache_type == "q8_0" else 0
    return size + 4 * slots


def _slots(top_k: int, splits: int) -> int:
    """Chosen rows of a split, rounded up to tiles."""
    return -(-top_k // (splits * _TILE)) * _TILE
