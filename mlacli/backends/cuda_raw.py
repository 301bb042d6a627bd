"""Products of quantised weights that stay GGUF bytes, on tensor cores.

Types that tiles make larger, where a plan says so: parallel/shards.py.

Few tokens: kernels/matvec_raw.cu reads the bytes as they are. Many: a bounded part of the weight at
a time is unpacked into float16 tiles (kernels/unpack.cu), which cuda_gemm multiplies. What neither
takes - float32 weights, routers, devices before compute capability 8.0 - is cuda_plain's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlacli.backends import cuda_gemm as gemm
from mlacli.backends import cuda_plain as plain
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.loading.quant_types import F16
from mlacli.loading.tiles import tiled_shape
from mlacli.parallel.cuda_sizes import (
    FEW,
    shared_limit,
    slot_tile,
    stays_plain,
    unpacked_experts,
    unpacked_rows,
)

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps

_SPAN = 256  # of kernels/include/raw_rows.cuh
TUNED = (8, 2)  # warps of a CTA, CTAs of an SM
_SM_SHARED = 208 << 10  # bytes that an SM's CTAs share, less their codebooks
_CODEBOOK = 9 << 10  # bytes of static shared memory at most


@dataclass(frozen=True, slots=True)
class Geometry:
    """How CTAs take the rows of one weight: RawShape in kernels/include/raw_rows.cuh."""

    warps: int
    per_sm: int  # CTAs
    share: int  # warps that have a row tile together
    slot: int
    chunks: int  # of 128 columns in a staged vector
    row_tiles: int
    stages: int = 3

    def shared(self, vectors: int, sums: int) -> int:
        """Dynamic shared memory of matvec_raw.cu, in the order of its RawMemory."""
        ring = self.warps * self.stages * 16 * self.slot
        return vectors * self.chunks * (512 + 32) + 2 * sums * self.warps * 64 + ring

    def ctas(self, ops: CudaOps, others: int) -> int:
        """CTAs along the rows, beside `others` along the grid's other axes."""
        groups = -(-self.row_tiles // (self.warps // self.share))
        return min(groups, max(1, ops.n_sm * self.per_sm // others))

    def defines(self) -> dict[str, int]:
        return {"N_WARPS": self.warps, "N_CTAS": self.per_sm, "STAGES": self.stages}


def geometry(
    ops: CudaOps, w: CudaWeight, rows: int, others: int = 1, vectors: int = 1, tokens: int = 1
) -> Geometry:
    """For `rows` rows of w, beside `others` along the grid's other axes; `vectors` of x staged."""
    spans, row_tiles = -(-(w.skip + w.shape[-1]) // _SPAN), -(-rows // 16)
    parts = spans * (1 if tokens > 1 else vectors)  # of a row tile's work
    warps, per_sm = TUNED
    share, enough = 1, 0.9 * warps * per_sm * ops.n_sm  # warps that keep all SMs at work
    while share < warps and 2 * share <= parts and row_tiles * others * share < enough:
        share *= 2
    slot = -(-(_SPAN // w.qtype.block * w.qtype.nbytes + 15 + 4) // 16)
    slot += 1 - slot % 2  # rows of a stage begin in different banks
    how = Geometry(warps, 1 if tokens > 2 else per_sm, share, 16 * slot, 2 * spans, row_tiles)
    while how.shared(vectors, 2 * tokens) * how.per_sm > _SM_SHARED and how.per_sm > 1:
        how = replace(how, per_sm=how.per_sm - 1)
    return how


def _most_shared(ops: CudaOps) -> int:
    """Dynamic shared memory that a CTA may have."""
    return shared_limit(ops.capability) - _CODEBOOK


def takes(ops: CudaOps, *weights: CudaWeight) -> bool:
    """Whether this module takes the weights, of which none lies in tiles."""
    return ops.capability >= 80 and not any(stays_plain(w.name, w.qtype) for w in weights)


# ---- dense and per-head products --------------------------------------------------------------


def product(ops: CudaOps, x: Act, w: CudaWeight, out: Array, add: bool) -> None:
    """out [n, rows] = x w^T, or added to it."""
    if takes(ops, w) and len(x) > FEW:
        _many(ops, ops.f16(x), w, out, add)
    elif not (takes(ops, w) and _few(ops, ops.f32(x), w, out, add)):
        plain.product(ops, ops.f32(x), w, out, add)


def heads(ops: CudaOps, x: Array, w: CudaWeight) -> Array:
    """Per head x[:, h] w[h]^T [n, h, out]; x may be strided."""
    h, out, _ = w.shape
    y = ops.new((len(x), h, out))
    if not (takes(ops, w) and len(x) <= FEW and _few(ops, x, w, y, False)):
        plain.heads(ops, x, w, y)
    return y


def _few(ops: CudaOps, x: Array, w: CudaWeight, y: Array, add: bool) -> bool:
    """Up to FEW tokens; false where a token doesn't fit shared memory."""
    n, out, batches = len(x), w.shape[-2], w.shape[0] if len(w.shape) > 2 else 1
    tokens, limit = 1 << (n - 1).bit_length(), _most_shared(ops)
    how = geometry(ops, w, out, batches, tokens, tokens)
    while tokens > 1 and how.shared(tokens, tokens) > limit:
        tokens //= 2
        how = geometry(ops, w, out, batches, tokens, tokens)
    shared, passes = how.shared(tokens, tokens), -(-n // tokens)
    if shared > limit:
        return False
    ops.run(
        "raw_products", (how.ctas(ops, passes * batches), passes, batches), 32 * how.warps, y,
        w.raw, x, n, out, w.shape[-1], w.skip, how.share, how.slot, w.row_bytes,
        w.raw.nbytes, x.stride(0), y.stride(0), out * w.row_bytes,
        x.stride(1) if batches > 1 else 0, y.stride(1) if batches > 1 else 0, shared=shared,
        WTYPE=w.qtype.id, TOKENS=tokens, ADD=int(add), **how.defines(),
    )  # fmt: skip
    return True


def _many(ops: CudaOps, x16: Array, w: CudaWeight, out: Array, add: bool) -> None:
    rows = w.shape[0]
    for first in range(0, rows, step := unpacked_rows(*w.shape)):
        mark = ops.device.mark()
        part = _unpacked(ops, w, (min(step, rows - first),), first)
        ops.device.follow(ops.device)  # products read weights before what ran last has ended
        gemm.products(ops, [(part, out[:, first : first + step])], x16, add=add)
        ops.device.rewind(mark)  # what follows on the stream may overwrite it


def _unpacked(
    ops: CudaOps, w: CudaWeight, sizes: tuple[int, ...], first: int,
    order: gemm.Sorted | None = None,
) -> CudaWeight:  # fmt: skip
    """`sizes` leading indices of w from `first` on in float16 tiles; experts: those in `order`."""
    shape = (*sizes, *w.shape[len(sizes) :])
    layout = tiled_shape(shape, F16)
    tiles, (rows, n_in) = ops.new((layout.nbytes,), np.uint8), shape[-2:]
    lead_bytes = w.row_bytes if len(shape) == 2 else rows * w.row_bytes
    grid = layout.n_row_tiles * -(-layout.n_col_tiles // 4), layout.lead
    ops.run(
        "unpack_tiles", grid, 128, tiles, w.raw.reshape(-1)[first * lead_bytes :], rows, n_in,
        w.skip, layout.n_col_tiles, w.row_bytes, lead_bytes, None if order is None else order.tiles,
        None if order is None else order.ends, WTYPE=w.qtype.id,
    )  # fmt: skip
    return CudaWeight(w.name, shape, F16, tiles, layout)


# ---- routed experts ---------------------------------------------------------------------------


def experts(
    ops: CudaOps, x: Act, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None,
    down: CudaWeight, y: Array, add: bool,
) -> None:  # fmt: skip
    """y [n, d] (+)= weighted sum of down_e silu(gate_e x) * up_e x; up None: gate holds both."""
    ours = takes(ops, gate, gate if up is None else up, down)
    if ours and len(x) > FEW:
        x16, (h16, part) = ops.f16(x), gemm.expert_rows(ops, chosen, gate, up, down)
        expert_products(ops, x16, chosen, gate, up, down, h16, part)
        gemm.combine(ops, part, chosen, gate.first, gate.shape[0], y, add)
        return
    h = ops.new((*chosen.ids.shape, down.shape[2]))
    if not (ours and _few_up(ops, ops.f32(x), chosen, gate, up, h)):
        plain.experts_up(ops, ops.f32(x), chosen, gate, up, h)
    if not (ours and _few_down(ops, h, chosen, down, y, add)):
        plain.experts_down(ops, h, chosen, down, y, add)


def _few_up(
    ops: CudaOps, x: Array, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None, h: Array
) -> bool:
    (n, n_used, f), (held, rows, d) = h.shape, gate.shape
    up_raw = gate.raw.reshape(-1)[f * gate.row_bytes :] if up is None else up.raw
    how = geometry(ops, gate, f, n * n_used)
    shared = how.shared(1, 2)
    alike = up is None or up.qtype == gate.qtype
    if not alike or gate.skip or shared > _most_shared(ops):
        return False
    ops.run(
        "raw_experts_up", (how.ctas(ops, n * n_used), n * n_used), 32 * how.warps, h, gate.raw,
        up_raw, x, chosen.ids, n_used, f, d, gate.first, held, how.share, how.slot,
        gate.row_bytes, rows * gate.row_bytes, up_raw.nbytes, x.stride(0), shared=shared,
        WTYPE=gate.qtype.id, TOKENS=1, ADD=0, **how.defines(),
    )  # fmt: skip
    return True


def _few_down(
    ops: CudaOps, h: Array, chosen: Chosen, down: CudaWeight, y: Array, add: bool
) -> bool:
    (n, n_used, f), (held, d, _) = h.shape, down.shape
    how = geometry(ops, down, d, n, n_used)
    shared = how.shared(n_used, 1)
    if n_used > 32 or shared > _most_shared(ops):
        return False
    ops.run(
        "raw_experts_down", (how.ctas(ops, n), n), 32 * how.warps, y, down.raw, h, chosen.ids,
        chosen.weights, n_used, f, d, down.first, held, down.skip, how.share, how.slot,
        down.row_bytes, d * down.row_bytes, down.raw.nbytes, y.stride(0), shared=shared,
        WTYPE=down.qtype.id, TOKENS=1, ADD=int(add), **how.defines(),
    )  # fmt: skip
    return True


def expert_products(
    ops: CudaOps, x16: Array, chosen: Chosen, gate: CudaWeight, up: CudaWeight | None,
    down: CudaWeight, h: Array, part: Array,
) -> None:  # fmt: skip
    """gemm.expert_products of weights that takes() takes, some experts at a time."""
    n_used, (held, d, f) = chosen.ids.shape[1], down.shape
    up_rows = gate.shape[1] + (0 if up is None else up.shape[1])
    tile = slot_tile(chosen.ids.size, held)
    for first in range(0, held, step := unpacked_experts(held, up_rows, d, f)):
        count, mark = (min(step, held - first),), ops.device.mark()
        order = gemm.sort(ops, chosen.ids, gate.first + first, *count, tile)
        again = ops.device.mark()
        both = [None if w is None else _unpacked(ops, w, count, first, order) for w in (gate, up)]
        assert both[0] is not None
        ops.device.follow(ops.device)
        gemm.experts_up(ops, x16, order, n_used, both[0], both[1], h)
        ops.device.rewind(again)
        last = _unpacked(ops, down, count, first, order)
        ops.device.follow(ops.device)
        gemm.experts_down(ops, h, order, last, part)
        ops.device.rewind(mark)
