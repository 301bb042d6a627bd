"""How far logits of a split are from those of one GPU, whose choices are noted and imposed.

A part of validate.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlacli.engine import Engine
from mlacli.parallel.cuda_sizes import FEW

# Of the tests, as NMSE of logits: prefill's activations are float16, decode's attention too.
MANY, FEW_TOKENS = 2e-5, 2e-6

# ---- choices --------------------------------------------------------------------------------

Choices = dict[str, Any]  # ids [n, count] by the name of the weight that chose them


@contextmanager
def noted(engine: Engine, n: int) -> Iterator[Choices]:
    """Inside, steps of `n` tokens of one rank aren't captured, and what they choose is kept."""
    ops: Any = engine._ops(0)
    route, choose, found = ops.route, ops.attention.choose, Choices()

    def noting(name: str, ids: Any) -> None:
        if ids is not None and not ops.device.noting:
            found[name] = ops.device.get(ids)[:n]

    def noted_route(x: Any, gate: Any, *rest: Any) -> Any:
        chosen = route(x, gate, *rest)
        noting(gate.name, chosen.ids)
        return chosen

    def noted_choose(x: Any, q_a: Any, w: Any, *rest: Any) -> Any:
        chosen = choose(x, q_a, w, *rest)
        noting(w.indexer_attn_k.name, chosen)
        return chosen

    engine.watch = lambda layer, residual: None
    ops.route, ops.attention.choose = noted_route, noted_choose
    try:
        yield found
    finally:
        engine.watch = None
        del ops.route, ops.attention.choose


@contextmanager
def imposed(engine: Engine, choices: Choices) -> Iterator[None]:
    """Inside, steps aren't captured, and all ranks choose as told."""
    engine.watch = lambda layer, residual: None
    every: Any = engine._ranks.ops
    for ops in every:
        ops.imposed = choices
    try:
        yield
    finally:
        engine.watch = None
        for ops in every:
            ops.imposed = {}


# ---- logits -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """`n` tokens after `n_kv` cached rows; on the GPU that the others are held against."""

    n: int
    n_kv: int
    choices: Choices
    logits: Any  # [n, V]
    shares: Any  # their softmax

    @property
    def tokens(self) -> list[int]:
        return tokens(self.n, self.n_kv, self.logits.shape[1])


def tokens(n: int, seed: int, n_vocab: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, n_vocab, n)]


@dataclass(slots=True)
class Apart:
    """How far logits are from those of one GPU, over all rows of all cases."""

    kl: list[float] = field(default_factory=list)
    most: float = 0.0  # the largest difference of two logits
    error: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})

    def add(self, got: Any, case: Case, pool: ThreadPoolExecutor) -> None:
        rows = list(pool.map(_row_apart, got, case.logits, case.shares))
        self.kl += [row[0] for row in rows]
        self.most = max(self.most, *(row[1] for row in rows))
        nmse, few = sum(row[2] for row in rows) / sum(row[3] for row in rows), len(got) <= FEW
        self.error[few] = max(self.error[few], nmse if np.isfinite(nmse) else np.inf)

    @property
    def beyond(self) -> str:
        """Which bar was exceeded; empty when none was."""
        many, few = self.error[False], self.error[True]
        return "" if many <= MANY and few <= FEW_TOKENS else f"NMSE {many:.0e}, few {few:.0e}"

    def __str__(self) -> str:
        return f"{statistics.mean(self.kl):.1e}, {self.most:.3f}"


def _row_apart(got: Any, want: Any, shares: Any) -> tuple[float, float, float, float]:
    """KL divergence in nats, of softmax(got) from `shares`, the softmax of `want`;

    largest difference, squared error, squares. Written so that float32 does for next to none.
    """
    off = got - want
    mean, beyond = float(shares @ off), float(shares @ (np.expm1(off) - off))
    kl = np.log1p(beyond + mean) - mean
    return float(kl), float(abs(off).max()), float(off @ off), float(want @ want)
