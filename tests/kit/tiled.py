"""Weights in tiles, by NumPy: what kernels/repack.cu must make, and the values tensor cores get.

Written from the text of kernels/include/tile_layout.cuh, one value at a time where that is clear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from kit.toy_gguf import random_weight

from mlacli.loading.quant_types import QType, from_id
from mlacli.loading.tiles import TiledShape, tiled_shape

TILED = (
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K",
    "Q6_K", "IQ4_XS", "Q2_K", "Q3_K", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S",
    "IQ1_M",
)  # fmt: skip
# Largest |stored number less zero| of the types: the header's bound is made of it.
MOST = {
    "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 128, "IQ4_NL": 127, "MXFP4": 12,
    "Q4_K": 15, "Q5_K": 31, "Q6_K": 32, "IQ4_XS": 127,
    "Q2_K": 3, "Q3_K": 4, "IQ3_XXS": 62, "IQ3_S": 15, "IQ2_XXS": 43, "IQ2_XS": 43, "IQ2_S": 43,
    "IQ1_S": 1.125, "IQ1_M": 9,
}  # fmt: skip
ZERO = {"Q4_0": 8, "Q5_0": 16, "Q6_K": 32, "Q3_K": 4}
THIN = ("Q2_K", "Q3_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")
SIXTEENS = (*THIN, "Q6_K")  # scales of 16 columns each
IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
IQ2 = np.array([8, 25, 43, 0, -8, -25, -43, 0], np.float32)
IQ1 = np.array([-7, 1, 9, 0, -9, -1, 7, 0], np.float32)  # in eighths
IQ3_XXS, IQ3_S = (
    np.array([*sizes, *(-n for n in sizes)], np.float32)
    for sizes in ((4, 12, 20, 28, 36, 44, 52, 62), range(1, 16, 2))
)
TABLES = {
    "IQ4_NL": IQ4, "IQ4_XS": IQ4, "MXFP4": FP4, "IQ3_XXS": IQ3_XXS, "IQ3_S": IQ3_S,
    "IQ2_XXS": IQ2, "IQ2_XS": IQ2, "IQ2_S": IQ2,
    "IQ1_M": np.arange(-9, 23, 2, dtype=np.float32),
}  # fmt: skip


def qtype_of(name: str) -> QType:
    return from_id(int(T[name]), name)


def random_rows(
    name: str, shape: tuple[int, ...], skip: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of rows of whole blocks, float64 of `shape`: their columns from `skip` on)."""
    q = qtype_of(name)
    n_held = -(-(skip + shape[-1]) // q.block) * q.block
    rows = random_weight((*shape[:-1], n_held), T[name], rng).view(np.uint8)
    rows = rows.reshape(*shape[:-1], -1)
    values = dequantize(rows.reshape(-1, rows.shape[-1]), T[name]).reshape(*shape[:-1], n_held)
    return rows, values[..., skip : skip + shape[-1]].astype(np.float64)


def cut_row(name: str, n_in: int, skip: int) -> tuple[int, slice]:
    """Columns that a local row's blocks hold, and which of them are the rank's own."""
    block = qtype_of(name).block
    return -(-(skip + n_in) // block) * block, slice(skip, skip + n_in)


def shapes(name: str) -> list[tuple[tuple[int, ...], int]]:
    """(local shape, skip): leading axes, ragged rows, columns that fill no tile or cut a block."""
    block = qtype_of(name).block
    if block == 256:
        return [((16, 256), 0), ((3, 21, 512), 0), ((5, 160), 32), ((2, 33, 320), 224)]
    if block == 32:
        return [((16, 64), 0), ((3, 21, 96), 0), ((37, 320), 0)]
    return [((16, 64), 0), ((3, 21, 77), 0), ((5, 130), 0)]


def _half(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


class Parts:
    """Rows of GGUF bytes taken apart: numbers as stored, and scales and minima per 16 columns.

    `numbers` [rows, columns]; `scale`, `minimum` [rows, columns / 16] float32 (added, not
    subtracted); `scale_code`, `min_code` what the scale planes hold of them; `d` bytes per block.
    """

    def __init__(self, raw: np.ndarray, name: str) -> None:
        q = qtype_of(name)
        b = np.ascontiguousarray(raw).reshape(len(raw), -1, q.nbytes)
        self.minimum: np.ndarray | None = None
        self.min_code: np.ndarray | None = None
        self.d: np.ndarray | None = None
        getattr(self, "_" + name.lower())(b)
        n = b.shape[1] * q.block
        self.numbers = self.numbers.reshape(len(raw), n)
        for field in ("scale", "minimum", "scale_code", "min_code"):
            value = getattr(self, field)
            if value is not None:
                value = value.reshape(len(raw), -1)
                setattr(self, field, np.repeat(value, n // 16 // value.shape[1], axis=1))

    @staticmethod
    def _nibbles(b: np.ndarray) -> np.ndarray:
        return np.concatenate([b & 15, b >> 4], axis=-1)

    @staticmethod
    def _code16(b: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(b).view(np.uint16)[..., 0].astype(np.uint32)

    def _q4_0(self, b: np.ndarray) -> None:
        self.scale, self.scale_code = _half(b[..., :2]), self._code16(b[..., :2])
        self.numbers = self._nibbles(b[..., 2:])

    _iq4_nl = _q4_0

    def _q4_1(self, b: np.ndarray) -> None:
        self.scale, self.scale_code = _half(b[..., :2]), self._code16(b[..., :2])
        self.minimum, self.min_code = _half(b[..., 2:4]), self._code16(b[..., 2:4])
        self.numbers = self._nibbles(b[..., 4:])

    def _fifth(self, high: np.ndarray, low: np.ndarray) -> None:
        bits = np.unpackbits(high, axis=-1, bitorder="little")
        self.numbers = self._nibbles(low) | bits << 4

    def _q5_0(self, b: np.ndarray) -> None:
        self.scale, self.scale_code = _half(b[..., :2]), self._code16(b[..., :2])
        self._fifth(b[..., 2:6], b[..., 6:])

    def _q5_1(self, b: np.ndarray) -> None:
        self.scale, self.scale_code = _half(b[..., :2]), self._code16(b[..., :2])
        self.minimum, self.min_code = _half(b[..., 2:4]), self._code16(b[..., 2:4])
        self._fifth(b[..., 4:8], b[..., 8:])

    def _q8_0(self, b: np.ndarray) -> None:
        self.scale, self.scale_code = _half(b[..., :2]), self._code16(b[..., :2])
        self.numbers = b[..., 2:]

    def _mxfp4(self, b: np.ndarray) -> None:
        scale = np.exp2(b[..., 0].astype(np.float64) - 128).astype(np.float32)
        self.scale, self.scale_code = scale, scale.view(np.uint32) >> 16
        self.numbers = self._nibbles(b[..., 1:])

    def _k_scales(self, b: np.ndarray) -> None:
        s = b[..., 4:16].astype(np.uint32)
        scale = np.concatenate([s[..., :4] & 63, (s[..., 8:] & 15) | s[..., :4] >> 6 << 4], -1)
        minimum = np.concatenate([s[..., 4:8] & 63, s[..., 8:] >> 4 | s[..., 4:8] >> 6 << 4], -1)
        self.scale_code, self.min_code = scale, minimum
        self.scale = _half(b[..., :2])[..., None] * scale.astype(np.float32)
        self.minimum = -_half(b[..., 2:4])[..., None] * minimum.astype(np.float32)
        self.d = b[..., :4]

    def _q4_k(self, b: np.ndarray) -> None:
        self._k_scales(b)
        low = b[..., 16:].reshape(*b.shape[:2], 4, 32)
        self.numbers = np.stack([low & 15, low >> 4], axis=-2)

    def _q5_k(self, b: np.ndarray) -> None:
        self._k_scales(b)
        low = b[..., 48:].reshape(*b.shape[:2], 4, 32)
        low = np.stack([low & 15, low >> 4], axis=-2).reshape(*b.shape[:2], 8, 32)
        high = b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        self.numbers = low | high << 4

    def _q6_k(self, b: np.ndarray) -> None:
        low = b[..., :128].reshape(*b.shape[:2], 2, 1, 64)
        low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*b.shape[:2], 2, 4, 32)
        high = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32)
        high = high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
        self.numbers = low | high << 4
        code = b[..., 192:208].view(np.int8)
        self.scale = _half(b[..., 208:])[..., None] * code.astype(np.float32)
        self.scale_code, self.d = code.astype(np.uint32) & 255, b[..., 208:]

    def _iq4_xs(self, b: np.ndarray) -> None:
        high = self._code16(b[..., 2:4])[..., None] >> np.arange(0, 16, 2, dtype=np.uint32) & 3
        low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], -1).reshape(*b.shape[:2], 8)
        code = (low | high << 4).astype(np.int32) - 32
        self.scale = _half(b[..., :2])[..., None] * code.astype(np.float32)
        self.scale_code, self.d = code.astype(np.uint32) & 255, b[..., :2]
        self.numbers = self._nibbles(b[..., 8:].reshape(*b.shape[:2], 8, 16))

    @staticmethod
    def _two_bits(b: np.ndarray) -> np.ndarray:
        b = b.reshape(*b.shape[:2], 2, 1, 32)
        return b >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3

    def _q2_k(self, b: np.ndarray) -> None:
        self.numbers, code = self._two_bits(b[..., 16:80]), b[..., :16].astype(np.uint32)
        self.scale = _half(b[..., 80:82])[..., None] * (code & 15).astype(np.float32)
        self.minimum = -_half(b[..., 82:84])[..., None] * (code >> 4).astype(np.float32)
        self.scale_code, self.d = code, b[..., 80:84]

    def _q3_k(self, b: np.ndarray) -> None:
        top = b[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
        self.numbers = self._two_bits(b[..., 32:96]).reshape(top.shape) | top << 2
        high = b[..., None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
        code = self._nibbles(b[..., 96:104]) | high.reshape(*b.shape[:2], 16) << 4
        code = code.astype(np.int32) - 32
        self.scale = _half(b[..., 108:])[..., None] * code.astype(np.float32)
        self.scale_code, self.d = code.astype(np.uint32) & 255, b[..., 108:]

    def _mapped(self, b: np.ndarray, name: str, d: np.ndarray, code: np.ndarray) -> None:
        """IQ1 to IQ3: numbers out of gguf-py's values for d = 1; `code` of 32 or 16 columns."""
        unit = {"1": 0.125, "2": 0.125, "3": 0.25 if name == "IQ3_XXS" else 1.0}[name[2]]
        odd, ones = 1 + 2 * code.astype(np.uint32), b.copy()
        if name == "IQ1_M":
            tops = np.array([0, 0, 0xC000, 0x3000], np.uint16)
            words = np.ascontiguousarray(b[..., 48:]).view(np.uint16) & 0x0FFF | tops
            ones[..., 48:] = words.view(np.uint8)
        else:
            ones[..., :2] = np.float16(1)[None].view(np.uint8)
        values = dequantize(ones.reshape(len(b), -1), T[name]).reshape(*b.shape[:2], 256)
        scale = odd.astype(np.float32) * np.float32(unit)
        numbers = np.rint(values / np.repeat(scale, 256 // code.shape[-1], axis=-1)).astype(int)
        table = np.zeros(256, np.uint8)
        values = IQ1 if name.startswith("IQ1") else TABLES[name]
        table[values.astype(int)] = np.arange(len(values))
        self.numbers = table[numbers]
        self.scale, self.scale_code = _half(d)[..., None] * scale, odd
        self.d = d

    def _iq2_xxs(self, b: np.ndarray) -> None:
        self._mapped(b, "IQ2_XXS", b[..., :2], b[..., 9:66:8] >> 4)

    def _iq2_xs(self, b: np.ndarray) -> None:
        code = np.stack([b[..., 66:] & 15, b[..., 66:] >> 4], -1).reshape(*b.shape[:2], 16)
        self._mapped(b, "IQ2_XS", b[..., :2], code)

    def _iq2_s(self, b: np.ndarray) -> None:
        code = np.stack([b[..., 74:] & 15, b[..., 74:] >> 4], -1).reshape(*b.shape[:2], 16)
        self._mapped(b, "IQ2_S", b[..., :2], code)

    def _iq3_xxs(self, b: np.ndarray) -> None:
        self._mapped(b, "IQ3_XXS", b[..., :2], b[..., 69::4] >> 4)

    def _iq3_s(self, b: np.ndarray) -> None:
        code = np.stack([b[..., 106:] & 15, b[..., 106:] >> 4], -1).reshape(*b.shape[:2], 8)
        self._mapped(b, "IQ3_S", b[..., :2], code)

    def _iq1_s(self, b: np.ndarray) -> None:
        self._mapped(b, "IQ1_S", b[..., :2], b[..., 35::2] >> 4 & 7)
        minus = self.numbers.reshape(*b.shape[:2], 8, 32)[..., 0] >> 2
        least, self.numbers = np.where(minus, 9, 7), self.numbers & 3
        self.minimum = -self.scale * least.astype(np.float32)
        self.scale = 8 * self.scale
        self.scale_code = self.scale_code | least.astype(np.uint32) << 4

    def _iq1_m(self, b: np.ndarray) -> None:
        words = np.ascontiguousarray(b[..., 48:]).view(np.uint16).astype(np.uint32)
        tops = (words >> 12 << np.arange(0, 16, 4, dtype=np.uint32)).sum(-1).astype(np.uint16)
        code = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint32) & 7
        self._mapped(b, "IQ1_M", tops[..., None].view(np.uint8), code.reshape(*b.shape[:2], 16))
        self.numbers = 4 * (self.numbers & 3) + 1 - (self.numbers >> 2)


def _bound(sizes: np.ndarray) -> np.float32:
    """The largest finite one."""
    finite = sizes[np.isfinite(sizes)]
    return np.float32(finite.max()) if finite.size else np.float32(0)


def _fragments(values: np.ndarray, layout: TiledShape) -> np.ndarray:
    """[row tiles, 16, columns] -> [row tile, column tile, lane, step, register, half]."""
    v = values.reshape(layout.all_row_tiles, 2, 8, layout.n_col_tiles, 4, 2, 4, 2)
    # axes: row tile, row >= 8, g, column tile, step, column >= 8, t, half
    v = v.transpose(0, 3, 2, 6, 4, 5, 1, 7)
    return v.reshape(layout.all_row_tiles, layout.n_col_tiles, 32, 4, 4, 2)


def _by_row(values: np.ndarray) -> np.ndarray:
    """[row tiles, 16, pieces] -> [row tile, piece, g, row >= 8]."""
    n = len(values)
    return values.reshape(n, 2, 8, -1).transpose(0, 3, 2, 1)


def _number_planes(lanes: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """The planes q and h; lanes as _fragments() gives it, uint32."""
    register, half = np.arange(4, dtype=np.uint32), np.arange(2, dtype=np.uint32) * 16
    if name == "Q8_0":  # bytes R0 low, R1 low, R0 high, R1 high; then R2 and R3
        v = lanes.astype(np.uint8).reshape(*lanes.shape[:4], 2, 2, 2)
        v = v.swapaxes(-1, -2).reshape(*lanes.shape[:3], 2, 16)  # [.., lane, pair of steps, bytes]
        return {"q": v.transpose(0, 1, 3, 2, 4)}
    at = 4 * register[:, None] + half
    if name in THIN:
        if name.startswith("IQ2"):
            at = 16 * (register & 1)[:, None] + 4 * (register >> 1)[:, None] + half // 2
        steps = 2 * np.arange(2, dtype=np.uint32)[:, None, None]
        low, third = (lanes >> 2, lanes & 1) if name == "IQ1_M" else (lanes & 3, lanes >> 2)
        pairs = low.reshape(*lanes.shape[:3], 2, 2, 4, 2)
        planes = {"q": (pairs << (at + steps)).sum((-1, -2, -3), dtype=np.uint32)}
        steps = np.arange(4, dtype=np.uint32)[:, None, None]
        planes["h"] = (third << (at + steps)).sum((-1, -2, -3), dtype=np.uint32)
        return planes
    planes = {"q": ((lanes & 15) << at).sum((-1, -2), dtype=np.uint32)}
    if name in ("Q5_0", "Q5_1", "Q5_K"):
        at = register[:, None] + half + 4 * np.arange(4, dtype=np.uint32)[:, None, None]
        planes["h"] = ((lanes >> 4) << at).sum((-1, -2, -3), dtype=np.uint32)
    if name == "Q6_K":
        at = 2 * register[:, None] + half + 8 * np.arange(2, dtype=np.uint32)[:, None, None]
        pairs = lanes.reshape(*lanes.shape[:3], 2, 2, 4, 2)
        planes["h"] = ((pairs >> 4) << at).sum((-1, -2, -3), dtype=np.uint32)
    return planes


def _scale_words(parts: Parts, name: str, padded: Callable[..., np.ndarray]) -> dict[str, Any]:
    """The planes s, m and d."""
    per_tile = padded(parts.scale_code, 16)
    codes = per_tile.reshape(*per_tile.shape[:2], -1, 4)  # of the four 16s of a tile
    if parts.min_code is not None:
        per_tile = padded(parts.min_code, 16)
        minima = per_tile.reshape(*per_tile.shape[:2], -1, 4)
    if parts.d is None:
        planes = {"s": codes[..., 0] | codes[..., 2] << 16}
        if parts.min_code is not None:
            planes["m"] = minima[..., 0] | minima[..., 2] << 16
    elif name in SIXTEENS:
        planes = {"s": (codes << np.arange(0, 32, 8, dtype=np.uint32)).sum(-1, dtype=np.uint32)}
    else:
        planes = {"s": codes[..., 0] | codes[..., 2] << 8}
        if parts.min_code is not None:
            planes["s"] |= minima[..., 0] << 16 | minima[..., 2] << 24
    planes = {key: _by_row(words) for key, words in planes.items()}
    if parts.d is not None:
        kind = np.uint32 if parts.d.shape[-1] == 4 else np.uint16
        planes["d"] = _by_row(padded(np.ascontiguousarray(parts.d).view(kind)[..., 0], 256))
    return planes


def tile_weight(raw: np.ndarray, name: str, shape: tuple[int, ...], skip: int = 0) -> np.ndarray:
    """The buffer of a weight of local `shape`, uint8; raw [..., bytes of a local row]."""
    layout = tiled_shape(shape, qtype_of(name), skip)
    rows, n_in = shape[-2:]
    flat = np.ascontiguousarray(raw).reshape(layout.lead * rows, -1)

    def padded(values: np.ndarray, per: int) -> np.ndarray:
        """[all rows, columns / per] -> [row tiles, 16, padded columns / per]."""
        n = layout.n_col_tiles * 64 // per
        full = np.zeros((layout.lead, layout.n_row_tiles * 16, n), values.dtype)
        full[:, :rows, : values.shape[-1]] = values.reshape(layout.lead, rows, -1)
        return full.reshape(layout.all_row_tiles, 16, n)

    if name in ("F16", "BF16"):
        lanes = _fragments(padded(flat.view(np.uint16), 1), layout)
        planes: dict[str, Any] = {"q": lanes.transpose(0, 1, 3, 2, 4, 5)}
        bound = _bound(np.abs(dequantize(flat, T[name])))
    else:
        parts = Parts(flat, name)
        lanes = _fragments(padded(parts.numbers, 1), layout).astype(np.uint32)
        size = np.abs(parts.scale) * np.float32(MOST[name])
        if parts.minimum is not None and name != "IQ1_S":
            size = size + np.abs(parts.minimum)
        column = 16 * np.arange(parts.scale.shape[1])
        foreign = (column < skip) | (column >= skip + n_in)
        bound = _bound(size[:, ~foreign])
        parts.scale_code[:, foreign] = 0
        if parts.min_code is not None:
            parts.min_code[:, foreign] = 0
        planes = {**_number_planes(lanes, name), **_scale_words(parts, name, padded)}
    out = np.zeros(layout.nbytes, np.uint8)
    out[:4] = bound[None].view(np.uint8)
    for plane, (at, size) in layout.planes.items():
        if size:
            data = np.ascontiguousarray(planes[plane]).view(np.uint8).ravel()
            assert len(data) == size, f"plane {plane} of {name} has {len(data)} bytes, not {size}"
            out[at : at + size] = data
    return out


def boost(bound: float) -> float:
    """The power of two that brings the header's bound into [2^13, 2^14)."""
    exponent = int(np.float32(bound).view(np.uint32)) >> 23
    return float(2.0 ** (min(max(267 - exponent, 14), 240) - 127))


def scaled_values(raw: np.ndarray, name: str, boosted: float) -> np.ndarray:
    """float16 that tensor cores get in prefill, bit for bit: of boost * value; [rows, columns]."""
    flat = np.ascontiguousarray(raw).reshape(-1, raw.shape[-1])
    if name == "F16":
        return flat.view(np.float16)
    if name == "BF16":
        return (dequantize(flat, T[name]) * np.float32(boosted)).astype(np.float16)
    parts, by = Parts(flat, name), np.float32(boosted)
    numbers = TABLES[name][parts.numbers] if name in TABLES else parts.numbers.astype(np.float32)
    if name == "Q8_0":
        numbers = parts.numbers.view(np.int8).astype(np.float32)
    numbers = numbers - np.float32(ZERO.get(name, 0))

    def half(values: np.ndarray) -> np.ndarray:
        return np.repeat((values * by).astype(np.float16), 16, axis=1).astype(np.float64)

    value = numbers * half(parts.scale)
    if parts.minimum is not None:
        value = value + half(parts.minimum)
    return value.astype(np.float16)
