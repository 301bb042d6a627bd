"""untile.py's part for Q2_K, Q3_K, IQ1, IQ2 and IQ3: numbers and scales back into GGUF blocks.

Numbers of the IQ types are places in a map (NumberMap in kernels/include/tiles.cuh); the codebook's
index is looked up by the values that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import gguf.quants
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]

THIN = ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")  # a plane q of two bits
ODD = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # scales 1 + 2 code


def thin_numbers(name: str, q: Codes, h: Codes | None, j: int, i: int, half: int) -> Codes:
    """The numbers of register i, half `half`, step j; q [..., 2], h [..., 1] words of lanes."""
    at = 16 * (i & 1) + 4 * (i >> 1) + 8 * half if name.startswith("IQ2") else 4 * i + 16 * half
    value = q[..., j >> 1] >> np.uint32(at + 2 * (j & 1)) & 3
    if h is None:
        return value
    third = h[..., 0] >> np.uint32(at + j) & 1
    return value | (third ^ 1 if name == "IQ1_M" else third) << 2


# ---- scales ---------------------------------------------------------------------------------


def put_scales(name: str, blocks: Bytes, codes: Codes) -> None:
    """ORs a block's scale codes [..., 16] (IQ3: [..., 8]) into blocks [..., bytes]."""
    c = codes.astype(np.uint8)
    if name == "Q2_K":
        blocks[..., :16] |= c
    elif name == "Q3_K":
        blocks[..., 96:104] |= (c[..., :8] & 15) | (c[..., 8:] & 15) << 4
        high = c.reshape(*c.shape[:-1], 4, 4) >> 4 << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        blocks[..., 104:108] |= np.bitwise_or.reduce(high, axis=-2)
    elif name == "IQ2_XXS":
        blocks[..., 9:66:8] |= c[..., ::2] << 4
    elif name == "IQ3_XXS":
        blocks[..., 69:98:4] |= c << 4
    elif name == "IQ1_S":
        blocks[..., 35:50:2] |= c[..., ::2] << 4
    elif name == "IQ1_M":
        threes = codes.reshape(*codes.shape[:-1], 4, 4).astype(np.uint16)
        words = np.bitwise_or.reduce(threes << np.arange(0, 12, 3, dtype=np.uint16), axis=-1)
        blocks[..., 48:] |= words.view(np.uint8)
    else:  # nibbles at the end
        n = c.shape[-1] // 2
        blocks[..., -n:] |= c[..., ::2] | c[..., 1::2] << 4


def most_code(name: str) -> int:
    """All bits of a scale's code."""
    return {"Q2_K": 255, "Q3_K": 63, "IQ1_M": 7}.get(name, 15)


def codes_of(name: str, stored: Codes, own: Codes) -> Codes:
    """The file's codes of scales as the tiles store them; 0 where the columns aren't `own`."""
    if name == "Q2_K":
        return stored
    codes = stored >> 1 if name in ODD else (stored + 32) & 0xFF
    if name == "IQ1_S":  # delta's sign on top
        codes = (stored >> 1 & 7) | (stored >> 4 == 9) * 8
    return np.where(own, codes, 0)


def put_d(name: str, blocks: Bytes, d: Codes) -> None:
    """ORs d (Q2_K: d and dmin) [...] into blocks."""
    if name == "IQ1_M":
        tops = d[..., None] >> np.arange(0, 16, 4, dtype=np.uint16) << np.uint16(12)
        blocks[..., 48:] |= tops.astype(np.uint16).view(np.uint8)
    else:
        at = {"Q2_K": 80, "Q3_K": 108}.get(name, 0)
        parts = np.ascontiguousarray(d)[..., None].view(np.uint8)
        blocks[..., at : at + parts.shape[-1]] |= parts


# ---- numbers --------------------------------------------------------------------------------


@cache
def _indices(name: str) -> Codes:
    """A codebook's index by the places of its values, so many bits each."""
    quant: Any = getattr(gguf.quants, "IQ1_S" if name == "IQ1_M" else name)
    quant.init_grid()
    grid = quant.grid.reshape(quant.grid_shape)
    places = np.searchsorted(np.array(quant.grid_map, np.float32), grid)
    bits = 3 if name.startswith("IQ3") else 2
    keys = (places << bits * np.arange(grid.shape[1])).sum(-1)
    found = np.zeros(1 << bits * grid.shape[1], np.uint16)
    found[keys] = np.arange(len(keys))
    return found


