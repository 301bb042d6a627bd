"""Products of at most MOST tokens on weights in tiles: launches of kernels/matvec*.cu and route.cu.

x, outputs and h are float32 Arrays [n, width] at even offsets and strides; `norm` = (weight, eps)
norms x on the fly. `Weight` is a CudaWeight with tiles; callers ask `takes()` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_geometry import (
    STREAM,
    STREAM_MOST,
    DownGeometry,
    Geometry,
    PieceGeometry,
    StreamGeometry,
    col_tiles,
    ctas_of,
    dense_geometry,
    down_geometry,
    dynamic_shared,
    most_rows,
    pair_geometry,
    piece_bytes,
    piece_down_geometry,
    piece_geometry,
    ring_of,
    row_bytes,
    row_tiles,
)
from mlacli.backends.cuda_group import Mail
from mlacli.loading.tiles import COLS, ROWS

if TYPE_CHECKING:
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


def sends(n: int, *weights: Weight) -> bool:
    """Whether products of n tokens on these can send a rank's partial by themselves."""
    return n == 1 and takes(*weights)


# ---- dense products -------------------------------------------------------------------------


def products(
    ops: Any, segments: Sequence[tuple[Weight, Array | Mail]], x: Array, norm: Norm | None = None,
    add: bool = False, geometry: Geometry | PieceGeometry | None = None,
) -> None:  # fmt: skip
    """out = (normed x) w^T for up to three (w [rows, in], out [n, rows]); `add`: out += it.

    With `add` there is one segment; its out is the residual stream, for example. An only segment
    of one token may go into the mail.
    """
    w, out = segments[0]
    alone = geometry is None and not add and len(segments) == 1
    if alone and isinstance(out, Array) and streams(ops, w, len(x)):
        product_stream(ops, w, out, x, norm)
        return
    alike = len(segments) <= 2 and len({w.qtype for w, _ in segments}) == 1
    if geometry is None and len(x) == 1 and alike:
        total = sum(row_tiles(w.shape[0]) for w, _ in segments)
        geometry = piece_geometry(ops, [w for w, _ in segments[:1]], total)
    if isinstance(geometry, PieceGeometry):
        _product_pieces(ops, segments, x, norm, add, geometry)
        return
    n, blocks = len(x), _blocks(len(x))
    assert 1 <= len(segments) <= 3 and not (len(segments) > 1 and (add or isinstance(out, Mail)))
    ws = [w for w, _ in segments]
    how = geometry or dense_geometry(ops, ws, blocks)
    absent = [None] * (3 - len(segments))
    zeros = [0] * len(absent)
    outs, mail, post = _targets([out for _, out in segments])
    rows = [row_tiles(w.shape[0]) for w in ws]
    ctas = ctas_of(ops, rows, how, 0 if blocks else col_tiles(ws[0]), 1)
    stages, shared = (0, 0) if blocks else ring_of(ops, how, *([w] for w in ws))
    ops.run(
        "products_few", (sum(ctas),), 32 * how.warps, *outs, *absent, *(w.tiles for w in ws),
        *absent, x, _raw(norm), n, ws[0].shape[1], ws[0].skip, *(w.shape[0] for w in ws), *zeros,
        *ctas, *zeros, _read(x), *map(_stride, outs), *zeros, _eps(norm), mail, shared=shared,
        N_ROWS=most_rows(rows, ctas), N_STAGES=stages, N_BLOCKS=blocks, WITH_ADD=int(add),
        WITH_NORM=int(norm is not None), **_columns(ws), **how.defines(), **_types(ws, 3), **post,
    )  # fmt: skip


def streams(ops: Any, w: Weight, n: int) -> bool:
    """Whether product_stream takes a product of n tokens and gains by it."""
    whole = not w.skip and w.shape[-1] == COLS * col_tiles(w)
    stages = STREAM.stages * STREAM.ctas * row_bytes(w)
    return (
        n == 1 and ops.capability >= 90 and whole and row_tiles(w.shape[0]) >= 12 * ops.n_sm
        and stages <= STREAM_MOST and col_tiles(w) >= 2 * STREAM.warps
    )  # fmt: skip


