"""Products of at most MOST tokens on weights in tiles: geometry and launches of kernels/matvec*.cu, route.cu.

x, outputs and h are float32 Arrays [n, width] at even offsets and strides; `norm` = (weight, eps)
norms x on the fly. `Weight` is a CudaWeight with tiles; callers ask `takes()` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlacli.loading.tiles import COLS, ROWS, packed_columns

if TYPE_CHECKING:
    from mlacli.backends.cuda_array import Array
    from mlacli.models.parts import Routing

Weight = Any
Norm = tuple[Weight, float]
MOST = 8  # tokens
_STAGED = 128  # column tiles of x that fit shared memory as fragments (OneStaged)
_CLUSTER_BYTES = 1 << 20  # of a gate that 8 SMs read in about a microsecond
_SHARED = 46 << 10  # bytes of static shared memory


@dataclass(frozen=True, slots=True)
class Geometry:
    """Warps of a CTA, column tiles under way to each, CTAs an SM must hold, CTAs per SM.

    per_sm 0: a CTA per row tile; else that many share all row tiles.
    """

    warps: int = 8
    ahead: int = 4
    ctas: int = 1
    per_sm: int = 0

    def defines(self) -> dict[str, int]:
        return {"N_WARPS": self.warps, "N_AHEAD": self.ahead, "N_CTAS": self.ctas}


@dataclass(frozen=True, slots=True)
class DownGeometry:
    """Warps of a slot and of the shared expert, column tiles under way, CTAs an SM must hold."""

    parts: int
    parts_shared: int
    ahead: int = 4
    ctas: int = 1

    def warps(self, n_used: int) -> int:
        return n_used * self.parts + self.parts_shared


def takes(*weights: Weight) -> bool:
    """Whether all of them (None: absent) are in tiles."""
    return all(w is None or w.tiles is not None for w in weights)


def routes(gate: Weight) -> bool:
    """Whether route() takes this gate."""
    return gate.tiles is not None or (gate.qtype.name == "F32" and gate.shape[1] % 4 == 0)


def col_tiles(w: Weight) -> int:
    return packed_columns(w.shape[-1], w.qtype, w.skip) // COLS


def row_tiles(rows: int) -> int:
    return -(-rows // ROWS)


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
    how = geometry or _dense_geometry(ops, ws, blocks)
    absent = [None] * (3 - len(segments))
    zeros = [0] * len(absent)
    outs = [out for _, out in segments]
    rows = [row_tiles(w.shape[0]) for w in ws]
    ctas = _ctas(ops, rows, how, 0 if blocks else col_tiles(ws[0]), 1)
    ops.run(
        "products_few", (sum(ctas),), 32 * how.warps, *outs, *absent, *(w.tiles for w in ws), *absent, x,
        _raw(norm), n, ws[0].shape[1], ws[0].skip, *(w.shape[0] for w in ws), *zeros, *ctas,
        *zeros, _read(x), *map(_stride, outs), *zeros, _eps(norm), N_ROWS=_most(rows, ctas),
        N_BLOCKS=blocks, WITH_NORM=int(norm is not None), WITH_ADD=int(add), **_columns(ws), **how.defines(),
        **_types(ws, 3),
    )  # fmt: skip


def gated(
    ops: Any, gate: Weight, up: Weight, h: Array, x: Array, norm: Norm | None = None,
    geometry: Geometry | None = None,
) -> None:  # fmt: skip
    """h = silu(gate x) * up x [n, f]."""
    rows, n_in = gate.shape
    blocks = _blocks(len(x))
    how = geometry or _pair_geometry(ops, rows, (gate, up), blocks)
    tiles = [row_tiles(rows)]
    ctas = _ctas(ops, tiles, how, 0 if blocks else col_tiles(gate), 2)
    ops.run(
        "gated_few", (ctas[0],), 32 * how.warps, h, gate.tiles, up.tiles, x, _raw(norm),
        len(x), n_in, rows, _read(x), _stride(h), _eps(norm), GATED=1, N_BLOCKS=blocks,
        N_ROWS=_most(tiles, ctas),
        WITH_NORM=int(norm is not None), **_columns((gate, up)), **how.defines(),
        **_types((gate, up), 2),
    )  # fmt: skip


# ---- routed experts -------------------------------------------------------------------------


def route(
    ops: Any, ids: Array, weights: Array, scores: Array, counter: Array, gate: Weight, x: Array,
    routing: Routing, norm: Norm | None = None, bias: Weight | None = None, pos: Array | None = None,
    imposed: Array | None = None,
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
    ops: Any, ids: Array, weights: Array, h: Array, gate: Weight, shared: tuple[Weight, Weight],
    x: Array, routing: Routing, norm: Norm, bias: Weight | None = None, pos: Array | None = None,
    imposed: Array | None = None, geometry: Geometry | None = None,
) -> None:  # fmt: skip
    """`route` and h [n, fs] = the shared expert's part of experts_up, in one launch.

    Only where `can_route_gated`. h is the end of experts_up's, which then gets no `shared`.
    """
    n, n_experts, fs = len(x), gate.shape[0], shared[0].shape[0]
    how = geometry or Geometry(8, _ahead(shared, 8, 4), 1, 1)
    tiles = [row_tiles(fs)]
    ctas = [-(-_ctas(ops, tiles, how, col_tiles(shared[0]), 2)[0] // 8) * 8]
    ops.run(
        "route_gated", (8 + ctas[0], n), 256, ids, weights, h, gate.raw, shared[0].tiles,
        shared[1].tiles, x, _raw(norm), None if bias is None else bias.raw, pos, imposed, fs, ctas[0],
        routing.n_used, routing.n_groups, routing.n_groups_used, int(routing.sigmoid),
        int(routing.renormalise), _read(x), _stride(h), routing.scale, _eps(norm),
        N_EXPERTS=n_experts, N_ROWS=_most(tiles, ctas), N_CTAS=how.ctas, N_AHEAD=how.ahead,
        N_COL_TILES=col_tiles(shared[0]), **_types(shared, 2),
    )  # fmt: skip


def can_route_gated(ops: Any, gate: Weight, shared: tuple[Weight, Weight] | None, x: Array) -> bool:
    """Whether a cluster of CTAs is there and chooses fast enough: it reads the gate by 8 SMs."""
    if ops.capability < 90 or shared is None or not takes(*shared) or gate.tiles is not None:
        return False
    (n_experts, d), stride = gate.shape, x.stride(0)
    aligned = x.ptr % 16 == 0 and (stride % 4 == 0 or len(x) == 1)
    tiles = col_tiles(shared[0])
    return (
        aligned and d == tiles * COLS and d % 128 == 0 and tiles <= _STAGED and n_experts <= 1024
        and 4 * n_experts * d <= _CLUSTER_BYTES
    )  # fmt: skip


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
    how = geometry or _pair_geometry(ops, n_used * f + fs, (gate, up_w), 0)
    tiles = [row_tiles(fs), n_used * row_tiles(f)]
    ctas = _ctas(ops, tiles, how, col_tiles(gate), 3 if up_row % ROWS else 2)
    shared_tiles = (None, None) if shared is None else (shared[0].tiles, shared[1].tiles)
    ops.run(
        "experts_up_few", (sum(ctas), n), 32 * how.warps, h, gate.tiles, up_w.tiles, *shared_tiles, x,
        _raw(norm), ids, n_used, d, f, fs, row_tiles(gate.shape[1]), row_tiles(up_w.shape[1]), up_row,
        gate.first, held, ctas[0], _read(x), _stride(h), _eps(norm), EXPERTS_UP=1,
        N_ROWS=_most(tiles, ctas), UP_SHIFT=up_row % ROWS,
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
    how = geometry or _down_geometry(down, shared, n_used)
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


# ---- geometry -------------------------------------------------------------------------------


def _ctas(
    ops: Any, tiles: Sequence[int], how: Geometry, n_col_tiles: int, streams: int
) -> list[int]:
    """CTAs for each of several lists of row tiles; n_col_tiles 0: several tokens."""
    total, most = sum(tiles), how.per_sm * ops.n_sm
    if not most or not 0 < n_col_tiles <= _STAGED or total <= most:
        return list(tiles)
    room = (
        _SHARED - 272 * n_col_tiles - 64 * how.warps
    )  # for sums: 64 bytes a warp, row tile and stream
    per_cta = max(1, room // (64 * how.warps * streams))
    most = max(most, -(-total // per_cta))
    return [max(1, t * most // total) if t else 0 for t in tiles]


def _most(tiles: Sequence[int], ctas: Sequence[int]) -> int:
    """Row tiles that a CTA has at most."""
    return max(-(-t // c) for t, c in zip(tiles, ctas, strict=True) if t)


def _dense_geometry(ops: Any, ws: Sequence[Weight], blocks: int) -> Geometry:
    tiles = col_tiles(ws[0])
    if blocks:
        return Geometry(8, _ahead(ws, 8, 4))
    warps = max(1, min(16, -(-tiles // 2)))
    return Geometry(warps, _ahead(ws, warps, 4), 1, 1)


def _pair_geometry(ops: Any, rows: int, ws: Sequence[Weight], blocks: int) -> Geometry:
    warps = max(2, min(8, col_tiles(ws[0]) // 4))
    return Geometry(warps, _ahead(ws, warps, 2 if blocks else 4), 1, 2)


def _down_geometry(down: Weight, shared: Weight | None, n_used: int) -> DownGeometry:
    """About as many tiles to every warp, and about 16 warps."""
    tiles = col_tiles(down)
    parts = max(1, min(tiles, 16 // n_used))
    parts_shared = 0
    if shared is not None:
        parts_shared = max(1, min(4, round(col_tiles(shared) * parts / tiles)))
    wide = any(w is not None and w.qtype.name in ("F16", "BF16") for w in (down, shared))
    return DownGeometry(parts, parts_shared, 2 if wide else 4)


def _ahead(ws: Sequence[Weight], warps: int, most: int) -> int:
    """Tiles under way to a warp: what it has to do, within registers."""
    if any(w.qtype.name in ("F16", "BF16") for w in ws):
        most //= 2
    return max(1, min(most, -(-max(map(col_tiles, ws)) // warps)))


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
