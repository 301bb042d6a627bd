"""Launch geometry of the few-token kernels: warps, CTAs, tiles under way, shared memory.

Measured on one H200, 2026-11-22 (kernels/README.md). Launches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlacli.loading.tiles import COLS, ROWS, packed_columns, tiled_shape

Weight = Any
STAGED = 160  # column tiles of x that fit shared memory as fragments (OneStaged)
_X_TILE = 272  # bytes of a column tile's fragments of x (OneX)
_SHARED = 46 << 10  # bytes of static shared memory
_DYNAMIC = {80: 163, 87: 163, 90: 227, 100: 227}  # KB of shared memory of a CTA, by capability


@dataclass(frozen=True, slots=True)
class Geometry:
    """Warps of a CTA, column tiles under way to each, CTAs an SM must hold, CTAs per SM, stages.

    per_sm 0: a CTA per row tile; else that many share all row tiles. stages: batches of `ahead`
    tiles that are on their way through shared memory; 0: one, through registers.
    """

    warps: int = 8
    ahead: int = 4
    ctas: int = 1
    per_sm: int = 0
    stages: int = 0

    def defines(self) -> dict[str, int]:
        return {"N_WARPS": self.warps, "N_AHEAD": self.ahead, "N_CTAS": self.ctas}


@dataclass(frozen=True, slots=True)
class DownGeometry:
    """Warps of a slot and of the shared expert; the rest as in Geometry."""

    parts: int
    parts_shared: int
    ahead: int = 4
    ctas: int = 1

    def warps(self, n_used: int) -> int:
        return n_used * self.parts + self.parts_shared


@dataclass(frozen=True, slots=True)
class StreamGeometry:
    """Warps of a CTA that multiply, CTAs an SM holds, row tiles under way to each."""

    warps: int
    ctas: int
    stages: int


@dataclass(frozen=True, slots=True)
class PieceGeometry:
    """Warps of a CTA that multiply, pieces of a row tile, pieces under way to each CTA.

    tiles: column tiles of a piece.
    """

    warps: int
    pieces: int
    stages: int
    tiles: int


STREAM = StreamGeometry(8, 2, 3)
STREAM_MOST = 190 << 10  # bytes of shared memory for all stages of an SM
WIDE = range(96, 321)  # column tiles of weights that come in pieces
_PIECE = 40 << 10  # bytes of a piece at most, of all weights that meet in it
_PIECE_RING = 100 << 10  # bytes under way to an SM: twice as many were slower (kernels/README.md)
_PIECE_MOST = 224 << 10  # bytes of shared memory of a CTA that has an SM for itself
# Types of so few bits that instructions count, not bytes: more warps, a ring (kernels/README.md).
_FEW_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
_PIECE_X = 180  # fragments of x in an SM's warps, the one that asks included: more spill


def col_tiles(w: Weight) -> int:
    return packed_columns(w.shape[-1], w.qtype, w.skip) // COLS


def row_tiles(rows: int) -> int:
    return -(-rows // ROWS)


# ---- choices -------------------------------------------------------------------------------


def ctas_of(
    ops: Any, tiles: Sequence[int], how: Geometry, n_col_tiles: int, streams: int
) -> list[int]:
    """CTAs for each of several lists of row tiles; n_col_tiles 0: several tokens."""
    total, most = sum(tiles), how.per_sm * ops.n_sm
    if not most or not 0 < n_col_tiles <= STAGED or total <= most:
        return list(tiles)
    sums = 64 * how.warps * streams  # bytes of a row tile's
    per_cta = max(1, (_SHARED - _X_TILE * n_col_tiles - 64 * how.warps) // sums)
    most = max(most, -(-total // per_cta))
    return [max(1, t * most // total) if t else 0 for t in tiles]


def most_rows(tiles: Sequence[int], ctas: Sequence[int]) -> int:
    """Row tiles that a CTA has at most."""
    return max(-(-t // c) for t, c in zip(tiles, ctas, strict=True) if t)


def dense_geometry(ops: Any, ws: Sequence[Weight], blocks: int) -> Geometry:
    """Four column tiles a warp, all fetched at once; many row tiles go through the ring."""
    tiles = col_tiles(ws[0])
    if blocks:
        return Geometry(8, ahead_of(ws, 8, 4))
    if tiles <= STAGED and sum(row_tiles(w.shape[0]) for w in ws) >= 12 * ops.n_sm:
        warps = max(1, min(8, tiles // 4))
        return Geometry(warps, ahead_of(ws, warps, 4), 2, 2, 2)
    warps = max(1, tiles // 4 if tiles <= 80 else min(16, tiles // 8))
    total = sum(row_tiles(w.shape[0]) for w in ws)
    if _few_bits(*ws) and tiles <= 112:
        if total >= 3 * ops.n_sm and tiles <= 32:
            return Geometry(warps, ahead_of(ws, warps, 4), 1, max(1, 12 // warps), 2)
        if total <= ops.n_sm and tiles > 80:  # a row tile a CTA, all of it under way
            return Geometry(16, ahead_of(ws, 16, 7), 1, 1)
        if total <= ops.n_sm and tiles <= 32:
            warps = max(1, tiles // 2)
    if 128 < tiles <= STAGED:
        warps = 12  # x of so many columns is staged by all of an SM's warps together
    return Geometry(warps, ahead_of(ws, warps, 4), 1, max(1, 12 // warps))


def pair_geometry(ops: Any, rows: int, ws: Sequence[Weight], blocks: int) -> Geometry:
    warps = max(1, min(8, col_tiles(ws[0]) // 4))
    if blocks:
        return Geometry(warps, ahead_of(ws, warps, 2))
    tiles = col_tiles(ws[0])
    if 80 <= tiles <= 128 and row_tiles(rows) <= 6 * ops.n_sm:  # as many sums fit beside x
        return Geometry(tiles // 8, ahead_of(ws, tiles // 8, 4), 1, 1)
    if _few_bits(*ws) and warps == 8:
        return Geometry(8, ahead_of(ws, 8, 4), 1, 1)
    return Geometry(warps, ahead_of(ws, warps, 4), 2 if warps > 4 else 1, max(1, 16 // warps))


def down_geometry(down: Weight, shared: Weight | None, n_used: int) -> DownGeometry:
    """About as many tiles to every warp, and about 16 warps."""
    tiles = col_tiles(down)
    if n_used >= 8 and tiles >= 12:
        return DownGeometry(1, int(shared is not None), 2 if _wide(down, shared) else 4, 2)
    parts = max(1, min(tiles, round(16 / (n_used + 1))))
    parts_shared = 0
    if shared is not None:
        parts_shared = max(1, min(4, round(col_tiles(shared) * parts / tiles)))
    assert n_used * parts + parts_shared <= 32, "more experts a token than warps a CTA"
    return DownGeometry(parts, parts_shared, 2 if _wide(down, shared) else 4)


def _wide(*ws: Weight | None) -> bool:
    return any(w is not None and w.qtype.name in ("F16", "BF16") for w in ws)


def _few_bits(*ws: Weight) -> bool:
    return all(w.qtype.name in _FEW_BITS for w in ws)


def ahead_of(ws: Sequence[Weight], warps: int, most: int) -> int:
    """Tiles under way to a warp: what it has to do, within registers."""
    if any(w.qtype.name in ("F16", "BF16") for w in ws):
        most //= 2
    return max(1, min(most, -(-max(map(col_tiles, ws)) // warps)))


def piece_geometry(
    ops: Any, ws: Sequence[Weight], n_row_tiles: int, others: Sequence[Weight] = ()
) -> PieceGeometry | None:
    """For one token times wide weights that meet the same columns; None: not by pieces.

    others: row tiles of these come instead of those of `ws`.
    """
    tiles, every = col_tiles(ws[0]), (*ws, *others)
    whole = all(_is_whole(w) and tiles == col_tiles(w) for w in every)
    if ops.capability < 90 or not whole or tiles not in WIDE or n_row_tiles < ops.n_sm:
        return None
    unit = 4 if any(w.qtype.block == 256 for w in every) else 1
    nbytes = max(row_bytes(*ws), row_bytes(*others))
    sizes = (p for p in range(1, tiles + 1) if tiles % (p * unit) == 0 and nbytes // p <= _PIECE)
    pieces = next(sizes, 0)
    if not pieces:
        return None
    wide = tiles // pieces
    warps = next(w for w in range(min(16, wide), 0, -1) if wide % w == 0)
    most = -(-n_row_tiles // ops.n_sm)  # row tiles of a CTA
    stages = _PIECE_RING // (nbytes // pieces)
    if _spills(warps, pieces, wide):
        return None
    if warps < 8 or stages < 2 or _PIECE_RING + 64 * warps * len(ws) * most + 1024 > _PIECE_MOST:
        return None
    return PieceGeometry(warps, pieces, min(stages, pieces * most), wide)


def piece_down_geometry(
    ops: Any, down: Weight, shared: Weight | None, n_used: int
) -> PieceGeometry | None:
    """Of the routed experts' down projections, a slot a piece; None: not by pieces."""
    tiles, n = col_tiles(down), 0 if shared is None else col_tiles(shared)
    ws = [w for w in (down, shared) if w is not None]
    whole = all(map(_is_whole, ws)) and n % tiles == 0
    blocked = any(w.qtype.block == 256 for w in ws) and tiles % 4
    n_row_tiles, pieces = row_tiles(down.shape[1]), n_used + n // tiles
    if ops.capability < 90 or not whole or blocked or pieces * tiles not in WIDE or n_used > 32:
        return None
    if n_row_tiles < ops.n_sm:
        return None
    warps = next(w for w in range(min(8, tiles), 0, -1) if tiles % w == 0)
    if _spills(warps, pieces, tiles):
        return None
    how = PieceGeometry(warps, pieces, 1, tiles)
    stages = _PIECE_RING // max(piece_bytes(how, [w]) for w in ws)
    return PieceGeometry(warps, pieces, stages, tiles) if warps >= 8 and stages >= 2 else None


