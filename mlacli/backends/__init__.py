"""Backends: the ops of one device each, and the ranks that run them. NumPy always exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from mlacli.backends.blas import BlasThreads
from mlacli.parallel.comm import Comm, Exchange, PipeComm, SoloComm, ThreadComm
from mlacli.parallel.ranks import RankGroup, first_result

if TYPE_CHECKING:
    from mlacli.ops import Act, Ops, Step
    from mlacli.parallel.plan import ShardPlan
    from mlacli.params import ContextParams, SamplingParams

Forward = Callable[["Step"], "Act | None"]


class Ranks:
    """The ranks of one engine: their ops, the group that loads them, and how a step runs on all.

    `forwards` are the model as each rank runs it. This form runs them in a thread each.
    """

    ops: Sequence[Ops]
    n_ahead = 0  # steps that may begin before the logits of one are asked for
    sums = ""  # how GPUs add their partials, and why so; "" where none has to

    def __init__(
        self, ops: Sequence[Ops], group: RankGroup, blas: BlasThreads | None = None
    ) -> None:
        self.ops, self.group = ops, group
        self._blas = blas  # None on GPUs

    def start(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int], forwards: Sequence[Forward], capture: bool = True,
    ) -> Callable[[], Any]:  # fmt: skip
        """Begins one step; the result waits for its logits and gives them as a host array, once.

        A backend may `capture` and replay a step.
        """
        import numpy as np

        def one_rank(rank: int) -> Any:
            ops: Any = self.ops[rank]
            with np.errstate(all="ignore"):  # the sampler refuses logits that are not finite
                return forwards[rank](ops.step(tokens, n_past, frequencies, out_rows))

        logits = first_result(self.group.run(one_rank))
        return lambda: logits

    def compile(
        self, frequencies: Sequence[float], forwards: Sequence[Forward],
        report: Callable[[int, int], None] | None = None,
    ) -> int:  # fmt: skip
        """How many kernels of coming steps had to be compiled; `report` counts them, of how many.

        A lone call before the first `start`, without which steps compile what they need.
        """
        return 0

    @property
    def n_captured(self) -> int:
        """Steps of new kinds that were captured so far: the first of its kind takes longer."""
        return 0

    def can_sample(self, sampling: SamplingParams, banned: Iterable[int]) -> bool:
        """Whether `execute_ahead` takes these settings; else the engine samples."""
        return False

    def execute_ahead(
        self, token: int, n_past: int, n_steps: int, frequencies: Sequence[float],
        sampling: SamplingParams, seed: int, banned: Iterable[int], forwards: Sequence[Forward],
    ) -> list[int]:  # fmt: skip
        """Up to `n_steps` tokens after `token`, each drawn from the logits before it, at one go.

        At least one. `banned` ids are never drawn.
        """
        raise AssertionError("can_sample() said no")

    def capture_ahead(
        self, frequencies: Sequence[float], sampling: SamplingParams, forwards: Sequence[Forward]
    ) -> None:
        """What `execute_ahead` will run is made ready now, so that no token waits for it."""

    @property
    def nccl_bytes(self) -> dict[str, tuple[int, int]]:
        """What NCCL holds of each GPU for itself, as measured; of that, what it had before.

        Empty where it has no part.
        """
        return {}

    def explained(self) -> AbstractContextManager[None]:
        """Inside, a device's errors come out as MlacliErrors that name it."""
        return nullcontext()

    def take_turn(self) -> None:
        """The BLAS threads are the process's: set them anew where engines work in turns."""
        if self._blas is not None:
            self._blas.apply()

    def close(self) -> None:
        self.group.close()
        if self._blas is not None:
            self._blas.release()


def open_ranks(plan: ShardPlan, context: ContextParams, hp: Any, n_threads: int) -> Ranks:
    """The ranks of `plan`, talking as its split mode needs; BLAS threads divided among them."""
    if any(rank.kind == "cuda" for rank in plan.ranks):
        from mlacli.backends.cuda_ranks import CudaRanks

        return CudaRanks(plan, context, hp)
    from mlacli.backends.numpy_ops import NumpyOps, join_columns, reduce_typed

    n = len(plan.ranks)
    exchange = Exchange(n, join_columns) if n > 1 else None

    def comm(rank: int) -> Comm:
        if exchange is None:
            return SoloComm()
        if plan.mode == "graph":
            return ThreadComm(exchange, rank, reduce_typed(context.graph_reduce_type))
        return PipeComm(exchange, rank)

    ops = [NumpyOps(comm(rank.rank), context, rank.dequant) for rank in plan.ranks]
    return Ranks(ops, RankGroup(n, exchange), BlasThreads(max(1, n_threads // n)))
