"""Products of at most MOST tokens on weights in tiles: launches of kernels/matvec*.cu and route.cu.

x, outputs and h are float32 Arrays [n, width] at even offsets and strides; `norm` = (weight, eps)
norms x on the fly. `Weight` is a CudaWeight with tiles; callers ask `takes()` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlacli.backends.cuda_geometry import (
    BULK_MOST,
    STAGED,
    BulkGeometry,
    DownGeometry,
    Geometry,
    ahead_of,
    bulk_geometry,
    col_tiles,
    ctas_of,
    dense_geometry,
    down_geometry,
    dynamic_shared,
    most_rows,
    pair_geometry,
    ring_of,
    row_bytes,
    row_tiles,
)
from mlacli.loading.tiles import COLS, ROWS

if TYPE_CHECKING:
    from mlacli.backends.cuda_array import Array
    from mlacli.models.parts import Routing

Weight = Any
Norm = tuple[Weight, float]
MOST = 8  # tokens


def takes(*weights: Weight) -> bool:
    """Whether all of them (None: absent) are in tiles."""
    return all(w is None or w.tiles is not None for w in weights)


def routes(gate: Weight) -> bool:
    """Whether route() takes this gate."""
    return gate.tiles is not None or (gate.qtype.name == "F32" and gate.shape[1] % 4 == 0)


# ---- dense products -------------------------------------------------------------------------


def products(
    ops: Any, segments: Sequence[tuple[Weight, Array]], x: Array, norm: Norm | None = None,
    add: bool = False, geometry: Geometry | None = None,
) -> None:  # fmt: skip
    """out = (normed x) w^T for up to three (w [rows, in], out [n, rows]); `add`: out += it.

    With `add` there is one segment; its out is the residual stream, for example.
    """
    n, blocks = len(x), _blocks(len(x))
    assert 1 <= len(segments) <= 3 and not (add and len(segments) > 1)
    ws = [w for w, _ in segments]
    how = geometry or dense_geometry(ops, ws, blocks)
    absent = [None] * (3 - len(segments))
    zeros = [0] * len(absent)
    outs = [out for _, out in segments]
    rows = [row_tiles(w.shape[0]) for w in ws]
    ctas = ctas_of(ops, rows, how, 0 if blocks else col_tiles(ws[0]), 1)
    stages, shared = (0, 0) if blocks else ring_of(ops, how, *([w] for w in ws))
    ops.run(
        "products_few", (sum(ctas),), 32 * how.warps, *outs, *absent, *(w.tiles for w in ws),
        *absent, x, _raw(norm), n, ws[0].shape[1], ws[0].skip, *(w.shape[0] for w in ws), *zeros,
        *ctas, *zeros, _read(x), *map(_stride, outs), *zeros, _eps(norm), shared=shared,
        N_ROWS=most_rows(rows, ctas), N_STAGES=stages, N_BLOCKS=blocks, WITH_ADD=int(add),
        WITH_NORM=int(norm is not None), **_columns(ws), **how.defines(), **_types(ws, 3),
    )  # fmt: skip


def gated(
    ops: Any, gate: Weight, up: Weight, h: Array, x: Array, norm: Norm | None = None,
    geometry: Geometry | None = None,
) -> None:  # fmt: skip
    """h = silu(gate x) * up x [n, f]."""
    rows, n_in = gate.shape
    blocks = _blocks(len(x))
    how = geometry or pair_geometry(ops, rows, (gate, up), blocks)
    tiles = [row_tiles(rows)]
    ctas = ctas_of(ops, tiles, how, 0 if blocks else col_tiles(gate), 2)
    stages, shared = (0, 0) if blocks else ring_of(ops, how, (gate, up))
    ops.run(
        "gated_few", (ctas[0],), 32 * how.warps, h, gate.tiles, up.tiles, x, _raw(norm),
        len(x), n_in, rows, _read(x), _stride(h), _eps(norm), GATED=1, N_BLOCKS=blocks,
        N_ROWS=most_rows(tiles, ctas), N_STAGES=stages, shared=shared,
        WITH_NORM=int(norm is not None), **_columns((gate, up)), **how.defines(),
        **_types((gate, up), 2),
    )  # fmt: skip


# ---- routed experts -------------------------------------------------------------------------


def route(
    ops: Any, ids: Array, weights: Array, scores: Array, counter: Array, gate: Weight, x: Array,
    routing: Routing, norm: Norm | None = None, bias: Weight | None = None,
    pos: Array | None = None, imposed: Array | None = None,
) -> None:  # fmt: skip
    """Expert ids and weights [n, n_used] of normed x; scores [n, E] is scratch.

    `counter`: one int32 that was 0 before the first call and belongs to this op. Tokens whose pos
    is -1 get ids -1 and weights 0. `imposed` ids [n, n_used] are taken instead (a test hook).
    A gate in tiles costs a launch more. `gate` is F32 otherwise, its width a multiple of 4.
    """
    n, n_experts = len(x), gate.shape[0]
    choice = (routing.n_used, routing.n_groups, routing.n_groups_used, int(routing.sigmoid),
              int(routing.renormalise))  # fmt: skip
    biases = None if bias is None else bias.raw
    if gate.tiles is not None:
        products(ops, [(gate, scores)], x, norm)
        ops.run(
            "route_chosen", (1,), 256, ids, weights, scores, biases, pos, imposed, n, *choice,
            routing.scale, N_EXPERTS=n_experts,
        )  # fmt: skip
        return
    ops.run(
        "route_few", (n_experts,), 256, ids, weights, scores, counter, gate.raw, x, _raw(norm),
        biases, pos, imposed, n, gate.shape[1], *choice, _read(x), routing.scale, _eps(norm),
        N_EXPERTS=n_experts,
    )  # fmt: skip


def route_gated(
    ops: Any, ids: Array, weights: Array, scores: Array, counter: Array, h: Array,
    shared: tuple[Weight, Weight], gate: Weight, x: Array, routing: Routing, norm: Norm,
    bias: Weight | None = None, pos: Array | None = None, imposed: Array | None = None,
) -> None:  # fmt: skip
    """`route`, and h [n, fs] = the shared expert's part of experts_up, in one launch.

    Only where `can_route_gated`. h is the end of experts_bulk's.
    """
    n, n_experts, fs = len(x), gate.shape[0], shared[0].shape[0]
    how = Geometry(8, ahead_of(shared, 8, 4), 2, 2)
    tiles = [row_tiles(fs)]
    ctas = ctas_of(ops, tiles, how, col_tiles(shared[0]), 2)
    stages, ring = ring_of(ops, how, shared)
    ops.run(
        "route_gated", (n_experts + ctas[0], n), 256, ids, weights, scores, counter, h, gate.raw,
        shared[0].tiles, shared[1].tiles, x, _raw(norm), None if bias is None else bias.raw, pos,
        imposed, n, fs, ctas[0], routing.n_used, routing.n_groups, routing.n_groups_used,
        int(routing.sigmoid), int(routing.renormalise), _read(x), _stride(h), routing.scale,
        _eps(norm), N_EXPERTS=n_experts, N_ROWS=most_rows(tiles, ctas), N_CTAS=how.ctas,
        N_AHEAD=how.ahead, N_STAGES=stages, shared=ring, N_COL_TILES=col_tiles(shared[0]),
        **_types(shared, 2),
    )  # fmt: skip


def can_route_gated(ops: Any, gate: Weight, shared: tuple[Weight, Weight] | None, x: Array) -> bool:
    """Whether the shared expert can be computed beside the choice."""
    if ops.capability < 80 or shared is None or not takes(*shared) or gate.tiles is not None:
        return False
    n_experts, d = gate.shape
    tiles = col_tiles(shared[0])
    fits = d == tiles * COLS and tiles <= STAGED and shared[0].skip == 0
    return routes(gate) and fits and n_experts <= 256


def experts_up(
    ops: Any, h: Array, ids: Array, x: Array, gate: Weight, up: Weight | None = None,
    shared: tuple[Weight, Weight] | None = None, norm: Norm | None = None,
    geometry: Geometry | None = None,
) -> None:  # fmt: skip
    """h [n, K f + fs]: silu(gate_e x) * up_e x of every slot's expert, then of the shared expert.

    `up` None: gate is ffn_gate_up_exps [E, 2 f, d]. Slots of experts that are not here stay
    unwritten.
    """
    (n, n_used), (held, f, d) = ids.shape, gate.shape
    up_row, up_w = 0, up
    if up_w is None:
        f, up_w = f // 2, gate
        up_row = f
    fs = 0 if shared is None else shared[0].shape[0]
    how = geometry or pair_geometry(ops, n_used * f + fs, (gate, up_w), 0)
    tiles = [row_tiles(fs), n_used * row_tiles(f)]
    ctas = ctas_of(ops, tiles, how, col_tiles(gate), 3 if up_row % ROWS else 2)
    sets: list[Sequence[Weight]] = [(gate, up_w, up_w) if up_row % ROWS else (gate, up_w)]
    stages, ring = ring_of(ops, how, *sets, *([shared] if shared else []))
    shared_tiles = (None, None) if shared is None else (shared[0].tiles, shared[1].tiles)
    ops.run(
        "experts_up_few", (sum(ctas), n), 32 * how.warps, h, gate.tiles, up_w.tiles, *shared_tiles,
        x, _raw(norm), ids, n_used, d, f, fs, row_tiles(gate.shape[1]), row_tiles(up_w.shape[1]),
        up_row, gate.first, held, ctas[0], _read(x), _stride(h), _eps(norm), EXPERTS_UP=1,
        N_ROWS=most_rows(tiles, ctas), N_STAGES=stages, shared=ring, UP_SHIFT=up_row % ROWS,
        WITH_NORM=int(norm is not None), **_columns((gate, up_w, *(shared or ()))), **how.defines(),
        **_types((gate, up_w, *(shared or ())), 4),
    )  # fmt: skip


def experts_down(
    ops: Any, y: Array, h: Array, ids: Array, weights: Array, down: Weight,
    shared: Weight | None = None, add: bool = False, after_up: bool = False,
    geometry: DownGeometry | None = None,
) -> None:  # fmt: skip
    """y [n, d] = sum over slots of weights * down_e h, and the shared expert's; `add`: y += it.

    `after_up`: the launch before this one on the stream is experts_up's.
    """
    (n, n_used), (held, d, f) = ids.shape, down.shape
    both = (down,) if shared is None else (down, shared)
    fs = 0 if shared is None else shared.shape[1]
    how = geometry or down_geometry(down, shared, n_used)
    ragged = any(w.skip or w.shape[-1] != COLS * col_tiles(w) for w in both)
    ops.run(
        "experts_down_few", (row_tiles(d), n), 32 * how.warps(n_used), y, down.tiles,
        None if shared is None else shared.tiles, h, ids, weights, d, f, fs, down.skip,
        0 if shared is None else shared.skip, down.first, held, _read(h), _stride(y),
        EXPERTS_DOWN=1, WITH_ADD=int(add), AFTER_UP=int(after_up), N_USED=n_used,
        N_PARTS=how.parts, N_PARTS_SHARED=how.parts_shared, N_AHEAD=how.ahead, N_CTAS=how.ctas,
        N_COL_TILES=col_tiles(down), N_COL_TILES_SHARED=0 if shared is None else col_tiles(shared),
        AT_EDGE=int(ragged), **_types(both, 2),
    )  # fmt: skip


def experts_bulk(
    ops: Any, y: Array, h: Array, ids: Array, weights: Array, x: Array, gate: Weight,
    up: Weight | None, down: Weight, shared_down: Weight, norm: Norm, add: bool = False,
    geometry: BulkGeometry | None = None,
) -> None:  # fmt: skip
    """As experts_up and experts_down behind route_gated, whose part of h [n, K f + fs] is there.

    Only where `can_bulk`, and directly behind that launch.
    """
    (n, n_used), (held, f, d), fs = ids.shape, gate.shape, shared_down.shape[1]
    up_row, up_w = 0, up
    if up_w is None:
        f, up_w = f // 2, gate
        up_row = f
    how = geometry or bulk_geometry(gate, up_w, down, shared_down, n_used)
    beside, k = ops.new((n, d)), col_tiles(gate)
    up_bytes = max(row_bytes(gate, up_w), row_bytes(shared_down))
    ops.run(
        "experts_up_bulk", (row_tiles(d) + n_used * row_tiles(f), n), 32 * how.warps, h, beside,
        gate.tiles, up_w.tiles, shared_down.tiles, x, _raw(norm), ids, n_used, d, f,
        row_tiles(gate.shape[1]), row_tiles(up_w.shape[1]), up_row, gate.first, held, _read(x),
        _stride(h), _eps(norm), shared=dynamic_shared(up_bytes), EXPERTS_UP=1, N_WARPS=how.warps,
        N_CTAS=how.ctas, N_COL_TILES=k, N_COL_TILES_SHARED=col_tiles(shared_down),
        **_types((gate, up_w, shared_down), 3),
    )  # fmt: skip
    assert fs == COLS * col_tiles(shared_down), "the caller asks can_bulk()"
    ops.run(
        "experts_down_bulk", (row_tiles(d), n), 32 * n_used * how.parts, y, down.tiles, beside, h,
        ids, weights, d, f, down.first, held, _read(h), _stride(y),
        shared=dynamic_shared(n_used * row_bytes(down)), EXPERTS_DOWN=1, WITH_ADD=int(add),
        N_USED=n_used, N_PARTS=how.parts, N_COL_TILES=col_tiles(down), **_types((down,), 1),
    )  # fmt: skip


def can_bulk(
    ops: Any, gate: Weight, up: Weight | None, down: Weight, shared_down: Weight, n_used: int
) -> bool:
    """Whether whole row tiles fit shared memory, and x whole column tiles."""
    up_w = gate if up is None else up
    ws = (gate, up_w, down, shared_down)
    if not takes(*ws) or any(w.skip or w.shape[-1] != COLS * col_tiles(w) for w in ws):
        return False
    if up is None and gate.shape[1] // 2 % ROWS:
        return False
    up_bytes = max(row_bytes(gate, up_w), row_bytes(shared_down))
    most = max(up_bytes, n_used * row_bytes(down))
    return ops.capability >= 90 and most <= BULK_MOST and n_used <= 16


# ---- plumbing -------------------------------------------------------------------------------


def _blocks(n: int) -> int:
    """Blocks of four tokens; 0: one token."""
    assert 1 <= n <= MOST
    return 0 if n == 1 else -(-n // 4)


def _types(ws: Sequence[Weight], most: int) -> dict[str, int]:
    ids = [w.qtype.id for w in ws] + [-1] * (most - len(ws))
    return {f"WTYPE{i}": id_ for i, id_ in enumerate(ids)}


def _columns(ws: Sequence[Weight]) -> dict[str, int]:
    """Column tiles, and whether some of their columns meet no x."""
    tiles = col_tiles(ws[0])
    assert all(col_tiles(w) == tiles for w in ws), "weights of one x have as many column tiles"
    n_in = ws[0].shape[-1]
    assert n_in % 2 == 0, "x is read two floats at a time"
    return {"N_COL_TILES": tiles, "AT_EDGE": int(n_in != tiles * COLS or ws[0].skip > 0)}


def _raw(norm: Norm | None) -> Array | None:
    return None if norm is None else norm[0].raw


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm[1]


def _stride(x: Array) -> int:
    """Elements from one token to the next."""
    return x.stride(0)


def _read(x: Array) -> int:
    """_stride of an input: it is read two floats at a time."""
    stride = x.stride(0)
    assert x.ptr % 8 == 0 and (stride % 2 == 0 or len(x) == 1), "rows start at even offsets"
    return stride
