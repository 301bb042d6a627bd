"""Products of few tokens against float64: cases that run on a GPU and on the CPU by simt.h.

Each returns what differs from float64 as NMSE. Weakest link: gguf-py's unpacking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kit.tiled import qtype_of, random_rows, tile_weight

from mlacli.backends import cuda_matvec as few
from mlacli.loading.quant_types import QType

EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Held:
    """As CudaWeight, with its values in float64."""

    shape: tuple[int, ...]
    qtype: QType
    values: np.ndarray
    raw: Any = None
    tiles: Any = None
    skip: int = 0
    block: None = None  # on the device
    first: int = 0


def weight(
    ops: Any, rng: np.random.Generator, name: str, shape: tuple[int, ...], skip: int = 0,
    first: int = 0,
) -> Held:  # fmt: skip
    q = qtype_of(name)
    raw, values = random_rows(name, shape, skip, rng)
    if name == "F32":
        return Held(shape, q, values, raw=ops.put(raw), first=first)
    tiles = ops.put(tile_weight(raw, name, shape, skip))
    return Held(shape, q, values, tiles=tiles, skip=skip, first=first)


def vector(ops: Any, values: np.ndarray) -> Held:
    q = qtype_of("F32")
    raw = ops.put(values.astype(np.float32).view(np.uint8))
    return Held(values.shape, q, values.astype(np.float64), raw=raw)


def rms(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPS) * w


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.sum((got - want) ** 2) / np.sum(want**2))


def inputs(
    ops: Any, rng: np.random.Generator, n: int, n_in: int, normed: bool, scale: float = 1.0
) -> tuple[Any, np.ndarray, Any]:
    """(x as rows of a wider array, what the weight meets, norm)."""
    wide = rng.standard_normal((n, n_in + 8)).astype(np.float32) * np.float32(scale)
    x = ops.put(wide)[:, 4 : 4 + n_in]
    values = wide[:, 4 : 4 + n_in].astype(np.float64)
    if not normed:
        return x, values, None
    w = vector(ops, rng.uniform(0.5, 1.5, n_in).astype(np.float32))
    return x, rms(values, w.values), (w, EPS)


def products(
    ops: Any, rng: np.random.Generator, n: int, n_in: int, rows: dict[str, int] | list[Any],
    normed: bool = False, add: bool = False, skip: int = 0, scale: float = 1.0,
    geometry: Any = None,
) -> float:  # fmt: skip
    pairs = list(rows.items()) if isinstance(rows, dict) else rows
    ws = [weight(ops, rng, name, (r, n_in), skip) for name, r in pairs]
    x, values, norm = inputs(ops, rng, n, n_in, normed, scale)
    outs = [ops.new((n, r + 3)) for _, r in pairs]
    before = np.zeros((n, pairs[0][1]))
    if add:
        start = rng.standard_normal((n, pairs[0][1] + 3)).astype(np.float32)
        outs[0] = ops.put(start)
        before = start[:, :-3].astype(np.float64)
    segments = [(w, out[:, : w.shape[0]]) for w, out in zip(ws, outs, strict=True)]
    few.products(ops, segments, x, norm, add, geometry)
    worst = 0.0
    for w, out in zip(ws, outs, strict=True):
        got = ops.get(out)
        assert add or np.isnan(got[:, -3:]).all(), "writes beyond its rows"
        want = values @ w.values.T
        worst = max(worst, nmse(got[:, :-3] - before, want) if add else nmse(got[:, :-3], want))
    return worst


def product_stream(
    ops: Any, rng: np.random.Generator, n_in: int, name: str, rows: int, normed: bool, how: Any
) -> float:
    w = weight(ops, rng, name, (rows, n_in))
    x, values, norm = inputs(ops, rng, 1, n_in, normed)
    y = ops.new((1, rows))
    few.product_stream(ops, w, y, x, norm, how)
    return nmse(ops.get(y), values @ w.values.T)


def gated(
    ops: Any, rng: np.random.Generator, n: int, n_in: int, rows: int, gate: str, up: str,
    normed: bool = True, geometry: Any = None,
) -> float:  # fmt: skip
    g, u = (weight(ops, rng, name, (rows, n_in)) for name in (gate, up))
    x, values, norm = inputs(ops, rng, n, n_in, normed)
    h = ops.new((n, rows))
    few.gated(ops, g, u, h, x, norm, geometry)
    return nmse(ops.get(h), swiglu(values @ g.values.T, values @ u.values.T))


@dataclass(frozen=True)
class Experts:
    """Sizes and types of routed (gate, up, down) and shared (the same) experts; up "": merged."""

    types: tuple[str, str, str]
    shared: tuple[str, str, str] | None
    n: int = 1
    d: int = 256
    f: int = 64
    fs: int = 96
    n_experts: int = 7
    first: int = 0
    held: int = 7
    n_used: int = 3
    skip: int = 0
    add: bool = False
    after_up: bool = True
    padded: bool = False  # the last token is none


def experts(
    ops: Any, rng: np.random.Generator, case: Experts, up_how: Any = None, down_how: Any = None
) -> tuple[float, float]:  # fmt: skip
    """NMSE of h and of y."""
    c = case
    n, K, d, f = c.n, c.n_used, c.d, c.f
    merged = c.types[1] == ""
    gate = weight(ops, rng, c.types[0], (c.held, 2 * f if merged else f, d), first=c.first)
    up = None if merged else weight(ops, rng, c.types[1], (c.held, f, d), first=c.first)
    down = weight(ops, rng, c.types[2], (c.held, d, f), c.skip, first=c.first)
    fs = c.fs if c.shared else 0
    shared = None
    if c.shared:
        shared = [weight(ops, rng, t, (fs, d)) for t in c.shared[:2]]
        shared.append(weight(ops, rng, c.shared[2], (d, fs)))
    ids = np.stack([rng.permutation(c.n_experts)[:K] for _ in range(n)]).astype(np.int32)
    if c.padded:
        ids[-1] = -1
    weights = rng.uniform(0.1, 1, (n, K)).astype(np.float32)
    x, values, norm = inputs(ops, rng, n, d, True)
    h, y = ops.new((n, K * f + fs)), ops.new((n, d))
    before = rng.standard_normal((n, d)).astype(np.float32) * np.float32(c.add)
    if c.add:
        y = ops.put(before)
    device_ids, device_weights = ops.put(ids), ops.put(weights)
    few.experts_up(
        ops, h, device_ids, x, gate, up, None if shared is None else (shared[0], shared[1]), norm,
        up_how,
    )  # fmt: skip
    few.experts_down(
        ops, y, h, device_ids, device_weights, down, None if shared is None else shared[2], c.add,
        c.after_up, down_how,
    )  # fmt: skip
    got_h, got_y = ops.get(h), ops.get(y)
    want_h, want_y = np.full(got_h.shape, np.nan), np.zeros((n, d))
    for t in range(n):
        for s, e in enumerate(ids[t] - c.first):
            if ids[t, s] < 0 or not 0 <= e < c.held:
                continue
            u = gate.values[e, f:] if merged else up.values[e]
            part = swiglu(values[t] @ gate.values[e, :f].T, values[t] @ u.T)
            want_h[t, s * f : (s + 1) * f] = part
            want_y[t] += weights[t, s] * (down.values[e] @ part)
        if shared:
            part = swiglu(values[t] @ shared[0].values.T, values[t] @ shared[1].values.T)
            want_h[t, K * f :] = part
            want_y[t] += shared[2].values @ part
    there = ~np.isnan(want_h)
    assert np.isnan(got_h[~there]).all(), "writes slots that are not here"
    return nmse(got_h[there], want_h[there]), nmse(got_y - before, want_y)


def route(
    ops: Any, rng: np.random.Generator, n: int, d: int, n_experts: int, routing: Any,
    gate_type: str = "F32", bias: bool = False, padded: bool = False, imposed: bool = False,
    times: int = 2,
) -> float:  # fmt: skip
    """NMSE of the weights; the ids must be those of NumPy in float64 (there are no ties)."""
    gate = weight(ops, rng, gate_type, (n_experts, d))
    x, values, norm = inputs(ops, rng, n, d, True)
    b = rng.standard_normal(n_experts).astype(np.float32) * 0.1 if bias else None
    pos = np.arange(n, dtype=np.int32)
    if padded:
        pos[-1] = -1
    K = routing.n_used
    fixed = np.stack([rng.permutation(n_experts)[:K] for _ in range(n)]).astype(np.int32)
    ids, weights = ops.new((n, K), np.int32), ops.new((n, K))
    counter = ops.put(np.zeros(1, np.int32))
    biases = None if b is None else vector(ops, b)
    where, given = ops.put(pos), ops.put(fixed) if imposed else None
    for _ in range(times):  # the counter is as it was afterwards
        few.route(
            ops, ids, weights, ops.new((n, n_experts)), counter, gate, x, routing, norm,
            biases, where, given,
        )  # fmt: skip
    assert ops.get(counter)[0] == 0
    logits = values @ gate.values.T
    want_ids, want = choose(logits, b, routing)
    if imposed:
        want_ids, want = choose(logits, b, routing, fixed)
    want_ids[pos < 0], want[pos < 0] = -1, 0
    assert np.array_equal(ops.get(ids), want_ids), (ops.get(ids), want_ids)
    return nmse(ops.get(weights), want)


def choose(
    logits: np.ndarray, bias: np.ndarray | None, routing: Any, fixed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    if routing.sigmoid:
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    select = scores if bias is None else scores + bias
    if routing.n_groups > 1:
        grouped = select.reshape(len(select), routing.n_groups, -1)
        best = np.sort(grouped, -1)[..., -2 if routing.sigmoid else -1 :].sum(-1)
        order = np.argsort(-best, -1, kind="stable")[:, : routing.n_groups_used]
        kept = np.zeros(best.shape, bool)
        np.put_along_axis(kept, order, True, -1)
        select = np.where(kept[..., None], grouped, -np.inf).reshape(select.shape)
    ids = np.argsort(-select, -1, kind="stable")[:, : routing.n_used] if fixed is None else fixed
    weights = np.take_along_axis(scores, ids, -1)
    if routing.renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids.astype(np.int32), weights * routing.scale
