"""Expanded attention of many tokens on sm_90a: keys and values of a chunk of the cache at a time.

`attend_expanded` is all that ops need; `takes` says for which sizes, `scratch_bytes` what it costs.
Queries, cached rows and probabilities are rounded to float16 (-gap f16), and so are keys, values
and the weights that make them; sums are float32. Not for -gap f32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from mlacli.backends.cuda_array import Array
    from mlacli.backends.cuda_attention import CacheRows
    from mlacli.loading.quant_types import QType
    from mlacli.models.parts import Temperature
    from mlacli.ops import Step

_CHUNK = 16384  # most cache rows that are expanded at a time
_CHUNK_BYTES = 160 << 20  # what their keys and values may take, but for _LEAST_CHUNK rows
_LEAST_CHUNK = 1024
_MOST_SHARED = 227 << 10  # bytes of shared memory of a CTA
_SLAB = 128 * 128  # bytes of 128 rows of 64 float16
_STAGES = 2  # tiles of keys and values in shared memory
_BLOCK = 128  # tokens of an item
_SPLIT_ITEMS = 5  # most parts of items for each SM
_CACHES = {"f16": 0, "bf16": 1, "f32": 2, "q8_0": 3}  # CACHE_KIND of the kernels


class Launcher(Protocol):
    """What this module needs of CudaOps."""

    n_sm: int

    def new(self, shape: tuple[int, ...], dtype: Any = "f4") -> Array: ...

    def run(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None: ...  # fmt: skip


class Weight(Protocol):
    """What this module needs of CudaWeight."""

    qtype: QType
    tiles: Array | None
    raw: Array  # where `tiles` is None
    row_bytes: int  # of raw


@dataclass(frozen=True, slots=True)
class Sizes:
    """h local heads, kv rank r, nope k, rope p, value v."""

    h: int
    r: int
    k: int
    p: int
    v: int

    @property
    def tile(self) -> int:
        """Cache rows that a step of attention takes: what registers and shared memory hold."""
        return 128 if self.v <= 128 and _slabs(self.k) + _slabs(self.p) <= 3 else 64

    @property
    def shared(self) -> int:
        """Bytes of shared memory of an attention CTA."""
        key = _slabs(self.k) + _slabs(self.p)
        rows = _STAGES * self.tile * (key + _slabs(self.v))
        return key * _SLAB + rows * 128 + 128

    @property
    def expand_shared(self) -> int:
        """The same of an expansion CTA."""
        return (_slabs(self.r) + 6) * _SLAB + 256


def takes(capability: int, sizes: Sizes) -> bool:
    """Whether these kernels run on a device of this compute capability with these sizes."""
    return (
        capability == 90
        and all(size > 0 and size % 8 == 0 for size in (sizes.r, sizes.k, sizes.p, sizes.v))
        and sizes.v <= 256
        and max(sizes.shared, sizes.expand_shared) <= _MOST_SHARED
    )


def chunk_rows(sizes: Sizes, n_ctx: int) -> int:
    """Cache rows that are expanded at a time: a power of two, unless it holds all n_ctx.

    So a step over n_kv and one over more rows that have as many chunks for all heads have as many
    for some of them, and all ranks' steps can be told apart alike.
    """
    a_row = 128 * sizes.h * (_slabs(sizes.k) + _slabs(sizes.v))
    fitting = max(_LEAST_CHUNK, min(_CHUNK, _CHUNK_BYTES // a_row))
    return min(1 << (fitting.bit_length() - 1), -(-n_ctx // 128) * 128)


def chunks(sizes: Sizes, n_ctx: int, n_kv: int) -> int:
    """Chunks of a step over n_kv rows. Part of the key of captured steps."""
    return -(-n_kv // chunk_rows(sizes, n_ctx))


def scratch_bytes(sizes: Sizes, n: int, n_ctx: int, n_sm: int) -> int:
    """Bytes that `attend_expanded` takes from the arena at most, its result included."""
    blocks, chunk = -(-n // _BLOCK), chunk_rows(sizes, n_ctx)
    key, value = _slabs(sizes.k) + _slabs(sizes.p), _slabs(sizes.v)
    columns = sizes.h * (_slabs(sizes.k) + value)
    up = -(-columns // 2) * _slabs(sizes.r) * _SLAB
    items = _items(sizes, n)
    parts = max(items, min(8 * items, _SPLIT_ITEMS * n_sm))
    return (
        blocks * sizes.h * key * _SLAB + up + chunk * (columns + _slabs(sizes.p)) * 128
        + parts * _kept(sizes) + 2 * n * sizes.h * sizes.v + 8 * 256
    )  # fmt: skip


def attend_expanded(
    ops: Launcher, q: Array, kv: CacheRows, k_b: Weight, v_b: Weight, step: Step, sizes: Sizes,
    scale: float, temperature: Temperature | None = None,
) -> Array:  # fmt: skip
    """Attention over a layer's cache [n, h * v], as float16 holding o / 16.

    q [n, h * (k + p)] float32 as the query product leaves it: rotation by step.cos and step.sin,
    and mistral4's temperature, are done here. k_b [h, r, k] and v_b [h, v, r] in tiles or GGUF
    bytes. step.pos[i] < 0 is a padded token, whose result is 0; rows past the highest position may
    hold anything. Of step.n_kv only chunks() is baked in: a captured step serves all that have
    as many.
    """
    h, n = sizes.h, step.n
    chunk = chunk_rows(sizes, kv.values.shape[0])
    n_k, n_p, n_v = _slabs(sizes.k), _slabs(sizes.p), _slabs(sizes.v)
    attending = {"K": sizes.k, "P": sizes.p, "V": sizes.v, "TILE": sizes.tile}
    factor = scale * math.log2(math.e)
    queries, up, unboost = _inputs(ops, q, k_b, v_b, step, sizes, temperature)
    keys, values = (ops.new((h * chunk * size * 128,), np.uint8) for size in (n_k, n_v))
    rope = ops.new((chunk * n_p * 128,), np.uint8)
    n_chunks = chunks(sizes, kv.values.shape[0], step.n_kv)
    items, splits = _items(sizes, n), _splits(sizes, n, step.n_kv, chunk, ops.n_sm)
    parts = splits * items if splits * n_chunks > 1 else 0
    state = ops.new((parts * _kept(sizes) // 4,)) if parts else None
    o = ops.new((n, h * sizes.v), np.float16)
    for row0 in range(0, n_chunks * chunk, chunk):
        ops.run(
            "mla_expand", (ops.n_sm,), 384, keys, values, rope, up, unboost,
            kv.values, kv.scales, step.pos, n, row0, chunk, h, shared=sizes.expand_shared,
            R=sizes.r, CACHE_KIND=_CACHES[kv.cache_type], **attending,
        )  # fmt: skip
        ops.run(
            "mla_prefill", (items, splits), 384, o, None, state, queries, keys, values, rope,
            step.pos, n, h, row0, chunk, row0 == 0, row0 + chunk >= step.n_kv, factor,
            shared=sizes.shared, **attending,
        )  # fmt: skip
    if splits > 1:
        ops.run(
            "mla_prefill_merge", (items,), 256, o, None, state, step.pos, n, h, splits, factor,
            **attending,
        )  # fmt: skip
    return o


def _inputs(
    ops: Launcher, q: Array, k_b: Weight, v_b: Weight, step: Step, sizes: Sizes,
    temperature: Temperature | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Queries as mla_prefill reads them, k_b and v_b as mla_expand does, what scales its sums."""
    tokens, depth = -(-step.n // _BLOCK) * _BLOCK, _slabs(sizes.r)
    columns = sizes.h * (_slabs(sizes.k) + _slabs(sizes.v))
    width = sizes.h * (_slabs(sizes.k) + _slabs(sizes.p))
    queries = ops.new((tokens * width * 128,), np.uint8)
    up, unboost = ops.new((-(-columns // 2) * depth * _SLAB,), np.uint8), ops.new((2,))
    held = [(w.raw, w.row_bytes, 0) if w.tiles is None else (w.tiles, 0, 1) for w in (k_b, v_b)]
    (k, k_row, k_tiled), (v, v_row, v_tiled) = held
    ops.run(
        "mla_prefill_inputs", (depth * columns + tokens,), 128, up, unboost, queries, k, v, q,
        step.cos, step.sin, step.pos, step.n, sizes.h, k_row, v_row, q.stride(0),
        *((1, 0.0) if temperature is None else (temperature.length, temperature.scale)),
        K=sizes.k, P=sizes.p, V=sizes.v, R=sizes.r, TILE=sizes.tile, WTYPE=k_b.qtype.id,
        WTYPE_V=v_b.qtype.id, TILED=k_tiled, TILED_V=v_tiled,
    )  # fmt: skip
    return queries, up, unboost


def _slabs(width: int) -> int:
    return -(-width // 64)


def _items(sizes: Sizes, n: int) -> int:
    """Blocks of tokens of all heads."""
    return sizes.h * -(-n // _BLOCK)


def _kept(sizes: Sizes) -> int:
    """Bytes of an item's unnormalised result, maxima and sums."""
    return 1024 * (32 * _slabs(sizes.v) + 4)


def _splits(sizes: Sizes, n: int, n_kv: int, chunk: int, n_sm: int) -> int:
    """CTAs that share an item's cache rows, by estimated microseconds of whole waves and merging.

    Constants: one H200, 2026-11-22; a tile's flops at an SM's measured 5 Tflop/s, 2 us to start a
    CTA, state at 3.5 TB/s.
    """
    items = _items(sizes, n)
    n_chunks = -(-n_kv // chunk)
    rows = (n_kv - n / 2) / n_chunks  # that an item sees of a chunk, on average
    a_tile = 256 * sizes.tile * (sizes.k + sizes.p + sizes.v) / 5e6
    uneven = n_kv < 2 * n  # long items start first, short ones fill the gaps

    def cost(splits: int) -> float:
        waves = items * splits / n_sm
        waves = max(1.0, waves) if uneven else float(math.ceil(waves))
        compute = n_chunks * waves * (math.ceil(rows / sizes.tile / splits) * a_tile + 2)
        return compute + (2 * splits * items * _kept(sizes) / 3.5e6 if splits > 1 else 0)

    most = min(8, math.ceil(rows / sizes.tile), max(1, _SPLIT_ITEMS * n_sm // items))
    return min(range(1, max(1, most) + 1), key=cost)
