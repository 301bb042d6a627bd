"""Products of weights in GGUF bytes against float64: cases for a GPU and for the CPU by simt.h.

Each returns NMSE. Weakest link: gguf-py's unpacking; weights of many tokens are compared with their
float16 rounding left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kit.launcher import Launcher
from kit.tiled import qtype_of, random_rows

from mlacli.backends import cuda_gemm as gemm
from mlacli.backends import cuda_raw as raw
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_weights import CudaWeight

RARE = (
    "Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
)  # fmt: skip


class RawOps(Launcher):
    """Launcher with the activations that products ask for."""

    def f32(self, x: Act) -> Any:
        return x.f32

    def f16(self, x: Act) -> Any:
        return gemm.to16(self, x.f32)


@dataclass(frozen=True, eq=False)
class Held:
    """A weight on the device and its values in float64."""

    weight: CudaWeight
    values: np.ndarray


def held(
    ops: Any, rng: np.random.Generator, name: str, shape: tuple[int, ...], skip: int = 0,
    first: int = 0,
) -> Held:  # fmt: skip
    rows, values = random_rows(name, shape, skip, rng)
    return Held(CudaWeight(name, shape, qtype_of(name), ops.put(rows), None, skip, first), values)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert np.isfinite(got).all(), f"first at {np.argwhere(~np.isfinite(got))[0]}"
    return float(np.sum((got - want) ** 2) / np.sum(want**2))


def dense(
    ops: Any, rng: np.random.Generator, name: str, n: int, n_in: int, rows: int, skip: int = 0,
    add: bool = False,
) -> float:  # fmt: skip
    w = held(ops, rng, name, (rows, n_in), skip)
    x = rng.standard_normal((n, n_in), np.float32)
    before = rng.standard_normal((n, rows + 3)).astype(np.float32)
    y = ops.put(before.copy())
    raw.product(ops, Act(x.shape, ops.put(x)), w.weight, y[:, :rows], add)
    got = ops.get(y)
    assert np.array_equal(got[:, rows:], before[:, rows:]), "writes beyond its rows"
    want = x.astype(np.float64) @ w.values.T
    return nmse(got[:, :rows] - (before[:, :rows].astype(np.float64) if add else 0), want)


def heads(
    ops: Any, rng: np.random.Generator, name: str, n: int, h: int, n_in: int, out: int
) -> float:
    w = held(ops, rng, name, (h, out, n_in))
    x = rng.standard_normal((n, h, n_in + 5), np.float32)
    got = ops.get(raw.heads(ops, ops.put(x)[:, :, :n_in], w.weight))
    return nmse(got, np.einsum("nhi,hoi->nho", x[:, :, :n_in].astype(np.float64), w.values))


@dataclass(frozen=True)
class Experts:
    types: tuple[str, str, str]  # gate, up ("": merged into gate), down
    n: int = 2
    n_used: int = 3
    count: int = 6
    d: int = 256
    f: int = 512
    first: int = 0
    here: int = 0  # 0: all
    skip: int = 0
    add: bool = False


def experts(ops: Any, rng: np.random.Generator, case: Experts) -> float:
    here, d, f = case.here or case.count, case.d, case.f
    gate_type, up_type, down_type = case.types
    rows = 2 * f if not up_type else f
    gate = held(ops, rng, gate_type, (here, rows, d), first=case.first)
    up = held(ops, rng, up_type, (here, f, d), first=case.first) if up_type else None
    down = held(ops, rng, down_type, (here, d, f), case.skip, case.first)
    x = rng.standard_normal((case.n, d), np.float32)
    ids = np.stack([rng.permutation(case.count)[: case.n_used] for _ in range(case.n)])
    ids = ids.astype(np.int32)
    ids[0, 0] = -1  # as all of a padded token's
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    start = rng.standard_normal((case.n, d), np.float32)
    y = ops.put(start.copy())
    chosen = Chosen(ops.put(ids), ops.put(weights))
    raw.experts(
        ops, Act(x.shape, ops.put(x)), chosen, gate.weight, None if up is None else up.weight,
        down.weight, y, case.add,
    )  # fmt: skip
    want = np.zeros((case.n, d))
    for t, s in np.ndindex(ids.shape):
        e = ids[t, s] - case.first
        if 0 <= e < here:
            g = gate.values[e, :f] @ x[t].astype(np.float64)
            u = (gate.values[e, f:] if up is None else up.values[e]) @ x[t].astype(np.float64)
            want[t] += weights[t, s] * (down.values[e] @ (g / (1 + np.exp(-g)) * u))
    got = ops.get(y).astype(np.float64) - (start if case.add else 0)
    return nmse(got, want)
