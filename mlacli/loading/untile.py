"""GGUF bytes out of a CUDA rank's tiles: the inverse of kernels/repack.cu, for --check-tensors.

Where a plane keeps what is said in kernels/include/tile_layout.cuh.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlacli.loading import untile_rare as rare
from mlacli.loading.quant_types import QType
from mlacli.loading.tiles import TiledShape, tiled_shape

Bytes = NDArray[np.uint8]
Words = NDArray[Any]
_CHUNK = 1 << 20  # values rebuilt at a time
_U4 = np.dtype(np.uint32)


def has_foreign_groups(n_in: int, qtype: QType, skip: int) -> bool:
    """Whether a row's blocks hold columns of other ranks, whose scales the tiles don't keep."""
    return skip > 0 or (skip + n_in) % qtype.block > 0


def edge_blocks(raw: Any, qtype: QType) -> Bytes:
    """First and last block of every row [..., 2, bytes]: where untile() finds foreign scales."""
    return np.stack(
        [np.asarray(raw[..., : qtype.nbytes]), np.asarray(raw[..., -qtype.nbytes :])], -2
    )


def untile(
    buffer: Bytes, shape: tuple[int, ...], qtype: QType, skip: int, edges: Bytes | None = None
) -> Bytes:
    """Rows [*leading, rows, bytes] of a weight of local `shape` from its buffer in tiles.

    Scales of groups that are another rank's come from `edges`.
    """
    tiles, rows = tiled_shape(shape, qtype, skip), shape[-2]
    row_bytes = qtype.row_bytes(skip + shape[-1])
    out = np.empty((tiles.all_row_tiles, 16, row_bytes), np.uint8)
    step = max(1, _CHUNK // (1024 * tiles.n_col_tiles))

    def rebuild(first: int) -> None:
        some = slice(first, min(first + step, tiles.all_row_tiles))
        out[some] = _rows(buffer, tiles, qtype, some, skip, shape[-1], row_bytes)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy lets go of the GIL
        list(pool.map(rebuild, range(0, tiles.all_row_tiles, step)))
    raw = out.reshape(tiles.lead, -1, row_bytes)[:, :rows].reshape(*shape[:-1], row_bytes)
    if edges is not None:
        _restore_foreign(raw, edges, shape[-1], qtype, skip)
    return raw


def _rows(
    buffer: Bytes, tiles: TiledShape, qtype: QType, some: slice, skip: int, n_in: int,
    row_bytes: int,
) -> Bytes:  # fmt: skip
    """All rows of some row tiles: [row tile, 16, bytes]."""
    n = some.stop - some.start

    def plane(name: str, dtype: Any) -> Words:
        at, nbytes = tiles.planes[name]
        whole = buffer[at : at + nbytes].reshape(tiles.all_row_tiles, -1)
        return np.ascontiguousarray(whole[some]).view(dtype)

    if qtype.block == 1:
        lanes = plane("q", np.uint16).reshape(n, -1, 4, 8, 4, 2, 2, 2)
        # row tile, column tile, step, g, t, column >= 8, row >= 8, half
        rows = lanes.transpose(0, 6, 3, 1, 2, 5, 4, 7).reshape(n, 16, -1)
        return np.ascontiguousarray(rows[..., :n_in]).view(np.uint8)
    numbers = _numbers(plane, tiles, qtype, n)
    n_blocks = row_bytes // qtype.nbytes
    numbers = numbers[..., : n_blocks * qtype.block].reshape(n, 16, n_blocks, qtype.block)
    blocks = np.zeros((n, 16, n_blocks, qtype.nbytes), np.uint8)

    def by_row(name: str, dtype: Any) -> Words:
        """[row tile, g, row >= 8] of every piece -> [row tile, row, piece]."""
        words = plane(name, dtype).reshape(n, -1, 8, 2)
        return words.transpose(0, 3, 2, 1).reshape(n, 16, -1)

    def groups(words: Words, shifts: tuple[int, ...], mask: int) -> Words:
        """Fields of each tile's word -> [row tile, row, block, group]."""
        fields = words[..., None] >> np.array(shifts, np.uint32) & mask
        n_groups = n_blocks * qtype.block * len(shifts) // 64
        return fields.reshape(n, 16, -1)[..., :n_groups].reshape(n, 16, n_blocks, -1)

    s = by_row("s", _U4)
    if qtype.block == 32:
        codes = groups(s, (0, 16), 0xFFFF)[..., 0]
        if qtype.name == "MXFP4":  # bfloat16 of 2^(e - 128)
            blocks[..., 0] = np.where(codes < 0x80, codes >> 6, (codes >> 7) + 1)
        else:
            blocks[..., :2] = codes.astype(np.uint16)[..., None].view(np.uint8)
        if tiles.planes["m"][1]:
            minima = groups(by_row("m", _U4), (0, 16), 0xFFFF)[..., 0]
            blocks[..., 2:4] = minima.astype(np.uint16)[..., None].view(np.uint8)
    elif qtype.name == "Q6_K":
        blocks[..., 192:208] = groups(s, (0, 8, 16, 24), 0xFF)
        blocks[..., 208:] = by_row("d", np.uint16)[..., None].view(np.uint8)
    elif qtype.name in rare.PACKERS:
        width = 16 if qtype.name in rare.THIN else 32
        codes = groups(s, (0, 8, 16, 24) if width == 16 else (0, 8), 0xFF)
        column = np.arange(0, 256 * n_blocks, width).reshape(n_blocks, -1)
        own = (column >= skip) & (column < skip + n_in)
        rare.put_scales(qtype.name, blocks, rare.codes_of(qtype.name, codes, own))
        rare.put_d(qtype.name, blocks, by_row("d", _U4 if qtype.name == "Q2_K" else np.uint16))
    elif qtype.name == "IQ4_XS":
        codes = (groups(s, (0, 8), 0xFF) + 32) & 0xFF
        column = np.arange(0, 256 * n_blocks, 32).reshape(n_blocks, 8)
        codes[..., (column < skip) | (column >= skip + n_in)] = 0
        blocks[..., 2:8] = _iq4_xs_scales(codes)
        blocks[..., :2] = by_row("d", np.uint16)[..., None].view(np.uint8)
    else:
        blocks[..., 4:16] = _k_scales(groups(s, (0, 8), 0xFF), groups(s, (16, 24), 0xFF))
        blocks[..., :4] = by_row("d", _U4)[..., None].view(np.uint8)
    _PACKERS[qtype.name](numbers, blocks)
    return blocks.reshape(n, 16, row_bytes)


