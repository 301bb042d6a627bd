"""Backends: the ops of one device each. NumPy on the CPU always exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    blas_limit: Any = None  # restores the BLAS threads; None on GPUs
    blas_threads: int = 0  # of each rank

    def take_turn(self) -> None:
        """The BLAS limit is the process's: set it anew where engines work in turns."""
        if self.blas_limit is None:
            return
        from threadpoolctl import threadpool_limits

        threadpool_limits(self.blas_threads, user_api="blas")

    def close(self) -> None:
        self.group.close()
        if self.blas_limit is not None:
            self.blas_limit.restore_original_limits()


def open_ranks(plan: ShardPlan, context: ContextParams, n_threads: int) -> Ranks:
    """The ranks of `plan`, talking as its split mode needs; BLAS threads divided among them."""
    if any(rank.kind == "cuda" for rank in plan.ranks):
        return _cuda_ranks(plan, context)
    from threadpoolctl import threadpool_limits

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
    blas_threads = max(1, n_threads // n)
    limit = threadpool_limits(blas_threads, user_api="blas")
    return Ranks(ops, RankGroup(n, exchange), limit, blas_threads)


def _cuda_ranks(plan: ShardPlan, context: ContextParams) -> Ranks:
    if len(plan.ranks) > 1:
        raise UnsupportedFeature(
            "this version runs on one GPU at a time, without layers on the host",
            "name one device, e.g. -dev cuda0, and leave -ngl out",
        )
    from mlacli.backends.cuda_devices import use_device
    from mlacli.backends.cuda_ops import CudaOps

    (rank,) = plan.ranks
    use_device(rank.device)
    return Ranks([CudaOps(SoloComm(), context, rank, len(plan.shards))], RankGroup(1))
