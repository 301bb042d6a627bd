"""Prefill's products on a device (a GPU, or kit/simt_device.py) against NumPy.

Each check runs host functions of backends/cuda_gemm.py and yields (case, NMSE against the same
rounding in float64, NMSE against none, where they differ most).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from kit.tiled import boost, cut_row, qtype_of, scaled_values, tile_weight
from kit.toy_gguf import random_weight

from mlacli.backends import cuda_gemm as gemm
from mlacli.backends.cuda_acts import Chosen
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.loading.tiles import tiled_shape

Report = tuple[str, float, float, str]


class Weight:
    """A random weight on the device; `exact` and `rounded` its values in float64."""

    def __init__(
        self, ops: Any, name: str, shape: tuple[int, ...], rng: Any, skip: int = 0, first: int = 0
    ) -> None:
        q = qtype_of(name)
        held, own = cut_row(name, shape[-1], skip)
        raw = random_weight((*shape[:-1], held), T[name], rng).view(np.uint8)
        raw = raw.reshape(*shape[:-1], -1)
        flat = raw.reshape(-1, raw.shape[-1])
        tiles = tile_weight(raw, name, shape, skip)
        by = 1.0 if name == "F16" else boost(tiles[:4].view(np.float32)[0])

        def local(values: np.ndarray) -> np.ndarray:
            return values.astype(np.float64).reshape(*shape[:-1], held)[..., own]

        self.exact = local(dequantize(flat, T[name]))
        self.rounded = local(scaled_values(flat, name, by)) / by
        self.held = CudaWeight(
            name, shape, q, ops.put(tiles), tiled_shape(shape, q, skip), skip, first
        )


def plain(ops: Any, values: np.ndarray) -> CudaWeight:
    """A float32 weight in GGUF bytes."""
    raw = ops.put(np.ascontiguousarray(values).view(np.uint8))
    return CudaWeight("w", values.shape, qtype_of("F32"), raw)


def rounded16(x: np.ndarray) -> np.ndarray:
    """What a float16 activation of value / 16 holds, in float64."""
    return np.clip(x / 16, -65504, 65504).astype(np.float16).astype(np.float64) * 16


def put16(ops: Any, x: np.ndarray) -> Any:
    """x [n, ..] as float16 activations of rows padded to 8."""
    padded = np.ones((*x.shape[:-1], -(-x.shape[-1] // 8) * 8), np.float16)
    padded[..., : x.shape[-1]] = np.clip(x / 16, -65504, 65504)
    return ops.put(padded)[..., : x.shape[-1]]


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    return (
        float(np.mean((got - want) ** 2) / np.mean(want**2))
        if want.any()
        else float(np.abs(got).max(initial=0))
    )


def report(case: str, got: np.ndarray, rounded: np.ndarray, exact: np.ndarray) -> Report:
    got = got.astype(np.float64)
    off = np.abs(got - rounded)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(off), np.inf, off)), off.shape)
    where = f"{tuple(map(int, worst))}: {got[worst]:.6g} not {rounded[worst]:.6g}"
    return case, nmse(got, rounded), nmse(got, exact), where


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dense(
    ops: Any, types: tuple[str, ...], rows: tuple[int, ...], cols: int, n: int, skip: int, seed: int
) -> Iterator[Report]:
    """products() stored, added and as float16, of weights with one input."""
    rng = np.random.default_rng(seed)
    ws = [Weight(ops, t, (r, cols), rng, skip) for t, r in zip(types, rows, strict=True)]
    x = rng.standard_normal((n, cols), np.float32)
    x16, xr = put16(ops, x), rounded16(x)
    case = f"{'+'.join(types)} {rows}x{cols} n {n} skip {skip}"
    ys = [ops.put(np.full((n, r), np.nan, np.float32)) for r in rows]
    gemm.products(ops, [(w.held, y) for w, y in zip(ws, ys, strict=True)], x16)
    for w, y in zip(ws, ys, strict=True):
        yield report(case, ops.get(y), xr @ w.rounded.T, x.astype(float) @ w.exact.T)
    old = rng.standard_normal((n, rows[0]), np.float32)
    y = ops.put(old)
    gemm.products(ops, [(ws[0].held, y)], x16, add=True)
    yield report(case + " add", ops.get(y), xr @ ws[0].rounded.T + old, x @ ws[0].exact.T + old)
    y = gemm.rows16(ops, n, rows[0])
    gemm.products(ops, [(ws[0].held, y)], x16, scale=1.0)  # a sixteenth again
    want = (xr @ ws[0].rounded.T / 16).astype(np.float32).astype(np.float16)
    got = whole_rows(ops, y)[:, : rows[0]]
    yield report(case + " half", got, want.astype(float), x.astype(float) @ ws[0].exact.T / 16)


def whole_rows(ops: Any, y: Any) -> np.ndarray:
    """A float16 array with its rows' padding."""
    from mlacli.backends.cuda_array import Array

    return ops.get(Array.dense(y.ptr, (y.shape[0], y.stride(0)), y.dtype))