def _numbers(plane: Any, tiles: TiledShape, qtype: QType, n: int) -> Bytes:
    """Stored numbers [row tile, 16, packed columns]."""
    if qtype.name == "Q8_0":
        lanes = plane("q", np.uint8).reshape(n, -1, 2, 8, 4, 2, 2, 2, 2)
        # row tile, column tile, steps, g, t, step, column >= 8, half, row >= 8
        rows: Bytes = lanes.transpose(0, 8, 3, 1, 2, 5, 6, 4, 7).reshape(n, 16, -1)
        return rows
    thin = qtype.name in rare.THIN
    # row tile, column tile, g, t, step (two steps a word of thin planes)
    q = plane("q", _U4).reshape(n, -1, 8, 4, 2 if thin else 4)
    n_tiles = tiles.all_row_tiles * tiles.n_col_tiles
    high_bytes = tiles.planes["h"][1] // max(1, n_tiles)
    h = None
    if high_bytes:
        h = plane("h", _U4).reshape(n, -1, 8, 4, high_bytes // 128)
    out = np.empty((n, 2, 8, q.shape[1], 4, 2, 4, 2), np.uint8)
    # axes of out: row tile, row >= 8, g, column tile, step, column >= 8, t, half
    for i in range(4):
        for half in range(2):
            if thin:
                steps = [rare.thin_numbers(qtype.name, q, h, j, i, half) for j in range(4)]
                value = np.stack(steps, -1)
                out[:, i & 1, :, :, :, i >> 1, :, half] = value.transpose(0, 2, 1, 4, 3)
                continue
            value = q >> np.uint32(4 * i + 16 * half) & 15
            if h is not None and high_bytes == 128:
                at = 4 * np.arange(4, dtype=np.uint32) + i + 16 * half
                value |= (h >> at & 1) << 4
            elif h is not None:
                at = 8 * np.arange(2, dtype=np.uint32) + 2 * i + 16 * half
                value |= (h[..., None] >> at & 3).reshape(value.shape) << 4
            out[:, i & 1, :, :, :, i >> 1, :, half] = value.transpose(0, 2, 1, 4, 3)
    return out.reshape(n, 16, -1)


# ---- scales ---------------------------------------------------------------------------------


def _k_scales(scales: Words, minima: Words) -> Bytes:
    """Q4_K's and Q5_K's 12 bytes of eight six-bit scales and eight minima."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    first = s[..., :4] | s[..., 4:] >> 4 << 6
    second = m[..., :4] | m[..., 4:] >> 4 << 6
    third = (s[..., 4:] & 15) | m[..., 4:] << 4
    return np.concatenate([first, second, third], axis=-1)


def _iq4_xs_scales(codes: Words) -> Bytes:
    """IQ4_XS's 6 bytes of eight six-bit scales: top bits, then low nibbles."""
    high = (codes >> 4 << np.arange(0, 16, 2, dtype=np.uint32)).sum(-1).astype(np.uint16)
    low = ((codes[..., ::2] & 15) | (codes[..., 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate([high[..., None].view(np.uint8), low], axis=-1)


def _restore_foreign(raw: Bytes, edges: Bytes, n_in: int, qtype: QType, skip: int) -> None:
    """Puts the scales of groups that are another rank's into the first and the last block."""
    blocks = raw.reshape(*raw.shape[:-1], -1, qtype.nbytes)
    n_blocks = blocks.shape[-2]
    for edge, block in ((0, 0), (1, n_blocks - 1)):
        width = 16 if qtype.name == "Q6_K" or qtype.name in rare.THIN else 32
        column = 256 * block + np.arange(0, 256, width)
        foreign = ((column < skip) | (column >= skip + n_in)) * np.uint8(255)
        mask = np.zeros(qtype.nbytes, np.uint8)
        if qtype.name == "Q6_K":
            mask[192:208] = foreign
        elif qtype.name in rare.PACKERS:
            rare.put_scales(qtype.name, mask, foreign & rare.most_code(qtype.name))
        elif qtype.name == "IQ4_XS":
            mask[2:8] = _iq4_xs_scales(foreign & 63)
        else:
            mask[4:16] = _k_scales(foreign & 63, foreign & 63)
        blocks[..., block, :] |= edges[..., edge, :] & mask


# ---- numbers into blocks --------------------------------------------------------------------


def _nibbles(numbers: Bytes) -> Bytes:
    """32 numbers: the low nibbles of 16 bytes, then the high ones."""
    n: Bytes = np.bitwise_or(numbers[..., :16] & 15, numbers[..., 16:] << 4, dtype=np.uint8)
    return n


def _fifth_bits(numbers: Bytes) -> Bytes:
    return np.packbits(numbers >> 4, axis=-1, bitorder="little")


def _pack_4(at: int, at_high: int = 0) -> Any:
    def pack(numbers: Bytes, blocks: Bytes) -> None:
        blocks[..., at:] = _nibbles(numbers)
        if at_high:
            blocks[..., at_high:at] = _fifth_bits(numbers)

    return pack


def _pack_8(numbers: Bytes, blocks: Bytes) -> None:
    blocks[..., 2:] = numbers


def _pack_q4_k(numbers: Bytes, blocks: Bytes) -> None:
    n = numbers.reshape(*numbers.shape[:-1], 4, 2, 32)
    low = (n[..., 0, :] & 15) | n[..., 1, :] << 4
    blocks[..., -128:] = low.reshape(*numbers.shape[:-1], 128)


def _pack_q5_k(numbers: Bytes, blocks: Bytes) -> None:
    _pack_q4_k(numbers, blocks)
    fifth = numbers.reshape(*numbers.shape[:-1], 8, 32) >> 4
    blocks[..., 16:48] = np.packbits(fifth, axis=-2, bitorder="little")[..., 0, :]


def _pack_q6_k(numbers: Bytes, blocks: Bytes) -> None:
    n = numbers.reshape(*numbers.shape[:-1], 2, 4, 32)
    low = (n[..., :2, :] & 15) | n[..., 2:, :] << 4
    top = n >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]
    blocks[..., :128] = low.reshape(*numbers.shape[:-1], 128)
    blocks[..., 128:192] = np.bitwise_or.reduce(top, axis=-2).reshape(*numbers.shape[:-1], 64)


def _pack_iq4_xs(numbers: Bytes, blocks: Bytes) -> None:
    n = numbers.reshape(*numbers.shape[:-1], 8, 32)
    blocks[..., 8:] = _nibbles(n).reshape(*numbers.shape[:-1], 128)


_PACKERS = {
    "Q4_0": _pack_4(2), "Q4_1": _pack_4(4), "Q5_0": _pack_4(6, 2), "Q5_1": _pack_4(8, 4),
    "Q8_0": _pack_8, "IQ4_NL": _pack_4(2), "MXFP4": _pack_4(1), "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k, "Q6_K": _pack_q6_k, "IQ4_XS": _pack_iq4_xs,
    **rare.PACKERS,
}  # fmt: skip
