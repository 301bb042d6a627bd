"""The inverse of every cut: whole tensors out of the ranks' memory, compared with the file.

Works on shards and raw bytes [*leading axes, bytes of a row]; knows no backend. A quant block that
two ranks carry is taken from the one that holds its first column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlacli.errors import BackendError, GgufError
from mlacli.loading.weights import read_shard, to_float32

if TYPE_CHECKING:
    from mlacli.loading.gguf_file import GgufFile
    from mlacli.parallel.plan import ShardPlan
    from mlacli.parallel.shards import Shard

Bytes = NDArray[np.uint8]
Index = tuple[slice, ...]
_CHUNK = 16 << 20  # bytes compared at a time, and elements unpacked at a time


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check_tensors` went through; `nbytes` as held by all ranks together."""

    n_tensors: int
    nbytes: int


def by_tensor(plan: ShardPlan) -> dict[str, list[Shard]]:
    """Each tensor's shards in rank order."""
    found: dict[str, list[Shard]] = {}
    for shard in sorted(plan.shards, key=lambda s: s.rank):
        found.setdefault(shard.tensor, []).append(shard)
    return found


def whole_shard(shards: Sequence[Shard]) -> Shard:
    """The shard that a lone rank would hold of the tensor."""
    first = shards[0]
    shape = list(first.shape)
    if first.axis is not None:
        shape[first.axis] = max(stop for shard in shards for _, stop in shard.ranges)
    nbytes = math.prod(shape[:-1]) * first.qtype.row_bytes(shape[-1])
    return replace(first, axis=None, ranges=(), shape=tuple(shape), nbytes=nbytes)


def gather(shards: Sequence[Shard], raws: Mapping[int, Bytes]) -> Bytes:
    """The whole tensor's bytes from `raws`, bytes by rank; of mirrored copies the first."""
    if shards[0].axis is None:
        return raws[shards[0].rank]
    whole = whole_shard(shards)
    out = np.empty((*whole.shape[:-1], whole.qtype.row_bytes(whole.shape[-1])), np.uint8)
    placed = 0
    for shard in shards:
        for there, here in _pieces(shard, owned=True):
            out[there] = raws[shard.rank][here]
            placed += out[there].size
    assert placed == out.size, f"the shards of {whole.tensor} don't make a whole"
    return out


def _pieces(shard: Shard, owned: bool) -> Iterator[tuple[Index, Index]]:
    """(index into the whole tensor's bytes, index into the shard's bytes) of each range.

    `owned` leaves out a first block whose first column is another rank's.
    """
    if shard.axis is None:
        yield (), ()
        return
    before = (slice(None),) * shard.axis
    if shard.axis == len(shard.shape) - 1:
        ((start, stop),), block, size = shard.ranges, shard.qtype.block, shard.qtype.nbytes
        carried, end = start // block, -(-stop // block)
        first = -(-start // block) if owned else carried
        there, here = slice(first * size, end * size), slice((first - carried) * size, None)
        yield (*before, there), (*before, here)
        return
    at = 0
    for start, stop in shard.ranges:
        yield (*before, slice(start, stop)), (*before, slice(at, at + stop - start))
        at += stop - start


def check_tensors(
    file: GgufFile, plan: ShardPlan, hp: Any, download: Callable[[Shard], Bytes]
) -> Checked:
    """Compares every tensor in the ranks' memory with the file, and looks for NaN and infinity.

    `download(shard)` gives a rank's bytes. BackendError names the first difference, GgufError a
    tensor that is not finite. What is built at load is compared with what the file's tensors give.
    """
    tensors = by_tensor(plan)
    for shards in tensors.values():
        whole = whole_shard(shards)
        raws = {shard.rank: download(shard) for shard in shards}
        with np.errstate(all="ignore"):
            wanted = np.asarray(read_shard(file, whole, hp))
        gathered = gather(shards, raws)
        _refuse_difference(whole, shards, gathered, wanted)
        for shard in shards:  # copies that gathering passed over
            for there, here in _pieces(shard, owned=False):
                _refuse_difference(whole, [shard], raws[shard.rank][here], wanted[there], there)
        _refuse_non_finite(whole, gathered)
    return Checked(len(tensors), sum(shard.nbytes for shard in plan.shards))


def _refuse_difference(
    whole: Shard, shards: Sequence[Shard], held: Bytes, wanted: Bytes, there: Index = ()
) -> None:
    at = first_difference(held, wanted)
    if at is None:
        return
    local = np.unravel_index(at, wanted.shape)
    starts = [there[i].start or 0 if i < len(there) else 0 for i in range(wanted.ndim)]
    index = tuple(int(i) + start for i, start in zip(local, starts, strict=True))
    rank = next(s.rank for s in shards if len(shards) == 1 or _owns(s, index))
    rows = np.ravel_multi_index(index[:-1], whole.shape[:-1]) if index[:-1] else 0
    byte = int(rows) * whole.qtype.row_bytes(whole.shape[-1]) + index[-1]
    raise BackendError(
        f"tensor {whole.tensor} on rank {rank} differs from the file at byte {byte}: "
        f"{held[local]:#04x} in memory, {wanted[local]:#04x} in the file",
        "load again; if it stays, the memory or the device is faulty, or mlacli is",
    )


def _owns(shard: Shard, index: tuple[int, ...]) -> bool:
    """Whether gathering takes the byte at `index` of the whole tensor from this shard."""

    def inside(piece: Index) -> bool:  # axes after the cut one are whole
        bounds = zip(index, piece, strict=False)
        return all((s.start or 0) <= i and (s.stop is None or i < s.stop) for i, s in bounds)

    return any(inside(there) for there, _ in _pieces(shard, owned=True))


def first_difference(a: Bytes, b: Bytes) -> int | None:
    """Flat index of the first differing byte of two arrays of one shape; None when equal."""
    assert a.shape == b.shape, f"{a.shape} bytes in memory, {b.shape} in the file"
    if a.ndim > 1:
        n = math.prod(a.shape[1:])
        step = max(1, _CHUNK // max(1, n))
        for start in range(0, len(a), step):
            rows = slice(start, start + step)
            if not np.array_equal(a[rows], b[rows]):
                return start * n + int(np.argmax((a[rows] != b[rows]).ravel()))
        return None
    return None if np.array_equal(a, b) else int(np.argmax(a != b))


def _refuse_non_finite(whole: Shard, raw: Bytes) -> None:
    """GgufError naming the first value of the tensor that is NaN or infinite."""
    rows = raw.reshape(-1, raw.shape[-1])
    step = max(1, _CHUNK // whole.shape[-1])
    for start in range(0, len(rows), step):
        with np.errstate(all="ignore"):
            values = to_float32(rows[start : start + step], whole.qtype)
            finite = np.isfinite(values)
        if not finite.all():
            row, column = np.unravel_index(int(np.argmin(finite)), finite.shape)
            raise GgufError(
                f"tensor {whole.tensor} holds {values[row, column]} in row {start + row}, "
                f"column {column}",
                "the file is damaged, or was converted from damaged weights",
            )
