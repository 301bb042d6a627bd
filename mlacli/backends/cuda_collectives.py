"""Sums and gathers between the GPUs of one host: which way they go, and where partials lie.

`p2p`: own kernels through peer memory; `nccl`: NCCL; `host`: the same own kernels through
page-locked host memory. All can be captured in graphs. Sums of own kernels run in rank order; NCCL
adds GPUs in an order of its own. Either way all ranks get equal bits, and the same ones from run
to run. Ranks that share one GPU need none of this: cuda_together.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import (
    FEW_ROWS,
    REDUCE_TYPES,
    GpuPlace,
    Group,
    Mail,
    Way,
)
from mlacli.backends.cuda_ways import WAYS, check_counts, not_possible, obstacle
from mlacli.errors import BackendError, RankError

__all__ = ["Collectives", "GpuPlace", "obstacle", "spin_limit"]

_GOOD = "the GPUs reach each other's memory"
_LIMIT_MS = 5000
_TRIED = 128  # floats of the sum that tries a way


class Collectives:
    """The collectives of ranks on `gpus`, for messages of at most `max_floats` float32 a rank.

    `how`: auto | p2p | nccl | host; the attributes `how` and `why` say what was chosen. Each GPU's
    part is launched on its own stream, in the same order on all. `nbytes` is the memory taken on
    each GPU.
    """

    def __init__(
        self, gpus: Sequence[GpuPlace], how: str, reduce_type: str, max_floats: int
    ) -> None:
        assert how in ("auto", *WAYS) and reduce_type in REDUCE_TYPES, f"{how} {reduce_type}"
        assert len(gpus) > 1, "there is something between them"
        ranks = sorted(rank for gpu in gpus for rank in gpu.ranks)
        assert ranks == list(range(len(ranks))), "every rank is on one GPU"
        assert all(gpu.ranks == sorted(gpu.ranks) for gpu in gpus), "ranks ascend"
        check_counts([len(gpu.ranks) for gpu in gpus])
        self.group = Group(tuple(gpus), reduce_type, spin_limit())
        self.max_floats = max(_TRIED * 2, -(-max_floats // 64) * 64)
        self.how, self.why, self.way = self._chosen(how)

    def _chosen(self, asked: str) -> tuple[str, str, Way]:
        """The first way that is possible here and adds up right; (way, reason, it)."""
        devices, reasons = [gpu.index for gpu in self.group.gpus], list[str]()
        for how in WAYS if asked == "auto" else (asked,):
            if not (reason := obstacle(how, devices)):
                try:
                    way = self._opened(how)
                except BackendError as e:
                    reason = e.message
                else:
                    if not (reason := self._trouble(way)):
                        if asked != "auto":
                            return how, "asked for", way
                        return how, ", and ".join(reasons) or _GOOD, way
                    way.close()
                    reason = f"sums by {how} fail: {reason}"
            reasons.append(reason)
        raise not_possible(asked, ", and ".join(reasons))

    def _opened(self, how: str) -> Way:
        from mlacli.backends.cuda_nccl import NcclWay
        from mlacli.backends.cuda_peer import PeerWay
        from mlacli.backends.cuda_peer_memory import PeerMemory

        if how == "nccl":
            return NcclWay(self.group, self.max_floats)
        memory = PeerMemory([gpu.index for gpu in self.group.gpus], shared=how == "p2p")
        return PeerWay(self.group, self.max_floats, memory, through_host=how == "host")

    def _trouble(self, way: Way) -> str:
        """What is wrong with a sum of known values; some hosts promise peer access that isn't."""
        from mlacli.backends.cuda_devices import current_device, use_device

        before, gpus = current_device(), self.group.gpus
        values = np.arange(_TRIED, dtype=np.float32)
        want = sum((values + rank for rank in range(self.group.n_ranks)), np.float32(0))
        try:
            streams = []
            for gpu in gpus:
                use_device(gpu.device.name)
                slots = [way.slot(rank) for rank in gpu.ranks]
                streams.append([slot[_TRIED : 2 * _TRIED] for slot in slots])
                for rank, slot, stream in zip(gpu.ranks, slots, streams[-1], strict=True):
                    gpu.device.copy_in(slot[:_TRIED], values + rank)
                    gpu.device.copy_in(stream, np.zeros(_TRIED, np.float32))
            held = (True,) * self.group.n_ranks
            for launch in (False, True):  # compiled on all GPUs before one of them waits
                for g, gpu in enumerate(gpus):
                    use_device(gpu.device.name)
                    with nullcontext() if launch else gpu.device.prepared():
                        way.reduce_add(g, streams[g], held, _TRIED, False)
            for gpu, own in zip(gpus, streams, strict=True):
                use_device(gpu.device.name)
                if any(not np.array_equal(gpu.device.get(stream), want) for stream in own):
                    return f"wrong values on {gpu.device.name}"
        finally:
            use_device(before)
        return ""

    def slot(self, rank: int) -> Array:
        """float32 [max_floats] on the rank's GPU, for its partial of the coming reduction."""
        return self.way.slot(rank)

    def mail(self, rank: int, shape: tuple[int, ...]) -> Mail | None:
        """Where a product sends the rank's partial of the coming reduction by itself.

        None: it fills the slot. What is sent is not rounded, so rows are few.
        """
        few = len(shape) == 2 and shape[0] <= FEW_ROWS
        return self.way.mail(rank, math.prod(shape)) if few else None

    def lone(self) -> bool:
        """Whether every GPU has one rank, of its own number, that sends by itself."""
        return self.way.lone()

    def reduce_add(
        self, gpu_index: int, streams: list[Array], held: tuple[bool, ...], n_floats: int,
        rounded: bool | None = None, sent: bool = False,
    ) -> None:  # fmt: skip
        """streams[i] += the sum of the held ranks' partials, for all ranks of one GPU.

        `rounded`: partials are rounded to the reduce type first; None: where streams have more than
        32 rows. `sent`: this GPU's are in the `mail`, by the launch before.
        """
        assert len(streams) == len(self.group.gpus[gpu_index].ranks), "a stream for each rank"
        assert len(held) == self.group.n_ranks and any(held), "some rank holds a partial"
        assert 0 < n_floats <= self.max_floats and n_floats % 4 == 0, f"{n_floats} floats"
        assert self.group.reduce_type != "q8_0" or not rounded or n_floats % 32 == 0
        if rounded is None:
            rounded = streams[0].ndim == 2 and len(streams[0]) > FEW_ROWS
        assert not (sent and rounded), "what products send has all its bits"
        self.way.reduce_add(gpu_index, streams, held, n_floats, rounded, sent)

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

    def stop(self) -> bool:
        """Ends all waits: what runs will not be used. Whether all memory may be freed after it."""
        return self.way.stop()

    def reset(self) -> None:
        """Ready again after a failure, when no GPU runs anything any more."""
        self.way.reset()

    @property
    def nbytes(self) -> list[int]:
        """Bytes of device memory taken on each GPU."""
        return [int(n) for n in getattr(self.way, "nbytes", [0] * len(self.group.gpus))]

    @property
    def nccl_bytes(self) -> dict[str, tuple[int, int]]:
        """What NCCL holds of each GPU for itself, as measured; of that, what it had before.

        Empty where it has no part.
        """
        both = zip(getattr(self.way, "taken", []), getattr(self.way, "kept", []), strict=True)
        return dict(zip((gpu.device.name for gpu in self.group.gpus), both, strict=False))

    def close(self) -> None:
        self.way.close()


def spin_limit() -> int:
    """Milliseconds of a device's clock after which a wait for another GPU has failed."""
    said = os.environ.get("MLACLI_SPIN_MS", "")
    return int(said) if said.isdecimal() and int(said) else _LIMIT_MS