def per_head(
    ops: Any, name: str, h: int, out: int, cols: int, n: int, seed: int
) -> Iterator[Report]:
    rng = np.random.default_rng(seed)
    w = Weight(ops, name, (h, out, cols), rng)
    x = rng.standard_normal((n, h, cols), np.float32)
    y = ops.put(np.full((n, h, out), np.nan, np.float32))
    gemm.heads(ops, w.held, y, put16(ops, x))
    want = [np.einsum("nhi,hoi->nho", a, b) for a, b in ((rounded16(x), w.rounded), (x, w.exact))]
    yield report(f"heads {name} {h}x{out}x{cols} n {n}", ops.get(y), *want)


def swiglu(
    ops: Any, types: tuple[str, str], rows: int, cols: int, n: int, seed: int
) -> Iterator[Report]:
    rng = np.random.default_rng(seed)
    gate, up = (Weight(ops, t, (rows, cols), rng) for t in types)
    x = 3 * rng.standard_normal((n, cols), np.float32)
    h = gemm.gated(ops, gate.held, up.held, put16(ops, x))
    xr = rounded16(x)
    want = (silu(xr @ gate.rounded.T) * (xr @ up.rounded.T) / 16).astype(np.float16).astype(float)
    exact = silu(x @ gate.exact.T) * (x @ up.exact.T) / 16
    got = whole_rows(ops, h)[:, :rows]
    yield report(f"gated {types} {rows}x{cols} n {n}", got, want, exact)


def routed(
    ops: Any, types: tuple[str, str, str], n: int, n_used: int, n_experts: int, d: int, f: int,
    seed: int, held: tuple[int, int] | None = None, merged: bool = False, skip: int = 0,
) -> Iterator[Report]:  # fmt: skip
    """experts() and what moe_sort makes; with `held` = (first, count) of the experts."""
    rng = np.random.default_rng(seed)
    first, count = held or (0, n_experts)
    if merged:
        both = Weight(ops, types[0], (count, 2 * f, d), rng, first=first)
        parts = [(both.rounded[:, :f], both.exact[:, :f]), (both.rounded[:, f:], both.exact[:, f:])]
        gate, up = both.held, None
    else:
        g, u = (Weight(ops, t, (count, f, d), rng, first=first) for t in types[:2])
        parts, gate, up = [(w.rounded, w.exact) for w in (g, u)], g.held, u.held
    down = Weight(ops, types[2], (count, d, f), rng, skip, first=first)
    parts.append((down.rounded, down.exact))
    x = rng.standard_normal((n, d), np.float32)
    ids = np.argsort(rng.random((n, n_experts)) * np.linspace(0.3, 1, n_experts), axis=1)
    ids = np.ascontiguousarray(ids[:, :n_used], np.int32)
    ids[rng.integers(0, n)] = -1  # a padded token
    weights = rng.random((n, n_used), np.float32)
    old = rng.standard_normal((n, d), np.float32)
    y = ops.put(old)
    chosen = Chosen(ops.put(ids), ops.put(weights))
    gemm.experts(ops, put16(ops, x), chosen, gate, up, down.held, y, add=True)
    sums = []
    for i, values in enumerate((rounded16(x), x.astype(np.float64))):
        total = old.astype(np.float64)
        for e in range(count):
            t, k = np.nonzero(ids == first + e)
            h = silu(values[t] @ parts[0][i][e].T) * (values[t] @ parts[1][i][e].T)
            out = (rounded16(h) if i == 0 else h) @ parts[2][i][e].T
            out = rounded16(out) if i == 0 else out
            np.add.at(total, t, weights[t, k, None] * out)
        sums.append(total)
    case = f"experts {types} n {n} top {n_used} of {n_experts} held {held} merged {merged}"
    yield report(case, ops.get(y), *sums)


