"""The sweep-bench loop: decode and prefill speed at every depth of the context.

At each depth the decode comes first and is rewound, then one ubatch is prefilled, which makes the
depth of the next row. Yields rows, prints nothing; nothing but this and `Engine.timings` times
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mlacli.errors import BackendError, UsageError
from mlacli.params import SamplingParams
from mlacli.sampling import AHEAD, Sampler

if TYPE_CHECKING:
    from mlacli.engine import Engine

T = TypeVar("T")
_GREEDY = Sampler(SamplingParams(temp=0.0))
_SEED = 42  # of the random token ids: the same ones in every run and in every mode


@dataclass(frozen=True, slots=True)
class SweepRow:
    """pp tokens prefilled in t_pp seconds and tg decoded in t_tg, both from depth n_kv on.

    A time that could not be taken is None, and `failed` says why.
    """

    pp: int
    tg: int
    n_kv: int
    t_pp: float | None
    t_tg: float | None
    mode: str = ""
    steps: tuple[float, ...] = ()  # seconds of every decode step
    memory: Mapping[str, int] = field(default_factory=dict)  # bytes in use by device
    peak: int = 0  # largest resident size of the process so far
    failed: str = ""
    attention: Mapping[str, str] = field(default_factory=dict)  # phase -> form that really ran

    @property
    def speed_pp(self) -> float | None:
        return self.pp / self.t_pp if self.t_pp else None

    @property
    def speed_tg(self) -> float | None:
        return self.tg / self.t_tg if self.t_tg else None

    def step_percentile(self, percent: float) -> float | None:
        """Seconds within which `percent` of the decode steps were done."""
        return float(np.percentile(self.steps, percent)) if self.steps else None

    @property
    def vram(self) -> int | None:
        """Bytes in use on all devices that are not the CPU; None where there are none."""
        used = [n for device, n in self.memory.items() if device != "cpu"]
        return sum(used) if used else None


@dataclass(frozen=True, slots=True)
class SweepShape:
    """What is measured where: tokens per row and the depths that have room for them."""

    n_ctx: int
    pp: int
    tg: int

    @property
    def depths(self) -> range:
        """n_kv = 0, pp, 2 pp ... while n_kv + max(pp, tg) <= n_ctx."""
        return range(0, self.n_ctx - max(self.pp, self.tg) + 1, self.pp)

    @property
    def skipped(self) -> int | None:
        """The first depth below n_ctx that has no room for a row, where there is one."""
        first = self.depths[-1] + self.pp
        return first if first < self.n_ctx else None


def sweep_shape(n_ctx: int, n_ubatch: int, n_predict: int = -1) -> SweepShape:
    """pp = n_ubatch; tg = n_predict, or a quarter of n_ubatch where that is not positive."""
    shape = SweepShape(n_ctx, n_ubatch, n_predict if n_predict > 0 else max(1, n_ubatch // 4))
    if not shape.depths:
        raise UsageError(
            f"a row of {max(shape.pp, shape.tg)} tokens does not fit a context of {n_ctx}",
            "give a larger -c, or smaller -ub and -n",
        )
    return shape


def sweep(
    engines: Sequence[Engine], shape: SweepShape, *, repetitions: int = 1, stride: int = 1,
    warmup_batch: bool = False, warm: bool = True,
) -> Iterator[SweepRow]:  # fmt: skip
    """One row per engine and depth, the engines in turn at each depth.

    `warm`: a token is computed before anything is timed, with `warmup_batch` a ubatch too.

    `repetitions` average the first depth only and `stride` N measures every Nth, as in
    ik_llama.cpp. An engine whose prefill fails can't go deeper: that row is its last.
    """
    runs = [_Run(engine, shape) for engine in engines]
    for run in runs:
        if warm:
            run.warm_up(warmup_batch)
    for i, n_kv in enumerate(shape.depths):
        for run in runs:
            row = run.row(n_kv, repetitions if i == 0 else 1, measured=i % stride == 0)
            if row is not None:
                yield row


def _memory(engine: Engine) -> dict[str, int]:
    """Bytes in use; of no device where one failed and doesn't say any more."""
    try:
        return engine.memory()
    except BackendError:
        return {}


