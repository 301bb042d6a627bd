"""Backends: the ops of one device each. NumPy on the CPU always exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlacli.backends.blas import BlasThreads
from mlacli.errors import UnsupportedFeature
from mlacli.parallel.comm import Comm, Exchange, PipeComm, SoloComm, ThreadComm
from mlacli.parallel.ranks import RankGroup

if TYPE_CHECKING:
    from mlacli.ops import Ops
    from mlacli.parallel.plan import ShardPlan
    from mlacli.params import ContextParams


@dataclass(slots=True)
class Ranks:
    """The ranks of one engine: their ops and the group that runs them."""

    ops: list[Ops]
    group: RankGroup
    blas: BlasThreads | None = None  # None on GPUs

    def take_turn(self) -> None:
        """The BLAS threads are the process's: set them anew where engines work in turns."""
        if self.blas is not None:
            self.blas.apply()

    def close(self) -> None:
        self.group.close()
        if self.blas is not None:
            self.blas.release()


def open_ranks(plan: ShardPlan, context: ContextParams, hp: Any, n_threads: int) -> Ranks:
    """The ranks of `plan`, talking as its split mode needs; BLAS threads divided among them."""
    if any(rank.kind == "cuda" for rank in plan.ranks):
        return _cuda_ranks(plan, context, hp)
    from mlacli.backends.numpy_ops import NumpyOps, join_columns, reduce_typed

    n = len(plan.ranks)
    exchange = Exchange(n, join_columns) if n > 1 else None

    def comm(rank: int) -> Comm:
        if exchange is None:
            return SoloComm()
        if plan.mode == "graph":
            return ThreadComm(exchange, rank, reduce_typed(context.graph_reduce_type))
        return PipeComm(exchange, rank)

    ops: list[Ops] = [NumpyOps(comm(rank.rank), context, rank.dequant) for rank in plan.ranks]
    return Ranks(ops, RankGroup(n, exchange), BlasThreads(max(1, n_threads // n)))


def _cuda_ranks(plan: ShardPlan, context: ContextParams, hp: Any) -> Ranks:
    if len(plan.ranks) > 1:
        raise UnsupportedFeature(
            "this version runs on one GPU at a time, without layers on the host",
            "name one device, e.g. -dev cuda0, and leave -ngl out",
        )
    from mlacli.backends.cuda_device import CudaDevice
    from mlacli.backends.cuda_devices import use_device
    from mlacli.backends.cuda_ops import CudaOps

    (rank,) = plan.ranks
    use_device(rank.device)
    padding = (6 << 30) + 256 * (len(plan.shards) + 1024)  # of the arena's addresses
    device = CudaDevice(rank.device, rank.weights + rank.cache + rank.scratch + padding)
    return Ranks([CudaOps(SoloComm(), context, device, hp)], RankGroup(1))
