"""Absorbed attention on one GPU, through its host functions, against float64 of the same inputs.

Weakest link: the reference takes the queries and rows that the kernels rounded to float16.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.launcher import Launcher
from kit.tiled import tile_weight

from mlacli.backends import cuda_attention as attention
from mlacli.backends.cuda_attention import CacheRows
from mlacli.backends.numpy_cache import LatentRows
from mlacli.loading.quant_types import BF16, F16, Q8_0, QType
from mlacli.loading.weights import from_float32, to_float32

Host = np.ndarray[Any, Any]
PROBABILITIES = 1e-7  # NMSE of rounding them to float16: about 4e-8 where the softmax is flat
MANY = 3e-7  # a product with float16 weights and activations: 4e-8 each, and another rounding


@dataclass
class Step:
    pos: Any
    cos: Any
    sin: Any


@dataclass
class Weight:
    shape: tuple[int, ...]
    qtype: QType
    tiles: Any
    values: Host


def half(x: Host) -> Host:
    return x.astype(np.float16).astype(np.float32)


def step_of(ops: Launcher, pos: list[int], p: int) -> tuple[Step, Host, Host]:
    angles = np.maximum(pos, 0)[:, None] * 1e4 ** (-2 * np.arange(p // 2) / p)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Step(ops.put(np.array(pos, np.int32)), ops.put(cos), ops.put(sin)), cos, sin


def weight(ops: Launcher, shape: tuple[int, ...], qtype: QType, rng: np.random.Generator) -> Weight:
    values = rng.standard_normal(shape) / np.sqrt(shape[-1])
    raw = from_float32(values.astype(np.float32), qtype)
    tiles = ops.put(tile_weight(raw, qtype.name, shape))
    return Weight(shape, qtype, tiles, to_float32(raw, qtype).astype(np.float64))


def cached(ops: Launcher, rows: Host, n_ctx: int, cache_type: str) -> tuple[CacheRows, LatentRows]:
    """The first rows filled in by the NumPy cache, the others NaN; that cache beside it."""
    width, numpy = rows.shape[1], LatentRows(n_ctx, rows.shape[1], cache_type)
    numpy.poison()
    numpy.write(np.arange(len(rows)), rows)
    raw = numpy._rows
    if cache_type != "q8_0":
        return CacheRows(cache_type, width, ops.put(raw)), numpy
    blocks = raw.reshape(n_ctx, -1, 34)
    scales, values = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:]
    values = values.reshape(n_ctx, -1).view(np.int8)
    return CacheRows(cache_type, width, ops.put(values), ops.put(scales)), numpy


def exact(q: Host, rows: Host, pos: list[int], r: int, scale: float, chosen: Any = None) -> Host:
    """Attention in float64 [n, h, r]; 0 for tokens at pos -1."""
    out, rows = np.zeros((*q.shape[:2], r)), rows.astype(np.float64)
    for t, last in enumerate(pos):
        seen = np.arange(last + 1) if chosen is None else chosen[t]
        keys = rows[seen[(seen >= 0) & (seen <= last)]]
        if len(keys):
            scores = q[t].astype(np.float64) @ keys.T * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[t] = weights @ keys[:, :r] / weights.sum(-1, keepdims=True)
    return out


@pytest.mark.parametrize("n_kv", [1, 63, 64, 65, 1023, 1024, 16384, 32768])
@pytest.mark.parametrize("h", [1, 3, 5, 16, 20, 64])
def test_decode(ops: Launcher, h: int, n_kv: int) -> None:
    rng, r, p = np.random.default_rng(n_kv), 512, 64
    kv, numpy = cached(ops, rng.standard_normal((n_kv, r + p)).astype("f4"), n_kv + 100, "f16")
    q = half(rng.standard_normal((1, h, r + p)) * (1 if h % 2 else 6))
    (step, *_), device_q = step_of(ops, [n_kv - 1], p), ops.put(q.astype(np.float16))
    got = [
        ops.get(
            attention.merge(ops, attention.attend(ops, device_q, kv, step, r, 0.04, True), step)
        )
        for _ in range(2)
    ]
    assert nmse(got[0], exact(q, numpy.read(0, n_kv), [n_kv - 1], r, 0.04)) <= PROBABILITIES
    assert np.array_equal(*got)


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "f32", "q8_0"])
@pytest.mark.parametrize("h, r, pos", [(16, 512, [3000]), (64, 512, [700, 701, -1]),
                                       (8, 256, [500]), (4, 32, list(range(90, 130)))])  # fmt: skip
def test_cache_types(ops: Launcher, cache_type: str, h: int, r: int, pos: list[int]) -> None:
    rng, p, n_kv = np.random.default_rng(5), 64 if r > 32 else 8, max(pos) + 1
    kv, numpy = cached(ops, rng.standard_normal((n_kv, r + p)).astype("f4"), n_kv + 50, cache_type)
    q, step = half(rng.standard_normal((len(pos), h, r + p))), step_of(ops, pos, p)[0]
    for gap, dtype in ((half, np.float16), (lambda x: x, np.float32)):
        exactly = dtype == np.float32
        parts = attention.attend(ops, ops.put(q.astype(dtype)), kv, step, r, 0.1, not exactly)
        got = ops.get(attention.merge(ops, parts, step))
        want = exact(q, gap(numpy.read(0, n_kv)), pos, r, 0.1)
        assert nmse(got, want) <= (1e-10 if exactly else PROBABILITIES)


@pytest.mark.parametrize("h, cache_type", [(64, "f16"), (8, "q8_0")])
def test_chosen_rows(ops: Launcher, h: int, cache_type: str) -> None:
    rng, r, p, top_k, pos = np.random.default_rng(6), 512, 64, 2048, [4000, 4001, -1]
    kv, numpy = cached(ops, rng.standard_normal((4002, r + p)).astype("f4"), 4096, cache_type)
    chosen = np.sort([rng.permutation(4002)[:top_k] for _ in pos], 1).astype(np.int32)
    chosen[0, -1] = -1
    q, step = half(rng.standard_normal((3, h, r + p))), step_of(ops, pos, p)[0]
    parts = attention.attend(
        ops, ops.put(q.astype(np.float16)), kv, step, r, 0.04, True, ops.put(chosen)
    )
    got = ops.get(attention.merge(ops, parts, step))
    want = exact(q, half(numpy.read(0, 4002)), pos, r, 0.04, chosen)
    assert nmse(got, want) <= PROBABILITIES


WHOLE = [  # r, k, v, h, positions, weights, cache type
    (512, 128, 128, 16, [0], Q8_0, "f16"), (512, 128, 128, 16, [300], Q8_0, "f16"),
    (512, 128, 128, 16, [511], Q8_0, "f16"), (512, 128, 128, 16, [127], Q8_0, "f16"),
    (512, 128, 128, 64, [300], Q8_0, "f16"), (512, 128, 128, 128, [0], Q8_0, "f16"),
    (512, 192, 256, 34, [77], Q8_0, "f16"),
    (512, 128, 128, 3, [128], F16, "f16"), (512, 192, 256, 20, [200], Q8_0, "f16"),
    (512, 192, 256, 20, [3000], F16, "f16"), (256, 64, 128, 8, list(range(9)), Q8_0, "f16"),
    (512, 128, 128, 16, [700, 701, 702, -1], Q8_0, "q8_0"),
    (512, 128, 128, 5, list(range(100, 164)), BF16, "bf16"),
]  # fmt: skip


@pytest.mark.parametrize("r, k, v, h, pos, qtype, cache_type", WHOLE)
def test_three_launches(
    ops: Launcher, r: int, k: int, v: int, h: int, pos: list[int], qtype: QType, cache_type: str
) -> None:
    """latent, attend and combine in a row: rows stored, queries brought over, values expanded."""
    rng, p, n, there = np.random.default_rng(7), 64, len(pos), np.array(pos) >= 0
    n_past, eps, scale = min(pos[0], max(pos)), 1e-6, 0.05
    k_b, v_b = weight(ops, (h, r, k), qtype, rng), weight(ops, (h, v, r), qtype, rng)
    kv, numpy = cached(
        ops, rng.standard_normal((n_past, r + p)).astype("f4"), max(pos) + 70, cache_type
    )
    q = rng.standard_normal((n, h, k + p)).astype(np.float32)
    new = rng.standard_normal((n, r + p)).astype(np.float32)
    norm = rng.standard_normal(r).astype(np.float32)
    step, cos, sin = step_of(ops, pos, p)
    device_new = ops.put(new)
    device_q = attention.latent(
        ops,
        ops.put(q),
        device_new[:, :r],
        device_new[:, r:],
        ops.put(norm),
        eps,
        k_b,
        kv,
        step,
        True,
    )
    parts = attention.attend(ops, device_q, kv, step, r, scale, True, early=True)
    o = ops.get(attention.combine(ops, parts, v_b, step)).reshape(n, h, v)

    def rotated(x: Host, c: Host, s: Host) -> Host:
        even, odd = x[..., ::2], x[..., 1::2]
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(x.shape)

    q_pe = rotated(q[..., k:], cos[:, None], sin[:, None])
    want = np.concatenate([np.einsum("hrk,nhk->nhr", k_b.values, q[..., :k]), q_pe], -1)
    got_q = ops.get(device_q).astype(np.float32)
    assert nmse(got_q[there], want[there]) <= (MANY if n > 8 else PROBABILITIES)
    c_kv = new[:, :r] / np.sqrt((new[:, :r] ** 2).mean(-1, keepdims=True) + np.float32(eps)) * norm
    rows = np.concatenate([c_kv, rotated(new[:, r:], cos, sin)], -1)
    numpy.write(np.array(pos)[there], rows[there])
    seen = half(numpy.read(0, max(pos) + 1))
    lat = exact(np.where(there[:, None, None], got_q, 0), seen, pos, r, scale)
    bar = {"f16": MANY, "bf16": 3e-6, "q8_0": 3e-6}[cache_type]  # a rounding may tip over
    assert nmse(o, np.einsum("hvr,nhr->nhv", v_b.values, lat)) <= bar
    assert not o[~there].any()
    if not attention.is_short(ops, k_b, v_b, kv, n, max(pos) + 1, True):
        return
    stored = ops.get(kv.values[pos[0] : pos[0] + 1])
    ops.device.copy_in(kv.values[pos[0] : pos[0] + 1], np.full_like(stored, np.nan))
    short = [
        ops.get(
            attention.attend_short(
                ops, ops.put(q), device_new[:, :r], device_new[:, r:], ops.put(norm), eps, k_b, v_b,
                kv, step, scale,
            )
        ).reshape(n, h, v)
        for _ in range(2)
    ]  # fmt: skip
    again = ops.get(kv.values[pos[0] : pos[0] + 1]).astype(np.float32)
    assert nmse(again, stored.astype(np.float32)) <= PROBABILITIES
    assert nmse(short[0], np.einsum("hvr,nhr->nhv", v_b.values, lat)) <= bar
    assert np.array_equal(*short)
