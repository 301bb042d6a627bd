"""The CUDA ranks of one engine: which GPU each is on, and how their steps are launched.

Under -sm graph all ranks are one stage, whose forwards are captured in lockstep, one graph a GPU;
under layer each is a stage of its own, with its own graph; a lone rank is a stage of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends import Forward, Ranks, cuda_device, cuda_devices, cuda_errors, cuda_sampling
from mlacli.backends.cuda_device import Device, Host
from mlacli.backends.cuda_ops import CudaOps
from mlacli.backends.cuda_place import Place
from mlacli.backends.cuda_sources import debugging
from mlacli.backends.cuda_steps import Runner, Stage, Steps
from mlacli.backends.cuda_together import Collectives, Peers, SharedGpu, Together
from mlacli.errors import MlacliError, RankError, UnsupportedFeature
from mlacli.parallel.lockstep import Lockstep
from mlacli.parallel.ranks import RankGroup

if TYPE_CHECKING:
    from mlacli.parallel.plan import RankPlan, ShardPlan
    from mlacli.params import ContextParams, SamplingParams

_REST = 6.0  # seconds in which waits between GPUs end by themselves: more than their limit
_PADDING = 256  # of the arena's addresses


class CudaRanks(Ranks):
    """Ranks on GPUs."""

    ops: list[CudaOps]
    n_ahead: int  # so that all stages have work, and no GPU waits for the host

    def __init__(self, plan: ShardPlan, context: ContextParams, hp: Any) -> None:
        if any(rank.kind != "cuda" for rank in plan.ranks):
            raise UnsupportedFeature(
                "the CPU computes no layers beside a GPU",
                "name no cpu beside GPUs in -dev; -ngl and -ot keep weights in host memory",
            )
        self._context, self._hp, self._steps = context, hp, None
        n, self._together = len(plan.ranks), None
        self.n_ahead = min(n, cuda_device.UNDER_WAY) if plan.mode == "layer" else 1
        self._lockstep = Lockstep(n)
        if plan.mode == "graph" and n > 1:
            widths = [rank.vocab[1] - rank.vocab[0] for rank in plan.ranks]
            self._together = Together(self._lockstep, widths, debugging())
        self.ops = []
        for rank in plan.ranks:
            with self.explained():
                device = self._open(plan, rank)
            peers = None if self._together is None else Peers(self._together, rank.rank, device)
            self.ops.append(CudaOps(peers, context, device, hp))
        super().__init__(self.ops, RankGroup(n, self._lockstep, lambda r: self._device(r).use()))

    _steps: Steps | None
    _together: Together | None
    _unsettled = False  # a step was broken off

    def _open(self, plan: ShardPlan, rank: RankPlan) -> Device:
        """The rank's GPU with an arena of what the plan says."""
        cuda_devices.use_device(rank.device)
        n_rows = 4 * (rank.layers[1] - rank.layers[0])  # a layer's, an indexer's, both with scales
        padding = _PADDING * (len(list(plan.of_rank(rank.rank))) + n_rows)
        nbytes = rank.weights + rank.cache + rank.scratch - rank.sums + padding
        same: Any = next((x.device for x in self.ops if x.device.name == rank.device), None)
        return cuda_device.CudaDevice(rank.device, nbytes, same)

    def _device(self, rank: int) -> Device:
        return self.ops[rank].device

    # ---- steps ------------------------------------------------------------------------------

    def start(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int], forwards: Sequence[Forward], capture: bool = True,
    ) -> Callable[[], Host]:  # fmt: skip
        self._settle()
        with self.explained():
            steps, capture = self.steps(frequencies), capture and not self._compares
            fetch = steps.run(tokens, n_past, out_rows, forwards, capture)

        def logits() -> Host:
            with self.explained():
                found = fetch()
                self._check()
            return found

        return logits

    def compile(
        self, frequencies: Sequence[float], forwards: Sequence[Forward],
        report: Callable[[int, int], None] | None = None,
    ) -> int:  # fmt: skip
        with self.explained():
            return self.steps(frequencies).compile(forwards, self._context.n_ctx, report)

    @property
    def n_captured(self) -> int:
        return 0 if self._steps is None else self._steps.n_captured

    def can_sample(self, sampling: SamplingParams, banned: Iterable[int]) -> bool:
        if self._compares or any(ops.makes_copies(1) for ops in self.ops):
            return False
        return cuda_sampling.can_run(sampling, len(list(banned)))

    def execute_ahead(
        self, token: int, n_past: int, n_steps: int, frequencies: Sequence[float],
        sampling: SamplingParams, seed: int, banned: Iterable[int], forwards: Sequence[Forward],
    ) -> list[int]:  # fmt: skip
        self._settle()
        with self.explained():
            steps, n_vocab = self.steps(frequencies), self._hp.n_vocab
            n_steps = steps.n_ahead(n_past, n_steps)
            ids = steps.run_ahead(token, n_past, n_steps, sampling, seed, banned, n_vocab, forwards)
            self._check()
        return ids

    def capture_ahead(
        self, frequencies: Sequence[float], sampling: SamplingParams, forwards: Sequence[Forward]
    ) -> None:
        if self.can_sample(sampling, ()):
            with self.explained():
                self.steps(frequencies).capture_ahead(forwards, sampling, self._context.n_ctx)

    def steps(self, frequencies: Sequence[float]) -> Steps:
        """Where steps run, made when first asked for: weights and cache lie before its memory."""
        if self._steps is None:
            most, angles = self._context.n_ubatch, np.array(frequencies)
            places = [
                Place(ranks, [self.ops[r] for r in ranks], most, angles) for ranks in self._placed()
            ]
            if self._together is None:
                stages = [Stage([place], self._alone(place)) for place in places]
            else:
                self._together.places = places
                self._together.collectives = self._collectives(places, most)
                stages = [Stage(places, self._in_lockstep, self._together)]
            for place in places:
                place.settle()
            for ops in self.ops if len(places) > 1 else ():
                ops.device.on_delay = self._look_around
            if len(places) > 1 and self._together is not None:
                way = self._together.collectives
                self.sums = f"{way.how} ({way.why})"
            self._steps = Steps(stages, most)
        return self._steps

    def _placed(self) -> list[list[int]]:
        """Ranks that step on one GPU together, in the order of the first of each."""
        if self._together is None:
            return [[rank] for rank in range(len(self.ops))]
        found: dict[str, list[int]] = {}
        for rank in range(len(self.ops)):
            found.setdefault(self._device(rank).name, []).append(rank)
        return list(found.values())

    def _collectives(self, places: Sequence[Place], most: int) -> Collectives:
        how, reduce_type = self._context.comm, self._context.graph_reduce_type
        if len(places) == 1:
            return SharedGpu(places[0].ops, most, reduce_type)
        from mlacli.backends import cuda_collectives as between

        devices: list[Any] = [place.device for place in places]
        gpus = [between.GpuPlace(d, list(p.ranks)) for d, p in zip(devices, places, strict=True)]
        return between.Collectives(gpus, how, reduce_type, most * self._hp.d)

    def _alone(self, place: Place) -> Runner:
        """What runs a function on the one rank of a stage."""
        (rank,) = place.ranks

        def run(fn: Callable[[int], Any]) -> list[Any]:
            try:
                return [fn(rank)]
            except Exception as e:
                if len(self.ops) == 1 or isinstance(e, MlacliError):
                    raise
                raise RankError(rank, e) from e

        return run

    def _in_lockstep(self, fn: Callable[[int], Any]) -> list[Any]:
        def one_rank(rank: int) -> Any:
            with self._lockstep.running():
                return fn(rank)

        return self.group.run(one_rank)

    @property
    def nccl_bytes(self) -> dict[str, tuple[int, int]]:
        if self._steps is None or self._together is None:
            return {}
        found: dict[str, tuple[int, int]] = getattr(self._together.collectives, "nccl_bytes", {})
        return found

    @property
    def _compares(self) -> bool:
        return self._together is not None and self._together.compares

    def _check(self) -> None:
        if self._together is not None:
            self._together.collectives.check()

    # ---- failures ---------------------------------------------------------------------------

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except BaseException as e:
            self._unsettled = True
            gpus = {rank: ops.device for rank, ops in enumerate(self.ops)}
            known = cuda_errors.explained(e, gpus) if isinstance(e, Exception) else None
            if known is None:
                raise
            raise known from e

    @property
    def _between(self) -> Collectives | None:
        """What GPUs wait for each other in."""
        return None if self._together is None else getattr(self._together, "collectives", None)

    def _settle(self) -> None:
        """After a step that was broken off: waits for what runs, and has GPUs count anew.

        One may have got its graph and another not, so that they would wait for each other's steps.
        """
        if not self._unsettled:
            return
        between, until = self._between, time.monotonic() + _REST
        with self.explained():
            for ops in self.ops:
                while between is not None and ops.device.is_busy and time.monotonic() < until:
                    time.sleep(0.001)
            if between is not None and any(ops.device.is_busy for ops in self.ops):
                between.stop()
            for ops in self.ops:
                ops.device.use()
                ops.device.synchronize()
            if between is not None:
                between.reset()
        self._unsettled = False

    def _look_around(self) -> None:
        """A wait takes long: if that is for a GPU that died, its error, and an end of all waits."""
        for ops in self.ops:
            if (death := ops.device.failure()) is not None:
                if self._between is not None:
                    self._between.stop()
                raise death

    def close(self) -> None:
        between = self._between
        freed = between is None or between.stop()
        super().close()
        if not freed or any(ops.device.failure() is not None for ops in self.ops):
            cuda_errors.abandon(self)
            return
        for stage in self._steps.stages if self._steps is not None else ():
            stage.graphs.clear()
        try:
            if between is not None:
                between.close()
        finally:  # also after a GPU failed
            for ops in self.ops:
                ops.device.close()