class _Run:
    """One engine on its way through the depths, with its own stream of random tokens."""

    def __init__(self, engine: Engine, shape: SweepShape) -> None:
        self.engine, self.shape, self.stopped = engine, shape, False
        self._random = np.random.default_rng(_SEED)
        self._n_vocab = engine.prepared.hparams.n_vocab

    def warm_up(self, with_batch: bool) -> None:
        self.engine.take_turn()
        self.engine.decode(0)
        on_gpu = any(rank.kind == "cuda" for rank in self.engine.prepared.plan.ranks)
        if on_gpu:  # compiles and captures what every row will run
            self._decode(0, [0] * AHEAD)
        if with_batch or on_gpu:
            self.engine.rewind(0)
            self.engine.prefill(self._ids(self.shape.pp))

    def row(self, n_kv: int, times: int, measured: bool) -> SweepRow | None:
        """None where there is nothing to say: a depth that is not measured, or not reached."""
        if self.stopped:
            return None
        engine, shape = self.engine, self.shape
        engine.take_turn()
        steps: list[float] = []
        t_pp = t_tg = 0.0
        failed_tg = failed_pp = ""
        try:
            for _ in range(times):
                ids = self._ids(shape.tg)  # drawn also where nothing is measured, as there
                if measured:
                    taken = self._captured(partial(self._decode, n_kv, ids))
                    steps += taken[1]
                    t_tg += taken[0]
        except Exception as e:  # whatever it is, it belongs into the row
            failed_tg = f"decode: {e}"
        try:
            for _ in range(times):
                prompt = self._ids(shape.pp)
                t_pp += self._captured(partial(self._prefill, n_kv, prompt))
        except Exception as e:
            failed_pp = f"prefill: {e}"
            self.stopped = True
        if not measured and not failed_pp:
            return None
        return SweepRow(
            shape.pp, shape.tg, n_kv,
            None if failed_pp else t_pp / times,
            None if failed_tg or not measured else t_tg / times,
            str(engine.params.split.mode), tuple(steps), _memory(engine), engine.peak_memory(),
            "; ".join(filter(None, (failed_tg, failed_pp))), engine.attention_forms,
        )  # fmt: skip

    def _captured(self, run: Callable[[], T]) -> T:
        """What run() gives; it runs again where a backend had to capture graphs meanwhile.

        That is done once for every kind of step, and belongs to no row.
        """
        before = self.engine.n_captured
        taken = run()
        return taken if self.engine.n_captured == before else run()

    def _decode(self, n_kv: int, ids: list[int]) -> tuple[float, list[float]]:
        """Seconds of all steps and of each; a step ends when its logits are on the host.

        Where the device samples, several steps end together: each counts an equal share.
        """
        self.engine.rewind(n_kv)
        steps: list[float] = []
        token_id, start = ids[0], time.perf_counter()
        while len(steps) < len(ids):
            began = time.perf_counter()
            ahead = self.engine.decode_ahead(token_id, min(AHEAD, len(ids) - len(steps)), _GREEDY)
            if not ahead:
                self.engine.decode(ids[len(steps)])
            n = max(1, len(ahead))
            steps += [(time.perf_counter() - began) / n] * n
            token_id = ahead[-1] if ahead else 0
        return time.perf_counter() - start, steps

    def _prefill(self, n_kv: int, ids: list[int]) -> float:
        self.engine.rewind(n_kv)
        start = time.perf_counter()
        self.engine.prefill(ids)
        return time.perf_counter() - start

    def _ids(self, n: int) -> list[int]:
        ids: list[int] = self._random.integers(self._n_vocab, size=n).tolist()
        return ids