def crowded(ops: Any, n: int, seed: int) -> list[np.ndarray]:
    """experts() of the same tokens again and again, most of which one expert has.

    Which of its slots share a tile, and how wide that is, may change from run to run.
    """
    rng = np.random.default_rng(seed)
    gate, up = (Weight(ops, "Q4_K", (8, 96, 256), rng).held for _ in range(2))
    down = Weight(ops, "Q8_0", (8, 256, 96), rng).held
    x16 = put16(ops, rng.standard_normal((n, 256), np.float32))
    ids = np.stack([rng.integers(0, 2, n), rng.integers(2, 8, n)], axis=1).astype(np.int32)
    chosen = Chosen(ops.put(ids), ops.put(rng.random((n, 2), np.float32)))
    runs = []
    for _ in range(4):
        y = ops.put(np.zeros((n, 256), np.float32))
        gemm.experts(ops, x16, chosen, gate, up, down, y, add=False)
        runs.append(ops.get(y))
    return runs


def sorting(
    ops: Any, n: int, n_used: int, n_experts: int, first: int, held: int, seed: int,
    tile: int = 128,
) -> None:  # fmt: skip
    """Slots in order of their expert; tiles cover each held slot once, wide ones first."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, n_experts, (n, n_used)).astype(np.int32)
    if seed % 2:
        ids[:, 0] = first  # an expert that everybody wants
    order = gemm.sort(ops, ops.put(ids), first, held, tile)
    local = ids.ravel() - first
    here = np.flatnonzero((local >= 0) & (local < held))
    want = here[np.argsort(local[here], kind="stable")]
    slots = ops.get(order.slots)[: len(here)]
    assert sorted(slots) == sorted(want), "every slot once"
    assert (local[slots] == local[want]).all(), "slots are in order of their expert"
    ends = ops.get(order.ends)
    tiles = ops.get(order.tiles)[: ends[3]]
    assert (np.diff(ends) >= 0).all()
    widths = np.searchsorted(-tile // 4 * np.array([3, 2, 1, 0]), -tiles[:, 2], side="right")
    wanted = np.searchsorted(ends, np.arange(ends[3]), side="right")
    assert (widths == wanted).all(), (tiles, ends)
    covered = np.concatenate([np.arange(s, s + c) for _, s, c, _ in tiles] or [[]])
    assert sorted(covered) == list(range(len(here)))
    for e, start, size, _ in tiles:
        assert (local[slots[start : start + size]] == e).all()


def rows(ops: Any, n: int, d: int, seed: int) -> Iterator[Report]:
    """norm16() with and without a sum before it, to16()."""
    rng = np.random.default_rng(seed)
    x, add = 50 * rng.standard_normal((n, d), np.float32), rng.standard_normal((n, d), np.float32)
    x[0, 0], w = 1e9, rng.standard_normal(d).astype(np.float32)
    y16 = gemm.to16(ops, ops.put(x))
    got = whole_rows(ops, y16)
    inside = np.clip(x, -65504 * 16, 65504 * 16)
    yield report(f"to16 {n}x{d}", got[:, :d].astype(np.float64) * 16, rounded16(x), inside)
    x[0, 0] = 1
    weight = plain(ops, w)
    for more in (None, add):
        values = (x + (0 if more is None else more)).astype(np.float64)
        want = values / np.sqrt(np.mean(values**2, axis=1, keepdims=True) + 1e-6) * w
        held = ops.put(x)
        y, y16 = gemm.norm16(
            ops, held, weight, 1e-6, None if more is None else ops.put(more), keep=True
        )
        yield report(f"norm16 {n}x{d}", ops.get(y), want, want)
        whole = whole_rows(ops, y16)[:, :d].astype(np.float64) * 16
        yield report(f"norm16 {n}x{d} half", whole, rounded16(ops.get(y)), want)
        if more is not None:
            yield report("sum", ops.get(held), (x + more).astype(float), values)


def scores(ops: Any, n: int, n_experts: int, d: int, seed: int) -> Iterator[Report]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d), np.float32)
    gate = rng.standard_normal((n_experts, d), np.float32)
    y = gemm.route_scores(ops, ops.put(x), plain(ops, gate))
    want = x.astype(float) @ gate.astype(float).T
    yield report(f"scores {n}x{n_experts}x{d}", ops.get(y), want, want)
