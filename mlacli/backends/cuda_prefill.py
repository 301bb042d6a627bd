"""Expanded attention of many tokens on sm_90a: keys and values of a chunk of the cache at a time.

`attend_expanded` is all that ops need; expanded_sizes says for which sizes and what it costs.
Queries, cached rows and probabilities are rounded to float16 (-gap f16), and so are keys, values
and the weights that make them; sums are float32. Not for -gap f32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlacli.expanded_sizes import (
    BLOCK,
    MOST_PARTS,
    SLAB,
    Sizes,
    attend_shared,
    chunk_rows,
    chunks,
    expand_shared,
    planned_rows,
    slabs,
    step_kind,
    takes,
    tile_rows,
)

if TYPE_CHECKING:
    from mlacli.backends.cuda_array import Array
    from mlacli.backends.cuda_attention import CacheRows
    from mlacli.loading.quant_types import QType
    from mlacli.models.parts import Temperature
    from mlacli.ops import Step

_CACHES = {"f16": 0, "bf16": 1, "f32": 2, "q8_0": 3}  # CACHE_KIND of the kernels

__all__ = ["Sizes", "attend_expanded", "step_kind", "takes"]


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


def attend_expanded(
    ops: Launcher, q: Array, kv: CacheRows, k_b: Weight, v_b: Weight, step: Step, sizes: Sizes,
    scale: float, temperature: Temperature | None = None,
) -> Array:  # fmt: skip
    """Attention over a layer's cache [n, h * v], as float16 holding o / 16.

    q [n, h * (k + p)] float32 as the query product leaves it: rotation by step.cos and step.sin,
    and mistral4's temperature, are done here. k_b [h, r, k] and v_b [h, v, r] in tiles or GGUF
    bytes. step.pos[i] < 0 is a padded token, whose result is 0; rows past the highest position may
    hold anything. Of step.n_kv only step_kind() is baked in: a captured step serves all of a kind.
    """
    h, n = sizes.h, step.n
    n_ctx = kv.values.shape[0]
    chunk, n_chunks = chunk_rows(sizes, n_ctx), chunks(sizes, n_ctx, step.n_kv)
    n_k, n_p, n_v = slabs(sizes.k), slabs(sizes.p), slabs(sizes.v)
    attending = {"K": sizes.k, "P": sizes.p, "V": sizes.v, "TILE": tile_rows(sizes)}
    factor = scale * math.log2(math.e)
    queries, up, unboost = _inputs(ops, q, k_b, v_b, step, sizes, temperature)
    keys, values = (ops.new((h * chunk * size * 128,), np.uint8) for size in (n_k, n_v))
    rope = ops.new((chunk * n_p * 128,), np.uint8)
    planned = planned_rows(sizes, n, n_ctx, step.n_kv)
    items, splits = sizes.items(n), _splits(sizes, n, planned, chunk, ops.n_sm)
    parts = splits * items if splits * n_chunks > 1 else 0
    state = ops.new((parts * sizes.kept // 4,)) if parts else None
    o = ops.new((n, h * sizes.v), np.float16)
    for row0 in range(0, n_chunks * chunk, chunk):
        ops.run(
            "mla_expand", (ops.n_sm,), 384, keys, values, rope, up, unboost,
            kv.values, kv.scales, step.pos, n, row0, chunk, h, shared=expand_shared(sizes),
            R=sizes.r, CACHE_KIND=_CACHES[kv.cache_type], **attending,
        )  # fmt: skip
        ops.run(
            "mla_prefill", (items, splits), 384, o, None, state, queries, keys, values, rope,
            step.pos, n, h, row0, chunk, row0 == 0, row0 + chunk >= step.n_kv, factor,
            shared=attend_shared(sizes), **attending,
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
    tokens, depth = -(-step.n // BLOCK) * BLOCK, slabs(sizes.r)
    columns = sizes.h * (slabs(sizes.k) + slabs(sizes.v))
    width = sizes.h * (slabs(sizes.k) + slabs(sizes.p))
    queries = ops.new((tokens * width * 128,), np.uint8)
    up, unboost = ops.new((-(-columns // 2) * depth * SLAB,), np.uint8), ops.new((2,))
    held = [(w.raw, w.row_bytes, 0) if w.tiles is None else (w.tiles, 0, 1) for w in (k_b, v_b)]
    (k, k_row, k_tiled), (v, v_row, v_tiled) = held
    ops.run(
        "mla_prefill_inputs", (depth * columns + tokens,), 128, up, unboost, queries, k, v, q,
        step.cos, step.sin, step.pos, step.n, sizes.h, k_row, v_row, q.stride(0),
        *((1, 0.0) if temperature is None else (temperature.length, temperature.scale)),
        K=sizes.k, P=sizes.p, V=sizes.v, R=sizes.r, TILE=tile_rows(sizes), WTYPE=k_b.qtype.id,
        WTYPE_V=v_b.qtype.id, TILED=k_tiled, TILED_V=v_tiled,
    )  # fmt: skip
    return queries, up, unboost


def _splits(sizes: Sizes, n: int, n_kv: int, chunk: int, n_sm: int) -> int:
    """CTAs that share an item's cache rows, by estimated microseconds of whole waves and merging.

    Constants: one H200, 2026-11-22; a tile's flops at an SM's measured 5 Tflop/s, 2 us to start a
    CTA, state at 3.5 TB/s.
    """
    items = sizes.items(n)
    n_chunks = -(-n_kv // chunk)
    rows = (n_kv - n / 2) / n_chunks  # that an item sees of a chunk, on average
    a_tile = 256 * tile_rows(sizes) * (sizes.k + sizes.p + sizes.v) / 5e6
    uneven = n_kv < 2 * n  # long items start first, short ones fill the gaps

    def cost(splits: int) -> float:
        waves = items * splits / n_sm
        waves = max(1.0, waves) if uneven else float(math.ceil(waves))
        compute = n_chunks * waves * (math.ceil(rows / tile_rows(sizes) / splits) * a_tile + 2)
        return compute + (2 * splits * items * sizes.kept / 3.5e6 if splits > 1 else 0)

    most = min(8, math.ceil(rows / tile_rows(sizes)), max(1, MOST_PARTS // items))
    return min(range(1, max(1, most) + 1), key=cost)
