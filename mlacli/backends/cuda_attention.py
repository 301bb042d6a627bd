"""Absorbed attention of one CUDA rank: latent() -> attend() -> combine(), a launch each in decode.

latent() stores a step's cache rows and brings its queries into latent space, attend() leaves sums
of splits of the cache, combine() merges them and expands them to [n, h * v]. Float16 queries mean
tensor cores under -gap f16; float32 the plain kernels (-gap f32, old GPUs, odd row sizes).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlacli.backends import cuda_raw
from mlacli.backends.cuda_array import Array
from mlacli.parallel.cuda_sizes import (
    PLAIN_SPLITS,
    SPLIT_ROWS,
    decode_shared,
    on_tensor_cores,
    shared_limit,
)

if TYPE_CHECKING:
    from mlacli.loading.quant_types import QType
    from mlacli.models.parts import Temperature

_KINDS = {"f16": 0, "bf16": 1, "f32": 2, "q8_0": 3}
_C_TYPES = {"f16": "__half", "bf16": "__nv_bfloat16", "f32": "float", "q8_0": "signed char"}
_CELLS: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "q8_0": np.int8}
SHORT_SHARE = 64  # cache rows that each CTA of mla_short takes at most
_FEW_SPLITS = 16  # up to here a warp merges a row
_FEW = 8  # tokens; beyond it, per-head products take float16 activations (-gap f16)
_MOST_SPLITS = 256  # MERGE_SPLITS of kernels/include/mla_merge.cuh


class Launcher(Protocol):
    """What this module needs of CudaOps."""

    @property
    def n_sm(self) -> int: ...

    @property
    def capability(self) -> int: ...

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array: ...

    def run(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **how: Any) -> None: ...


class Positions(Protocol):
    """What this module needs of a Step."""

    @property
    def pos(self) -> Array: ...  # int32 [n]; -1: no token

    @property
    def cos(self) -> Array: ...

    @property
    def sin(self) -> Array: ...


class Weight(Protocol):
    """What this module needs of CudaWeight: k_b [h, r, k], v_b [h, v, r]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def qtype(self) -> QType: ...

    @property
    def tiles(self) -> Array | None: ...


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
    stat: Array | None  # [n h, splits, 2]; None: part [n h, splits, r + 2] of the plain kernel
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


