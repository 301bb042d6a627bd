"""Backends: the ops of one device each. NumPy on the CPU always exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    blas_limit: Any  # restores the BLAS threads

    def close(self) -> None:
        self.group.close()
        self.blas_limit.restore_original_limits()


def open_ranks(plan: ShardPlan, context: ContextParams, n_threads: int) -> Ranks:
    """The ranks of `plan`, talking as its split mode needs; BLAS threads divided among them."""
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
    limit = threadpool_limits(max(1, n_threads // n), user_api="blas")
    return Ranks(ops, RankGroup(n, exchange), limit)