def product_stream(
    ops: Any, w: Weight, y: Array, x: Array, norm: Norm | None = None,
    geometry: StreamGeometry | None = None,
) -> None:  # fmt: skip
    """y [1, rows] = (normed x) w^T of a large weight: see matvec_stream.cu."""
    (rows, n_in), how = w.shape, geometry or STREAM
    tiles = row_tiles(rows)
    ctas = min(tiles, how.ctas * ops.n_sm)
    _read(x)
    ops.run(
        "products_stream", (ctas,), 32 * (how.warps + 1), y, w.tiles, x, _raw(norm), rows, n_in,
        _eps(norm), shared=dynamic_shared(how.stages * row_bytes(w)), N_STAGES=how.stages,
        N_ROWS=-(-tiles // ctas), N_WARPS=how.warps, N_CTAS=how.ctas, N_COL_TILES=col_tiles(w),
        WITH_NORM=int(norm is not None), **_types((w,), 1),
    )  # fmt: skip


def _product_pieces(
    ops: Any, segments: Sequence[tuple[Weight, Array | Mail]], x: Array, norm: Norm | None,
    add: bool, how: PieceGeometry,
) -> None:  # fmt: skip
    """products() of one token and one or two weights of a type: see matvec_pieces.cu."""
    ws, (outs, mail, post) = [w for w, _ in segments], _targets([out for _, out in segments])
    assert len(x) == 1 and len(ws) <= 2 and not ((add or mail is not None) and len(ws) > 1)
    absent = [None] * (2 - len(ws))
    tiles = sum(row_tiles(w.shape[0]) for w in ws)
    ctas = min(tiles, ops.n_sm)
    _read(x)
    ops.run(
        "products_pieces", (ctas,), 32 * (how.warps + 1), *outs, *absent, *(w.tiles for w in ws),
        *absent, x, _raw(norm), *(w.shape[0] for w in ws), *(0 for _ in absent), ws[0].shape[1],
        _eps(norm), mail, shared=_piece_bytes(how, ws[:1]), WITH_ADD=int(add),
        N_ROWS=-(-tiles // ctas), **_pieces(how, ws[0], norm), **_types(ws[:1], 1), **post,
    )  # fmt: skip


def _piece_bytes(how: PieceGeometry, *sets: Sequence[Weight] | None) -> int:
    """Shared memory for the stages: a piece of the largest set of weights that meet in one."""
    return dynamic_shared(how.stages * max(piece_bytes(how, ws) for ws in sets if ws))


def _pieces(how: PieceGeometry, w: Weight, norm: Norm | None) -> dict[str, int]:
    return {"N_STAGES": how.stages, "N_PIECES": how.pieces, "N_WARPS": how.warps,
            "N_COL_TILES": col_tiles(w), "WITH_NORM": int(norm is not None)}  # fmt: skip


def gated(
    ops: Any, gate: Weight, up: Weight, h: Array, x: Array, norm: Norm | None = None,
    geometry: Geometry | PieceGeometry | None = None,
) -> None:  # fmt: skip
    """h = silu(gate x) * up x [n, f]."""
    rows, n_in = gate.shape
    blocks = _blocks(len(x))
    if geometry is None and not blocks:
        geometry = piece_geometry(ops, (gate, up), row_tiles(rows))
    if isinstance(geometry, PieceGeometry):
        ctas = min(row_tiles(rows), ops.n_sm)
        _read(x)
        ops.run(
            "gated_pieces", (ctas,), 32 * (geometry.warps + 1), h,
            gate.tiles, up.tiles, x, _raw(norm), rows, n_in, _eps(norm),
            shared=_piece_bytes(geometry, (gate, up)), GATED=1,
            N_ROWS=-(-row_tiles(rows) // ctas), **_pieces(geometry, gate, norm),
            **_types((gate, up), 2),
        )  # fmt: skip
        return
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
            routing.scale, N_EXPERTS=n_experts, N_AHEAD=1,
        )  # fmt: skip
        return
    ops.run(
        "route_few", (n_experts,), 256, ids, weights, scores, counter, gate.raw, x, _raw(norm),
        biases, pos, imposed, n, gate.shape[1], *choice, _read(x), routing.scale, _eps(norm),
        N_EXPERTS=n_experts, N_AHEAD=min(8, -(-gate.shape[1] // 1024)),
    )  # fmt: skip


def experts_up(
    ops: Any, h: Array, ids: Array, x: Array, gate: Weight, up: Weight | None = None,
    shared: tuple[Weight, Weight] | None = None, norm: Norm | None = None,
    geometry: Geometry | PieceGeometry | None = None,
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
    tiles = [row_tiles(fs), n_used * row_tiles(f)]
    if geometry is None and n == 1 and up_row % ROWS == 0 and n_used <= 32:
        geometry = piece_geometry(ops, (gate, up_w), sum(tiles), shared or ())
    shared_tiles = (None, None) if shared is None else (shared[0].tiles, shared[1].tiles)
    types = _types((gate, up_w, *(shared or ())), 4)
    if isinstance(geometry, PieceGeometry):
        count = min(sum(tiles), ops.n_sm)
        ops.run(
            "experts_up_pieces", (count,), 32 * (geometry.warps + 1), h, gate.tiles, up_w.tiles,
            *shared_tiles, x, _raw(norm), ids, n_used, d, f, fs, row_tiles(gate.shape[1]),
            row_tiles(up_w.shape[1]), up_row, gate.first, held, _eps(norm), EXPERTS_UP=1,
            shared=_piece_bytes(geometry, (gate, up_w), shared), N_ROWS=-(-sum(tiles) // count),
            **_pieces(geometry, gate, norm), **types,
        )  # fmt: skip
        return
    how = geometry or pair_geometry(ops, n_used * f + fs, (gate, up_w), 0)
    ctas = ctas_of(ops, tiles, how, col_tiles(gate), 3 if up_row % ROWS else 2)
    sets: list[Sequence[Weight]] = [(gate, up_w, up_w) if up_row % ROWS else (gate, up_w)]
    stages, ring = ring_of(ops, how, *sets, *([shared] if shared else []))
    ops.run(
        "experts_up_few", (sum(ctas), n), 32 * how.warps, h, gate.tiles, up_w.tiles, *shared_tiles,
        x, _raw(norm), ids, n_used, d, f, fs, row_tiles(gate.shape[1]), row_tiles(up_w.shape[1]),
        up_row, gate.first, held, ctas[0], _read(x), _stride(h), _eps(norm), EXPERTS_UP=1,
        N_ROWS=most_rows(tiles, ctas), N_STAGES=stages, shared=ring, UP_SHIFT=up_row % ROWS,
        WITH_NORM=int(norm is not None), **_columns((gate, up_w, *(shared or ()))), **how.defines(),
        **types,
    )  # fmt: skip


def experts_down(
    ops: Any, y: Array | Mail, h: Array, ids: Array, weights: Array, down: Weight,
    shared: Weight | None = None, add: bool = False, after_up: bool = False,
    geometry: DownGeometry | PieceGeometry | None = None,
) -> None:  # fmt: skip
    """y [n, d] = sum over slots of weights * down_e h, and the shared expert's; `add`: y += it.

    One token's may go into the mail. `after_up`: the launch before this one on the stream is
    experts_up's.
    """
    (n, n_used), (held, d, f) = ids.shape, down.shape
    both = (down,) if shared is None else (down, shared)
    fs = 0 if shared is None else shared.shape[1]
    (out,), mail, post = _targets([y])
    if geometry is None and n == 1:
        geometry = piece_down_geometry(ops, down, shared, n_used)
    if isinstance(geometry, PieceGeometry):
        ctas = min(row_tiles(d), ops.n_sm)
        ops.run(
            "experts_down_pieces", (ctas,), 32 * (geometry.warps + 1), out, down.tiles,
            None if shared is None else shared.tiles, h, ids, weights, d, down.first, held, mail,
            shared=_piece_bytes(geometry, (down,), None if shared is None else (shared,)),
            EXPERTS_DOWN=1, WITH_ADD=int(add), AFTER_UP=int(after_up), N_USED=n_used,
            N_SHARED=geometry.pieces - n_used, N_WARPS=geometry.warps, N_STAGES=geometry.stages,
            N_ROWS=-(-row_tiles(d) // ctas), N_COL_TILES=col_tiles(down), **_types(both, 2), **post,
        )  # fmt: skip
        return
    how = geometry or down_geometry(down, shared, n_used)
    ragged = any(w.skip or w.shape[-1] != COLS * col_tiles(w) for w in both)
    ops.run(
        "experts_down_few", (row_tiles(d), n), 32 * how.warps(n_used), out, down.tiles,
        None if shared is None else shared.tiles, h, ids, weights, d, f, fs, down.skip,
        0 if shared is None else shared.skip, down.first, held, _read(h), _stride(out), mail,
        EXPERTS_DOWN=1, WITH_ADD=int(add), AFTER_UP=int(after_up), N_USED=n_used,
        N_PARTS=how.parts, N_PARTS_SHARED=how.parts_shared, N_AHEAD=how.ahead, N_CTAS=how.ctas,
        N_COL_TILES=col_tiles(down), N_COL_TILES_SHARED=0 if shared is None else col_tiles(shared),
        AT_EDGE=int(ragged), **_types(both, 2), **post,
    )  # fmt: skip


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


def _targets(
    outs: Sequence[Array | Mail],
) -> tuple[list[Array | None], Array | None, dict[str, int]]:
    """Arrays to write, the words to send by, and the defines of that."""
    first = outs[0]
    if isinstance(first, Mail):
        return [None], first.words, {"SEND_TO": first.n_gpus}
    return [out for out in outs if isinstance(out, Array)], None, {}


def _stride(x: Array | None) -> int:
    """Elements from one token to the next."""
    return 0 if x is None else x.stride(0)


def _read(x: Array) -> int:
    """_stride of an input: it is read two floats at a time."""
    stride = x.stride(0)
    assert x.ptr % 8 == 0 and (stride % 2 == 0 or len(x) == 1), "rows start at even offsets"
    return stride
