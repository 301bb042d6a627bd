"""Which weights a CUDA rank keeps in tiles, and the bytes of each plane; plain arithmetic.

A tile is 16 rows x 64 columns; kernels/include/tile_layout.cuh says what lies where in it. The plan
prices a CUDA rank's weights with `device_bytes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlacli.loading.quant_types import QType

ROWS, COLS = 16, 64
HEADER = 256  # bytes before the first plane
_ALIGN = 256  # of every plane


@dataclass(frozen=True, slots=True)
class TileBytes:
    """Bytes that each plane takes: of q, h, s, m in a tile, of d in 16 rows x 256 columns."""

    q: int
    h: int = 0
    s: int = 64
    m: int = 0
    d: int = 0


_TILES = {
    "F16": TileBytes(2048, s=0), "BF16": TileBytes(2048, s=0),
    "Q4_0": TileBytes(512), "Q4_1": TileBytes(512, m=64),
    "Q5_0": TileBytes(512, h=128), "Q5_1": TileBytes(512, h=128, m=64),
    "Q8_0": TileBytes(1024), "IQ4_NL": TileBytes(512), "MXFP4": TileBytes(512),
    "Q4_K": TileBytes(512, d=64), "Q5_K": TileBytes(512, h=128, d=64),
    "Q6_K": TileBytes(512, h=256, d=32), "IQ4_XS": TileBytes(512, d=32),
    "Q2_K": TileBytes(256, d=64), "Q3_K": TileBytes(256, h=128, d=32),
    "IQ3_XXS": TileBytes(512, d=32), "IQ3_S": TileBytes(512, d=32),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M"), TileBytes(256, h=128, d=32)),
    "IQ1_S": TileBytes(256, d=32),
}  # fmt: skip


# Types whose tiles take a third more than their blocks in the file, to more than twice as much.
GROWN = ("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")


@dataclass(frozen=True, slots=True)
class TiledShape:
    """Tiles of a weight [*leading, rows, columns] and where its planes begin in its buffer."""

    lead: int  # product of the leading axes
    n_row_tiles: int  # of one leading index
    n_col_tiles: int
    planes: dict[str, tuple[int, int]]  # name -> (offset, bytes), in the order of the buffer
    nbytes: int

    @property
    def all_row_tiles(self) -> int:
        return self.lead * self.n_row_tiles


def is_tiled(tensor: str, shape: tuple[int, ...], qtype: QType) -> bool:
    """Whether CUDA keeps the tensor in tiles: products do; embeddings are looked up by row.

    Routers don't either: their products stay in float32 whatever their type, as a rounded score
    can choose another expert.
    """
    plain = tensor == "token_embd.weight" or tensor.endswith(".ffn_gate_inp.weight")
    return len(shape) > 1 and qtype.name in _TILES and not plain


def packed_columns(n_in: int, qtype: QType, skip: int = 0) -> int:
    """Columns that the tiles of a row hold: `skip` of the first block are another rank's."""
    edge = max(COLS, qtype.block)
    return -(-(skip + n_in) // edge) * edge


def tiled_shape(shape: tuple[int, ...], qtype: QType, skip: int = 0) -> TiledShape:
    """The planes of a weight of local `shape`."""
    lead, rows = math.prod(shape[:-2]), -(-shape[-2] // ROWS)
    cols = packed_columns(shape[-1], qtype, skip) // COLS
    tile, planes, at = _TILES[qtype.name], {}, HEADER
    for name in "qhsmd":
        n_pieces = lead * rows * (cols // 4 if name == "d" else cols)
        nbytes = n_pieces * getattr(tile, name)
        planes[name] = at, nbytes
        at += -(-nbytes // _ALIGN) * _ALIGN
    return TiledShape(lead, rows, cols, planes, at)
