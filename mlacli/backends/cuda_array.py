"""Device arrays as plain data: where they lie and how they are laid out. Knows no CuPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """`shape` elements of `dtype` from device address `ptr`, `strides` bytes apart."""

    ptr: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]

    @classmethod
    def dense(cls, ptr: int, shape: tuple[int, ...], dtype: Any) -> Self:
        """Row-major, without gaps."""
        dtype, step, strides = np.dtype(dtype), np.dtype(dtype).itemsize, []
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return cls(ptr, shape, dtype, tuple(reversed(strides)))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether it lies row-major without gaps."""
        packed = self.dense(0, self.shape, self.dtype).strides
        pairs = zip(self.shape, self.strides, packed, strict=True)
        return all(size <= 1 or own == dense for size, own, dense in pairs)

    def stride(self, axis: int) -> int:
        """Elements between neighbours along `axis`."""
        return self.strides[axis] // self.dtype.itemsize

    def __getitem__(self, key: Any) -> Array:
        """Integers and slices of step 1, with an ellipsis for the axes in between."""
        keys = key if isinstance(key, tuple) else (key,)
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            between = (slice(None),) * (self.ndim - len(keys) + 1)
            keys = keys[:at] + between + keys[at + 1 :]
        keys += (slice(None),) * (self.ndim - len(keys))
        ptr, shape, strides = self.ptr, [], []
        for one, size, step in zip(keys, self.shape, self.strides, strict=True):
            if isinstance(one, slice):
                start, stop, by = one.indices(size)
                assert by == 1, "slices have step 1"
                ptr += start * step
                shape.append(max(0, stop - start))
                strides.append(step)
            else:
                assert -size <= one < size, "index out of range"
                ptr += one % size * step
        return Array(ptr, tuple(shape), self.dtype, tuple(strides))

    def reshape(self, *shape: int) -> Array:
        """The same elements in another shape; one size may be -1. Needs a dense array."""
        assert self.is_dense, "only a dense array can be reshaped"
        known = math.prod(size for size in shape if size >= 0)
        whole = tuple(self.size // max(1, known) if size < 0 else size for size in shape)
        assert math.prod(whole) == self.size, f"{self.shape} can't take the shape {shape}"
        return Array.dense(self.ptr, whole, self.dtype)

    def view(self, dtype: Any) -> Array:
        """The same bytes as another type; the last axis changes its length."""
        new = np.dtype(dtype)
        assert self.is_dense, "only a dense array can be viewed as another type"
        last = self.shape[-1] * self.dtype.itemsize
        assert last % new.itemsize == 0, "the last axis holds no whole number of elements"
        return Array.dense(self.ptr, (*self.shape[:-1], last // new.itemsize), new)
