"""Seeded random GGUF bytes: any stretch of a tensor alone, the same in NumPy and on a GPU.

Byte j of a tensor depends on its key and j only: bits of a hash of the word or value that it lies
in, but for a few bytes of each block, which hold its scales. kernels/draw.cu does the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from mlacli.loading.quant_types import QType

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
# Where a block's float16 scales lie, and their ratio: a Q4_K value is scale * sub-scale * x - min
# * sub-min with x in 0..15, so a min of 7.5 scales centres it.
_SCALES: Mapping[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),), "Q4_1": ((0, 1.0), (2, -7.5)), "Q5_0": ((0, 1.0),),
    "Q5_1": ((0, 1.0), (2, -15.5)), "Q8_0": ((0, 1.0),), "IQ4_NL": ((0, 1.0),),
    "Q2_K": ((80, 1.0), (82, 1.5)), "Q3_K": ((108, 1.0),), "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)), "Q6_K": ((208, 1.0),), "IQ4_XS": ((0, 1.0),),
    "IQ1_S": ((0, 1.0),), "IQ2_XXS": ((0, 1.0),), "IQ2_XS": ((0, 1.0),), "IQ2_S": ((0, 1.0),),
    "IQ3_XXS": ((0, 1.0),), "IQ3_S": ((0, 1.0),),
}  # fmt: skip
NUMBERS = {"F32": 0, "F16": 1, "BF16": 2}  # DRAW of kernels/draw.cu; blocks are 3
_BYTES_SPREAD = np.sqrt(4 * (256**2 - 1) / 12)  # of the sum of four random bytes
_CHUNK = 1 << 16  # values or words at a time: they stay in the CPU's cache
_PIECE = 4 << 20  # bytes
_SHORT = 4096  # bytes of a stretch that are better drawn with others


@dataclass(frozen=True, slots=True)
class Source:
    """What decides on a tensor's bytes; `fields`: (place in a block, random bits of it, rest)."""

    key: int
    qtype: QType
    fields: tuple[tuple[int, int, int], ...] = ()
    scale: float = 0.0  # of plain numbers: what the sum of four bytes is multiplied with

    def draw(self, first: int, n: int) -> Bytes:
        """Bytes first .. first + n - 1 of the tensor."""
        size = self.qtype.nbytes if self.qtype.block == 1 else 4
        start, stop = first // size, -(-(first + n) // size)
        out = np.empty((stop - start) * size, np.uint8)
        for at in range(start, stop, _CHUNK):
            words = hashed(self.key, at, min(_CHUNK, stop - at))
            part = out[(at - start) * size :][: len(words) * size]
            part[:] = (words if self.qtype.block > 1 else self._numbers(words)).view(np.uint8)
        out = out[first - start * size :][:n]
        for place, mask, rest in self.fields:
            some = out[(place - first) % self.qtype.nbytes :: self.qtype.nbytes]
            some &= np.uint8(mask)
            some |= np.uint8(rest)
        return out

    def at(self, places: NDArray[np.int64]) -> Bytes:
        """The bytes at some places, slower than a stretch of them."""
        size = self.qtype.nbytes if self.qtype.block == 1 else 4
        words = _mixed(self.key, (places // size).astype(np.uint32).reshape(-1))
        drawn: Any = words if self.qtype.block > 1 else self._numbers(words)
        out = drawn.view(np.uint8).reshape(*places.shape, size)
        out = np.take_along_axis(out, (places % size)[..., None], -1)[..., 0]
        for place, mask, rest in self.fields:
            some = places % self.qtype.nbytes == place
            out[some] = (out[some] & mask) | rest
        return out

    def _numbers(self, words: Words) -> NDArray[Any]:
        four = words.view(np.uint8).reshape(-1, 4)
        sums = four[:, 0].astype(np.int32)
        for i in range(1, 4):
            sums += four[:, i]
        values = (sums - 510).astype(np.float32) * np.float32(self.scale)
        if self.qtype.name == "F16":
            return values.astype(np.float16)
        if self.qtype.name == "BF16":
            bits = values.view(np.uint32)
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return values


def hashed(key: int, first: int, n: int) -> Words:
    """Hashes of first .. first + n - 1."""
    return _mixed(key, np.arange(first, first + n, dtype=np.uint64).astype(np.uint32))


def _mixed(key: int, x: Words) -> Words:
    """lowbias32 with the key added half way; in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x += np.uint32(key)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def source(name: str, qtype: QType, spread: float, seed: int) -> Source:
    """A tensor's, whose values have standard deviation `spread`."""
    key = zlib.crc32(f"{seed} {name}".encode())
    if qtype.block == 1:
        return Source(key, qtype, scale=float(np.float32(spread / _BYTES_SPREAD)))
    return Source(key, qtype, _fields(qtype, spread / _unit_spread(qtype)))


def _fields(qtype: QType, scale: float) -> tuple[tuple[int, int, int], ...]:
    if qtype.name == "MXFP4":  # exponents: powers of two below the scale
        return ((0, 0, 127 + int(np.floor(np.log2(scale)))),)
    bits = int(np.float16(scale).view(np.uint16))
    if qtype.name == "IQ1_M":  # a nibble in the top of each of four words
        return tuple((49 + 2 * i, 0x0F, (bits >> 4 * i & 15) << 4) for i in range(4))
    found = []
    for at, ratio in _SCALES[qtype.name]:
        bits = int(np.float16(scale * ratio).view(np.uint16))
        found += [(at, 0, bits & 255), (at + 1, 0, bits >> 8)]
    return tuple(found)


@cache
def _unit_spread(qtype: QType) -> float:
    """The standard deviation of values under scale 1."""
    unit = 2.0**-8
    raw = Source(zlib.crc32(qtype.name.encode()), qtype, _fields(qtype, unit))
    blocks = raw.draw(0, 4096 * qtype.nbytes).reshape(-1, qtype.nbytes)
    return float(np.std(dequantize(blocks, GGMLQuantizationType(qtype.id)))) / unit


@dataclass(frozen=True, slots=True)
class Drawn:
    """Bytes [*leading, rows, bytes of a row] of a tensor that nobody has drawn: slices, like NumPy.

    Element (i, j, k) is the tensor's byte first + i * strides[0] + j * strides[1] + k.
    """

    source: Source
    shape: tuple[int, ...]
    first: int
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, source: Source, shape: tuple[int, ...]) -> Drawn:
        """All of a tensor, of `shape` in bytes."""
        return cls(source, shape, 0, _dense(shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def reshape(self, *shape: int) -> Drawn:
        assert self.strides == _dense(self.shape), "only the whole is reshaped"
        known = int(np.prod([n for n in shape if n >= 0]))
        shape = tuple(n if n >= 0 else self.nbytes // known for n in shape)
        return replace(self, shape=shape, strides=_dense(shape))

    def __getitem__(self, index: Any) -> Drawn:
        """Slices without a step, None and `...`."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (self.ndim - len(parts) + 1)
        axis, shape, strides, first = 0, [], [], self.first
        for part in parts:
            if part is None:
                shape.append(1)
                strides.append(0)
                continue
            start, stop, _ = part.indices(self.shape[axis])
            first += start * self.strides[axis]
            shape.append(max(0, stop - start))
            strides.append(self.strides[axis])
            axis += 1
        shape, strides = [*shape, *self.shape[axis:]], [*strides, *self.strides[axis:]]
        return Drawn(self.source, tuple(shape), first, tuple(strides))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Bytes:
        whole = self.ndim  # axes from here on lie one after another
        while whole and self.strides[whole - 1 :] == _dense(self.shape[whole - 1 :]):
            whole -= 1
        starts = np.full(self.shape[:whole], self.first, np.int64)
        for axis in range(whole):
            steps = np.arange(self.shape[axis]) * self.strides[axis]
            starts += steps.reshape(-1, *[1] * (whole - axis - 1))
        n = int(np.prod(self.shape[whole:]))
        if n >= _SHORT:
            parts = [self.source.draw(int(first), n) for first in starts.reshape(-1)]
        else:
            rows = np.array_split(starts.reshape(-1), -(-starts.size * n // _PIECE) or 1)
            parts = [self.source.at(some[:, None] + np.arange(n)).reshape(-1) for some in rows]
        return np.concatenate(parts).reshape(self.shape)

    def pieces(self) -> Iterator[Bytes]:
        """The bytes of a whole, some megabytes at a time."""
        for at in range(0, self.nbytes, _PIECE):
            yield self.source.draw(self.first + at, min(_PIECE, self.nbytes - at))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
