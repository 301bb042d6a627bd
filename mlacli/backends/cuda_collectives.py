"""Sums and gathers between the GPUs of one host: which way they go, and where partials lie.

`p2p`: own kernels through peer memory; `nccl`: NCCL; `host`: the same own kernels through
page-locked host memory; `local`: all ranks share one GPU. All can be captured in graphs. Sums of
own kernels run in rank order; NCCL adds GPUs in an order of its own. Either way all ranks get
equal bits, and the same ones from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import (
    FEW_ROWS,
    MOST_HERE,
    MOST_RANKS,
    REDUCE_TYPES,
    GpuPlace,
    Group,
    Way,
)
from mlacli.errors import BackendError, RankError

__all__ = ["Collectives", "GpuPlace", "chosen_way", "spin_limit"]

WAYS = ("auto", "p2p", "nccl", "host")
_LIMIT_MS = 5000


class Collectives:
    """The collectives of ranks on `gpus`, for messages of at most `max_floats` float32 a rank.

    `how`: auto | p2p | nccl | host; the attributes `how` and `why` say what was chosen. Each GPU's
    part is launched on its own stream, in the same order on all. `nbytes` is the memory taken on
    each GPU.
    """

    capturable = True  # whatever the way

    def __init__(
        self, gpus: Sequence[GpuPlace], how: str, reduce_type: str, max_floats: int
    ) -> None:
        assert how in WAYS and reduce_type in REDUCE_TYPES, f"{how} {reduce_type}"
        ranks = sorted(rank for gpu in gpus for rank in gpu.ranks)
        assert ranks == list(range(len(ranks))), "every rank is on one GPU"
        assert len(ranks) <= MOST_RANKS, f"at most {MOST_RANKS} ranks"
        assert all(1 <= len(gpu.ranks) <= MOST_HERE for gpu in gpus), f"1 to {MOST_HERE} on a GPU"
        assert all(gpu.ranks == sorted(gpu.ranks) for gpu in gpus), "ranks ascend"
        self.group = Group(tuple(gpus), reduce_type, spin_limit())
        self.max_floats = -(-max_floats // 64) * 64
        self.how, self.why = chosen_way([gpu.index for gpu in gpus], how)
        self.way = self._opened()

    def _opened(self) -> Way:
        from mlacli.backends.cuda_nccl import NcclWay
        from mlacli.backends.cuda_peer import PeerWay
        from mlacli.backends.cuda_peer_memory import PeerMemory

        if self.how == "nccl":
            return NcclWay(self.group, self.max_floats)
        host = self.how == "host"
        memory = PeerMemory([gpu.index for gpu in self.group.gpus], shared=not host)
        return PeerWay(self.group, self.max_floats, memory, through_host=host)

    def slot(self, rank: int) -> Array:
        """float32 [max_floats] on the rank's GPU, for its partial of the coming reduction."""
        return self.way.slot(rank)

    def reduce_add(
        self, gpu_index: int, streams: list[Array], held: tuple[bool, ...], n_floats: int,
        rounded: bool | None = None,
    ) -> None:  # fmt: skip
        """streams[i] += the sum of the held ranks' partials, for all ranks of one GPU.

        `rounded`: partials are rounded to the reduce type first; None: where streams have more than
        32 rows.
        """
        assert len(streams) == len(self.group.gpus[gpu_index].ranks), "a stream for each rank"
        assert len(held) == self.group.n_ranks and any(held), "some rank holds a partial"
        assert 0 < n_floats <= self.max_floats and n_floats % 4 == 0, f"{n_floats} floats"
        assert self.group.reduce_type != "q8_0" or not rounded or n_floats % 32 == 0
        if rounded is None:
            rounded = streams[0].ndim == 2 and len(streams[0]) > FEW_ROWS
        self.way.reduce_add(gpu_index, streams, held, n_floats, rounded)

    def gather(
        self, gpu_index: int, columns: list[Array | None], widths: list[int], out: Array
    ) -> None:
        """out [n, V] = the columns [n, widths[r]] of all ranks r, in rank order.

        `columns` are those of this GPU's ranks, dense; None where the width is 0.
        """
        assert len(widths) == self.group.n_ranks and sum(widths) == out.shape[1]
        mine = self.group.gpus[gpu_index].ranks
        for rank, one in zip(mine, columns, strict=True):
            assert (one is None) == (widths[rank] == 0), f"columns of rank {rank}"
            assert one is None or (one.is_dense and one.shape == (len(out), widths[rank]))
        if len(out):
            self.way.gather(gpu_index, columns, widths, out)

    def check(self) -> None:
        """RankError when a GPU was waited for in vain. Reads host memory only: cheap."""
        if (gpu := self.way.failed()) is not None:
            rank = self.group.gpus[gpu].ranks[0]
            raise RankError(rank, TimeoutError(
                f"no message from {self.group.gpus[gpu].device.name} within "
                f"{self.group.limit_ms / 1000:g} s"
            ))  # fmt: skip

    def reset(self) -> None:
        """Ready again after a failure, when no GPU runs anything any more."""
        self.way.reset()

    @property
    def nbytes(self) -> list[int]:
        """Bytes of device memory taken on each GPU."""
        return [int(n) for n in getattr(self.way, "nbytes", [0] * len(self.group.gpus))]

    def close(self) -> None:
        self.way.close()


def spin_limit() -> int:
    """Milliseconds of a device's clock after which a wait for another GPU has failed."""
    said = os.environ.get("MLACLI_SPIN_MS", "")
    return int(said) if said.isdecimal() and int(said) else _LIMIT_MS


def chosen_way(devices: Sequence[int], how: str) -> tuple[str, str]:
    """(way, reason) for GPUs of these indices; BackendError when what was asked for can't be."""
    from mlacli.backends import cuda_nccl
    from mlacli.backends.cuda_peer_memory import without_access

    if len(devices) == 1:
        return "local", f"all ranks share cuda{devices[0]}"
    no_p2p, no_nccl = without_access(devices), cuda_nccl.why_not()
    if not no_nccl and len(set(devices)) < len(devices):
        no_nccl = "NCCL takes a GPU once"
    if how == "p2p" and no_p2p:
        raise BackendError(f"--comm p2p is not possible: {no_p2p}", "use --comm auto")
    if how == "nccl" and no_nccl:
        raise BackendError(f"--comm nccl is not possible: {no_nccl}", "use --comm auto")
    if how != "auto":
        return how, "asked for"
    if not no_p2p:
        return "p2p", "the GPUs reach each other's memory"
    if not no_nccl:
        return "nccl", no_p2p
    return "host", f"{no_p2p}, and {no_nccl}"
