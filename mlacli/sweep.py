"""The sweep-bench loop: decode and prefill speed at every depth of the context.

At each depth the decode comes first and is rewound, then one ubatch is prefilled, which makes the
depth of the next row. Yields rows, prints nothing; nothing but this and `Engine.timings` times
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlacli.errors import UsageError

if TYPE_CHECKING:
    from mlacli.engine import Engine

_SEED = 42  # of the random token ids: the same ones in every run


@dataclass(frozen=True, slots=True)
class SweepRow:
    """pp tokens prefilled in t_pp seconds and tg decoded in t_tg, both from depth n_kv on."""

    pp: int
    tg: int
    n_kv: int
    t_pp: float
    t_tg: float

    @property
    def speed_pp(self) -> float:
        return self.pp / self.t_pp

    @property
    def speed_tg(self) -> float:
        return self.tg / self.t_tg


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
    engine: Engine, shape: SweepShape, *, repetitions: int = 1, warmup_batch: bool = False
) -> Iterator[SweepRow]:
    """One row per depth. `repetitions` average the first row only, as in ik_llama.cpp."""
    random = np.random.default_rng(_SEED)
    n_vocab = int(engine.decode(0).shape[-1])  # one token warms the decode path up
    if warmup_batch:
        engine.rewind(0)
        engine.prefill(random.integers(n_vocab, size=shape.pp).tolist())
    for n_kv in shape.depths:
        times = repetitions if n_kv == 0 else 1
        t_tg = t_pp = 0.0
        for _ in range(times):
            engine.rewind(n_kv)
            ids = random.integers(n_vocab, size=shape.tg).tolist()
            start = time.perf_counter()
            for token_id in ids:
                engine.decode(token_id)
            t_tg += time.perf_counter() - start
        for _ in range(times):
            engine.rewind(n_kv)
            ids = random.integers(n_vocab, size=shape.pp).tolist()
            start = time.perf_counter()
            engine.prefill(ids)
            t_pp += time.perf_counter() - start
        yield SweepRow(shape.pp, shape.tg, n_kv, t_pp / times, t_tg / times)