def piece_bytes(how: PieceGeometry, ws: Sequence[Weight]) -> int:
    """Bytes of a piece of each of `ws`."""
    return sum(_batch_bytes(w, how.tiles, how.tiles % 4 == 0) for w in ws)


def _spills(warps: int, pieces: int, tiles: int) -> bool:
    """A warp keeps its part of x for all pieces: past its registers it goes through L2."""
    return pieces * -(-tiles // warps) * (warps + 1) > _PIECE_X


def _is_whole(w: Weight) -> bool:
    """Its columns are its own, and on the device: bulk copies over the link are untried."""
    return not w.skip and w.block is None and bool(w.shape[-1] == COLS * col_tiles(w))


# ---- shared memory -------------------------------------------------------------------------


def ring_of(ops: Any, how: Geometry, *streams: Sequence[Weight]) -> tuple[int, int]:
    """(stages, bytes of the CTA's ring): of the largest set of weights that are read together."""
    tiles = col_tiles(streams[0][0])
    if not how.stages or tiles > STAGED:
        return 0, 0
    most = -(-tiles // how.warps)
    depth = min(how.ahead, most)
    whole_blocks = tiles % how.warps == 0 and most % 4 == 0 and depth % 4 == 0
    stage = max(sum(_batch_bytes(w, depth, whole_blocks) for w in ws) for ws in streams)
    return _dynamic(ops, how.stages, how.warps * how.stages * stage)


def row_bytes(*ws: Weight) -> int:
    """Bytes of a row tile of each."""
    return sum(_batch_bytes(w, col_tiles(w), col_tiles(w) % 4 == 0) for w in ws)


def dynamic_shared(nbytes: int) -> int:
    """What to ask for: only a request of more than 48 KB raises the limit."""
    return max(nbytes, (48 << 10) + 16) if nbytes > 40 << 10 else nbytes


def _dynamic(ops: Any, stages: int, nbytes: int) -> tuple[int, int]:
    """(stages, dynamic shared memory to ask for), (0, 0) where the device has too little.

    Beside static memory 48 KB are soon full, and only a request of more raises the limit.
    """
    most = _DYNAMIC.get(ops.capability, 99 if ops.capability >= 80 else 0) << 10
    if nbytes + _SHARED > most:
        return 0, 0
    return stages, max(nbytes, (48 << 10) + 16) if nbytes > 16 << 10 else nbytes


def _batch_bytes(w: Weight, depth: int, whole_blocks: bool) -> int:
    """Bytes of `depth` column tiles of a row tile, as matvec_ring.cuh lays them out."""
    planes = tiled_shape((ROWS, 4 * COLS), w.qtype).planes
    blocks = depth // 4 if whole_blocks else (depth + 6) // 4
    return depth * sum(planes[name][1] for name in "qhsm") // 4 + blocks * planes["d"][1]