def latent(
    ops: Launcher, q: Array, c_kv: Array, k_pe: Array, norm: Array, eps: float, k_b: Weight,
    kv: CacheRows, step: Positions, half: bool, temperature: Temperature | None = None,
) -> Array:  # fmt: skip
    """Writes the step's cache rows; the query for attend() [n, h, r + p].

    q [n, h, k + p] is dense, c_kv [n, r] and k_pe [n, p] are parts of one dense array.
    """
    h, r, k = k_b.shape
    n, p = k_pe.shape
    tensor_cores = half and on_tensor_cores(ops.capability, r, r + p, kv.cache_type)
    out = ops.new((n, h, r + p), np.float16 if tensor_cores else np.float32)
    blocks = 0 if n == 1 else _token_blocks(n)
    if n > _FEW and tensor_cores and k_b.tiles is not None:
        blocks = 8
    q_lat = None if k_b.tiles is not None else _plain_heads(ops, q, k_b)
    group = max(1, 4 * blocks)
    ops.run(
        "latent", (h * -(-r // 64) + group, -(-n // group)), 128, out, out[:, :, r:], kv.values,
        kv.scales, q, q_lat, c_kv, k_pe, norm, k_b.tiles, step.cos, step.sin, step.pos, n, h,
        r + p, r + p, c_kv.stride(0), eps,
        *((0.0, 1) if temperature is None else (temperature.scale, temperature.length)),
        R=r, K=k, P=p, CACHE_KIND=_KINDS[kv.cache_type], OUT="__half" if tensor_cores else "float",
        TOKEN_BLOCKS=blocks, WTYPE=-1 if k_b.tiles is None else k_b.qtype.id,
    )  # fmt: skip
    return out


def is_short(
    ops: Launcher, k_b: Weight, v_b: Weight, kv: CacheRows, n: int, n_kv: int, half: bool
) -> bool:
    """Whether attend_short() takes a step of `n` tokens, the last of which sees n_kv rows."""
    r, p = k_b.shape[1], kv.width - k_b.shape[1]
    return (
        n == 1 and half and ops.capability >= 90 and kv.cache_type == "f16" and r == 512
        and p % 16 == 0 and p <= 512 and k_b.tiles is not None and v_b.tiles is not None
        and k_b.shape[2] % 2 == 0 and n_kv <= 8 * SHORT_SHARE
    )  # fmt: skip


def attend_short(
    ops: Launcher, q: Array, c_kv: Array, k_pe: Array, norm: Array, eps: float, k_b: Weight,
    v_b: Weight, kv: CacheRows, step: Positions, scale: float,
    temperature: Temperature | None = None,
) -> Array:  # fmt: skip
    """latent(), attend() and combine() in one launch, where `is_short`; o [1, h * v]."""
    (h, r, k), v, p = k_b.shape, v_b.shape[1], k_pe.shape[1]
    o = ops.new((1, h * v))
    heads = _short_heads(ops.n_sm, h)
    ops.run(
        "mla_short", (8 * h // heads,), 256, o, kv.values, q, c_kv, k_pe, norm, k_b.tiles,
        v_b.tiles,
        step.cos, step.sin, step.pos, h, eps, scale,
        *((0.0, 1) if temperature is None else (temperature.scale, temperature.length)),
        shared=SHORT_SHARE * 2 * (r + p + 8), R=r, K=k, P=p, V=v, N_ROWS=SHORT_SHARE,
        HEADS=heads, WTYPE0=k_b.qtype.id, WTYPE1=v_b.qtype.id,
    )  # fmt: skip
    return o


def _short_heads(n_sm: int, h: int) -> int:
    """Heads of a cluster of mla_short: several where two CTAs an SM wouldn't hold all clusters."""
    heads = 1
    while 8 * h > 2 * n_sm and heads < 4 and h % (2 * heads) == 0 and 8 * h > heads * n_sm:
        heads *= 2
    return heads


def store(
    ops: Launcher, c_kv: Array, k_pe: Array, norm: Array, eps: float, kv: CacheRows,
    step: Positions,
) -> None:  # fmt: skip
    """latent() without queries: the step's cache rows alone."""
    (n, r), p = c_kv.shape, k_pe.shape[1]
    blocks = 0 if n == 1 else _token_blocks(n)
    group = max(1, 4 * blocks)
    ops.run(
        "latent", (group, -(-n // group)), 128, None, None, kv.values, kv.scales, None, None, c_kv,
        k_pe, norm, None, step.cos, step.sin, step.pos, n, 0, 0, 0, c_kv.stride(0), eps, 0.0, 1,
        R=r, K=p, P=p, CACHE_KIND=_KINDS[kv.cache_type], OUT="__half", TOKEN_BLOCKS=blocks,
        WTYPE=-1,
    )  # fmt: skip


def attend(
    ops: Launcher, q: Array, kv: CacheRows, step: Positions, r: int, scale: float, half: bool,
    chosen: Array | None = None, early: bool = False,
) -> Parts:  # fmt: skip
    """Split-KV attention of latent()'s q over cache rows up to each token's, or over `chosen`
    [n, top_k] of them.

    `early`: the launch before this one is latent(), so that old rows may be read beside it.
    """
    if q.dtype == np.float32:
        return _attend_plain(ops, q, kv, step, r, scale, half, chosen)
    n, h, width = q.shape
    rows, top_k = (n * h, 0) if chosen is None else (h, chosen.shape[1])
    tokens, limit = 1 if chosen is None else n, shared_limit(ops.capability)
    for m_tiles in (2, 1):
        groups = -(-rows // (16 * m_tiles))
        splits = max(1, min(ops.n_sm // (groups * tokens), _MOST_SPLITS))
        slots = -(-top_k // (splits * SPLIT_ROWS)) * SPLIT_ROWS
        fits = [
            stages
            for stages in range(2, 7)
            if decode_shared(r, width, m_tiles, kv.cache_type, stages, slots) <= limit
        ]
        if m_tiles == 1 or (fits and rows > 8 * m_tiles):
            break
    assert fits, "on_tensor_cores() knows what fits; chosen rows take little"
    stages = fits[-1]
    bulk = ops.capability >= 90 and kv.cache_type == "f16" and chosen is None
    block = 256 + 64 * m_tiles * bulk  # BULK of kernels/include/mla_rows.cuh
    part, stat = ops.new((n * h, splits, r)), ops.new((n * h, splits, 2))
    ops.run(
        "mla_decode_mma", (splits, groups, tokens), block, part, stat, q, kv.values, kv.scales,
        chosen, step.pos, rows, h, n, top_k, scale,
        shared=decode_shared(r, width, m_tiles, kv.cache_type, stages, slots),
        R=r, P=width - r, MT=m_tiles, CACHE_KIND=_KINDS[kv.cache_type], STAGES=stages,
        CHOSEN=int(chosen is not None), EARLY=int(early and chosen is None),
    )  # fmt: skip
    return Parts(part, stat, n, h, top_k)


def _attend_plain(
    ops: Launcher, q: Array, kv: CacheRows, step: Positions, r: int, scale: float, half: bool,
    chosen: Array | None,
) -> Parts:  # fmt: skip
    n, h, width = q.shape
    splits = max(1, min(PLAIN_SPLITS, -(-256 // (n * h))))
    part, top_k = ops.new((n * h, splits, r + 2)), 0 if chosen is None else chosen.shape[1]
    ops.run(
        "mla_decode_split", (splits, h, n), 256, part, q, q[:, :, r:], kv.values, kv.scales, chosen,
        step.pos, width, width, top_k, scale, R=r, P=width - r, CACHE=_C_TYPES[kv.cache_type],
        HALF=int(half),
    )  # fmt: skip
    return Parts(part, None, n, h, top_k)


def merge(ops: Launcher, parts: Parts, step: Positions) -> Array:
    """The latent result o [n, h, r]."""
    n, h, splits, width = parts.n, parts.h, *parts.part.shape[1:]
    if parts.stat is None:
        o = ops.new((n, h, width - 2))
        ops.run("mla_combine_f32", (n * h,), 256, o, parts.part, splits, width - 2)
        return o
    o = ops.new((n, h, width))
    if splits <= _FEW_SPLITS:
        ops.run(
            "mla_merge_rows_f32", (-(-n * h // 8),), 256, o, parts.part, parts.stat, step.pos, n, h,
            splits, parts.top_k, R=width,
        )  # fmt: skip
        return o
    share = gcd(width, 64)
    ops.run(
        "mla_merge_f32", (width // share, h, n), 256, o, parts.part, parts.stat, step.pos, n,
        splits, width, parts.top_k, SLICE=share,
    )  # fmt: skip
    return o


def combine(ops: Launcher, parts: Parts, v_b: Weight, step: Positions) -> Array:
    """o [n, h * v]: the splits merged and taken out of latent space."""
    h, v, r = v_b.shape
    n = parts.n
    if v_b.tiles is None:
        o_lat = merge(ops, parts, step)
        return _plain_heads(ops, o_lat, v_b).reshape(n, h * v)
    o = ops.new((n, h * v))
    if parts.stat is not None and n <= _FEW and ops.capability >= 90 and r % 32 == 0:
        cluster = 8 if 8 * h <= 2 * ops.n_sm else 4  # CTAs of all heads at once, two an SM
        ops.run(
            "mla_combine", (cluster * h, n), 256, o, parts.part, parts.stat, v_b.tiles, step.pos, n,
            h,
            parts.splits, parts.top_k, R=r, V=v, WTYPE=v_b.qtype.id, CLUSTER=cluster,
        )  # fmt: skip
        return o
    if parts.stat is not None and n > _FEW:
        ops.run(
            "mla_combine_many", (h * -(-v // 128), -(-n // 16)), 256, o, parts.part, parts.stat,
            v_b.tiles, step.pos, n, h, parts.splits, parts.top_k, R=r, V=v, WTYPE=v_b.qtype.id,
            MANY=1,
        )  # fmt: skip
        return o
    o_lat, blocks = merge(ops, parts, step), _token_blocks(n)
    ops.run(
        "mla_values", (h * -(-v // 16), -(-n // (4 * blocks))), 256, o, o_lat, v_b.tiles, n, h,
        R=r, V=v, WTYPE=v_b.qtype.id, TOKEN_BLOCKS=blocks,
    )  # fmt: skip
    return o


def _token_blocks(n: int) -> int:
    """Blocks of four tokens that a CTA's products take at once."""
    return 1 if n <= 4 else 2 if n <= 8 else 4


def _plain_heads(ops: Any, x: Array, w: Any) -> Array:
    """A product per head [n, h, out] with GGUF bytes; x [n, h, at least in]."""
    return cuda_raw.heads(ops, x[:, :, : w.shape[2]], w)
