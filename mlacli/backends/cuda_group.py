"""Who takes part in a collective, and what its kernels' arguments are made of. Knows no CuPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import CudaDevice

MOST_RANKS, MOST_HERE = 16, 8  # ranks in all, and on one GPU: what the kernels' arguments hold
FEW_ROWS = 32  # up to which partials travel as float32 whatever the reduce type
REDUCE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # as REDUCE_TYPE of the kernels


@dataclass(frozen=True, slots=True)
class GpuPlace:
    """A GPU and the ranks on it, ascending; launches are ordered by the device's stream."""

    device: CudaDevice
    ranks: list[int]

    @property
    def index(self) -> int:
        return int(self.device.name.removeprefix("cuda"))


@dataclass(frozen=True, slots=True)
class Group:
    """All GPUs, with what every way derives from them."""

    gpus: tuple[GpuPlace, ...]
    reduce_type: str
    limit_ms: int

    @property
    def n_ranks(self) -> int:
        return sum(len(gpu.ranks) for gpu in self.gpus)

    def home(self, rank: int) -> int:
        """The GPU of a rank, as a place in `gpus`."""
        return next(g for g, gpu in enumerate(self.gpus) if rank in gpu.ranks)

    def bits(self, gpu: int) -> int:
        return sum(1 << rank for rank in self.gpus[gpu].ranks)

    def silent(self, held: Sequence[bool]) -> int:
        """GPUs none of whose ranks is held, by bits."""
        return sum(1 << g for g, gpu in enumerate(self.gpus) if not any(held[r] for r in gpu.ranks))


@dataclass(frozen=True, slots=True)
class Mail:
    """Where a product sends its rank's partial of the coming sum: kernels/include/post.cuh."""

    words: Array  # the GPU's own
    n_gpus: int


class Way(Protocol):
    """How sums and gathers are computed; the arguments are those of `Collectives`."""

    def slot(self, rank: int) -> Array: ...

    def mail(self, rank: int, n: int) -> Mail | None: ...

    def lone(self) -> bool: ...

    def reduce_add(
        self, gpu: int, streams: Sequence[Array], held: Sequence[bool], n: int, rounded: bool,
        sent: bool = False,
    ) -> None: ...  # fmt: skip

    def gather(
        self, gpu: int, columns: Sequence[Array | None], widths: Sequence[int], out: Array
    ) -> None: ...

    def failed(self) -> int | None:
        """The GPU that another one waited for in vain."""
        ...

    def stop(self) -> bool: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


def pointers(arrays: Sequence[Array | None], offset: int = 0) -> list[Array | None]:
    """Arguments for the kernels' MOST_HERE arrays, moved by `offset` bytes."""
    moved = [a and Array(a.ptr + offset, a.shape, a.dtype, a.strides) for a in arrays]
    return [*moved, *([None] * (MOST_HERE - len(arrays)))]


def bits(held: Sequence[bool]) -> int:
    return sum(1 << rank for rank, holds in enumerate(held) if holds)


def power_of_two(n: int, most: int) -> int:
    """The lowest power of two from `n` on, at most `most` (rounded down to one)."""
    size = 1
    while size < n and 2 * size <= most:
        size *= 2
    return size