def _looked_up(name: str, numbers: Bytes) -> tuple[Codes, Bytes]:
    """Indices and signs' bytes (of eight numbers each) of numbers [..., 256]."""
    bits, per = (3, 4) if name.startswith("IQ3") else (2, 8)
    vectors = numbers.reshape(*numbers.shape[:-1], -1, per).astype(np.uint32) & ((1 << bits) - 1)
    keys = (vectors << np.uint32(bits) * np.arange(per, dtype=np.uint32)).sum(-1)
    signs = np.packbits(numbers >> bits & 1, axis=-1, bitorder="little")
    return _indices(name)[keys], signs


def _bits(values: Codes, per: int, width: int) -> Codes:
    """`per` neighbouring values of so many bits in one number."""
    parts = values.reshape(*values.shape[:-1], -1, per).astype(np.uint32)
    shifts = np.uint32(width) * np.arange(per, dtype=np.uint32)
    joined: Codes = np.bitwise_or.reduce(parts << shifts, axis=-1)
    return joined


def _two_bits(numbers: Bytes) -> Bytes:
    n = (numbers & 3).reshape(*numbers.shape[:-1], 2, 4, 32)
    planes = n << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    joined: Bytes = np.bitwise_or.reduce(planes, axis=-2).reshape(*numbers.shape[:-1], 64)
    return joined


def _pack_q2_k(numbers: Bytes, blocks: Bytes) -> None:
    blocks[..., 16:80] = _two_bits(numbers)


def _pack_q3_k(numbers: Bytes, blocks: Bytes) -> None:
    blocks[..., 32:96] = _two_bits(numbers)
    third = numbers.reshape(*numbers.shape[:-1], 8, 32) >> 2
    blocks[..., :32] = np.packbits(third, axis=-2, bitorder="little")[..., 0, :]


def _pack_iq2_xxs(numbers: Bytes, blocks: Bytes) -> None:
    index, signs = _looked_up("IQ2_XXS", numbers)
    groups = blocks[..., 2:].reshape(*blocks.shape[:-1], 8, 8)
    groups[..., :4] = index.reshape(*index.shape[:-1], 8, 4)
    sevens = _bits(signs & 127, 4, 7).astype(np.uint32)
    groups[..., 4:] |= sevens[..., None].view(np.uint8)
    blocks[..., 2:] = groups.reshape(*blocks.shape[:-1], 64)


def _pack_iq2_xs(numbers: Bytes, blocks: Bytes) -> None:
    index, signs = _looked_up("IQ2_XS", numbers)
    words = index | (signs & 127).astype(np.uint16) << 9
    blocks[..., 2:66] = words.view(np.uint8)


def _pack_iq2_s(numbers: Bytes, blocks: Bytes) -> None:
    index, signs = _looked_up("IQ2_S", numbers)
    blocks[..., 2:34], blocks[..., 34:66] = index & 255, signs
    blocks[..., 66:74] = _bits(index >> 8, 4, 2)


def _pack_iq3_xxs(numbers: Bytes, blocks: Bytes) -> None:
    index, signs = _looked_up("IQ3_XXS", numbers)
    blocks[..., 2:66] = index
    sevens = _bits(signs & 127, 4, 7).astype(np.uint32)
    blocks[..., 66:] |= sevens.view(np.uint8)


def _pack_iq3_s(numbers: Bytes, blocks: Bytes) -> None:
    index, signs = _looked_up("IQ3_S", numbers)
    blocks[..., 2:66], blocks[..., 66:74] = index & 255, _bits(index >> 8, 8, 1)
    blocks[..., 74:106] = signs


def _pack_iq1_s(numbers: Bytes, blocks: Bytes) -> None:
    index, _ = _looked_up("IQ1_S", numbers)
    blocks[..., 2:34] = index & 255
    blocks[..., 34:] |= _bits(index >> 8, 4, 3).astype(np.uint16).view(np.uint8)


def _pack_iq1_m(numbers: Bytes, blocks: Bytes) -> None:
    index, deltas = _looked_up("IQ1_M", numbers)
    blocks[..., :32] = index & 255
    blocks[..., 32:48] = _bits(index >> 8 | (deltas & 1).astype(np.uint16) << 3, 2, 4)


PACKERS: dict[str, Callable[[Bytes, Bytes], None]] = {
    "Q2_K": _pack_q2_k, "Q3_K": _pack_q3_k, "IQ1_S": _pack_iq1_s, "IQ1_M": _pack_iq1_m,
    "IQ2_XXS": _pack_iq2_xxs, "IQ2_XS": _pack_iq2_xs, "IQ2_S": _pack_iq2_s,
    "IQ3_XXS": _pack_iq3_xxs, "IQ3_S": _pack_iq3_s,
}  # fmt: skip
