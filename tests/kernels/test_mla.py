"""Absorbed attention's kernels run on the CPU through their host functions, against float64 of the
same rounded inputs and against the NumPy backend.

Weakest link: what the shim can't show (races, cp.async's order, clusters); tests/gpu has those.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.launcher import Launcher
from kit.simt import why_not
from kit.simt_device import SimtDevice
from kit.tiled import tile_weight

from mlacli.backends import cuda_attention as attention
from mlacli.backends.cuda_attention import CacheRows
from mlacli.backends.numpy_attention import AbsorbedKeys, blockwise, join_heads
from mlacli.backends.numpy_cache import LatentRows
from mlacli.loading.quant_types import BF16, F16, F32, Q8_0, QType
from mlacli.loading.weights import from_float32, to_float32
from mlacli.models.parts import Temperature

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
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
    name: str
    shape: tuple[int, ...]
    qtype: QType
    tiles: Any
    values: Host

    @classmethod
    def of(cls, ops: Launcher, values: Host, qtype: QType) -> "Weight":
        raw = from_float32(values.astype(np.float32), qtype)
        tiles = ops.put(tile_weight(raw, qtype.name, values.shape))
        return cls("w", values.shape, qtype, tiles, to_float32(raw, qtype))


def half(x: Host) -> Host:
    return x.astype(np.float16).astype(np.float32)


def step_of(ops: Launcher, pos: list[int], p: int) -> Step:
    angles = np.maximum(pos, 0)[:, None] * 1e4 ** (-2 * np.arange(p // 2) / p)
    tables = (ops.put(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    return Step(ops.put(np.array(pos, np.int32)), *tables)


def cached(ops: Launcher, rows: Host, n_ctx: int, cache_type: str) -> tuple[CacheRows, LatentRows]:
    """The first rows filled in by the NumPy cache, the others NaN; that cache beside it."""
    width = rows.shape[1]
    numpy = LatentRows(n_ctx, width, cache_type)
    numpy.poison()
    numpy.write(np.arange(len(rows)), rows)
    raw = numpy._rows
    if cache_type != "q8_0":
        return CacheRows(cache_type, width, ops.put(raw.copy())), numpy
    blocks = raw.reshape(n_ctx, -1, 34)
    scales, values = blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:]
    values = values.reshape(n_ctx, -1).view(np.int8)
    return CacheRows(cache_type, width, ops.put(values), ops.put(scales)), numpy


def exact(q: Host, rows: Host, pos: list[int], r: int, scale: float, chosen: Any = None) -> Host:
    """Attention in float64 [n, h, r]; 0 for tokens at pos -1."""
    out = np.zeros((*q.shape[:2], r))
    for t, last in enumerate(pos):
        seen = np.arange(last + 1) if chosen is None else chosen[t]
        keys = rows[seen[(seen >= 0) & (seen <= last)]].astype(np.float64)
        if len(keys):
            scores = q[t].astype(np.float64) @ keys.T * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[t] = weights @ keys[:, :r] / weights.sum(-1, keepdims=True)
    return out


CASES = [  # h, r, p, positions, cache type, sharpness
    (1, 32, 8, [0], "f16", 1), (3, 32, 8, [63], "f16", 4), (5, 32, 8, [64], "f16", 1),
    (16, 32, 8, [400], "f16", 1), (20, 32, 8, [333], "f16", 8), (64, 32, 8, [130], "f16", 1),
    (5, 32, 8, [199, 200, 201, -1], "f16", 4), (16, 48, 16, list(range(9)), "f16", 1),
    (5, 32, 8, [90, 91, -1], "bf16", 1), (5, 32, 8, [90, 91, -1], "f32", 1),
    (20, 32, 8, [90, 91, -1], "q8_0", 4), (3, 512, 64, [70], "f16", 1),
    (3, 256, 64, [70], "q8_0", 1),
]  # fmt: skip


@pytest.mark.parametrize("h, r, p, pos, cache_type, sharp", CASES)
def test_attention(h: int, r: int, p: int, pos: list[int], cache_type: str, sharp: float) -> None:
    attended(Launcher(SimtDevice()), h, r, p, pos, cache_type, sharp)


@pytest.mark.parametrize("h, r, p, pos, cache_type, sharp", [c for c in CASES if c[4] == "f16"])
def test_attention_with_rows_by_bulk_copies(
    h: int, r: int, p: int, pos: list[int], cache_type: str, sharp: float
) -> None:
    ops = Launcher(SimtDevice(n_sm=2, capability=90))
    attended(ops, h, r, p, pos, cache_type, sharp, early=True)


def attended(
    ops: Launcher, h: int, r: int, p: int, pos: list[int], cache_type: str, sharp: float,
    early: bool = False,
) -> None:  # fmt: skip
    """Runs a case and compares it."""
    rng, scale = np.random.default_rng(0), 1 / np.sqrt(r + p)
    rows = rng.standard_normal((max(pos) + 1, r + p)).astype(np.float32)
    kv, numpy = cached(ops, rows, max(pos) + 40, cache_type)
    q = half(rng.standard_normal((len(pos), h, r + p)) * sharp)
    step = step_of(ops, pos, p)
    device_q = ops.put(q.astype(np.float16))
    parts = attention.attend(ops, device_q, kv, step, r, scale, True, early=early)
    got = ops.get(attention.merge(ops, parts, step))
    n_kv = max(pos) + 1
    want = exact(q, half(numpy.read(0, n_kv)), pos, r, scale)
    assert nmse(got, want) <= PROBABILITIES if want.any() else not got.any()
    there = np.array(pos) >= 0
    assert not got[~there].any()
    keys = AbsorbedKeys(join_heads(q[..., :r], q[..., r:])[:, there], numpy, None, r, half)
    theirs = blockwise(keys, np.array(pos)[there], n_kv, scale, half)
    assert nmse(got[there], theirs) <= PROBABILITIES


@pytest.mark.parametrize("gap", ["f16", "f32"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_attention_to_chosen_rows(cache_type: str, gap: str) -> None:
    rng, ops, r, p, h = np.random.default_rng(1), Launcher(SimtDevice()), 32, 8, 5
    pos, top_k = [150, 199, -1], 70
    kv, numpy = cached(ops, rng.standard_normal((200, r + p)).astype(np.float32), 230, cache_type)
    chosen = np.sort([rng.permutation(200)[:top_k] for _ in pos], 1).astype(np.int32)
    chosen[1, -3:] = -1
    q, step = half(rng.standard_normal((3, h, r + p))), step_of(ops, pos, p)
    device_q = ops.put(q.astype(np.float16 if gap == "f16" else np.float32))
    parts = attention.attend(ops, device_q, kv, step, r, 0.3, gap == "f16", ops.put(chosen))
    got = ops.get(attention.merge(ops, parts, step))
    seen = numpy.read(0, 200)
    want = exact(q, half(seen) if gap == "f16" else seen, pos, r, 0.3, chosen)
    assert nmse(got, want) <= (PROBABILITIES if gap == "f16" else 1e-12)
    assert not got[2].any()


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "f32", "q8_0"])
def test_attention_without_rounding(cache_type: str) -> None:
    rng, ops, r, p = np.random.default_rng(2), Launcher(SimtDevice()), 48, 16
    kv, numpy = cached(ops, rng.standard_normal((90, r + p)).astype(np.float32), 100, cache_type)
    q, pos = rng.standard_normal((2, 3, r + p)).astype(np.float32), [88, 89]
    step = step_of(ops, pos, p)
    parts = attention.attend(ops, ops.put(q), kv, step, r, 0.2, False)
    got = ops.get(attention.merge(ops, parts, step))
    assert nmse(got, exact(q, numpy.read(0, 90), pos, r, 0.2)) <= 1e-12


LATENT = [  # positions, k_b's type, cache type, half, temperature
    ([7], Q8_0, "f16", True, None), ([7, 8, 9], F16, "q8_0", True, Temperature(0.1, 3)),
    ([3, 4, -1], BF16, "bf16", False, None), (list(range(4, 15)), Q8_0, "f32", False, None),
    ([5, 6, 7, 8, 9], F32, "f16", True, Temperature(0.1, 3)), ([-1], Q8_0, "f16", True, None),
    ([*range(30), -1], Q8_0, "f16", True, Temperature(0.1, 3)),
]  # fmt: skip


@pytest.mark.parametrize("pos, qtype, cache_type, halved, temperature", LATENT)
def test_latent(
    pos: list[int], qtype: QType, cache_type: str, halved: bool, temperature: Temperature | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rng, ops, h, r, k, p = np.random.default_rng(3), Launcher(SimtDevice()), 3, 48, 64, 8
    n, n_ctx, eps, there = len(pos), max(pos) + 9, 1e-6, np.array(pos) >= 0
    values = rng.standard_normal((h, r, k)).astype(np.float32)
    k_b = Weight("k_b", values.shape, F32, None, values)
    if qtype is not F32:
        k_b = Weight.of(ops, values, qtype)
    q = rng.standard_normal((n, h, k + p)).astype(np.float32)
    new = (3 * rng.standard_normal((n, r + p))).astype(np.float32)
    norm = rng.standard_normal(r).astype(np.float32)
    q_lat = np.einsum("hrk,nhk->nhr", k_b.values.astype(np.float64), q[..., :k])
    kv, numpy = cached(ops, np.zeros((0, r + p), np.float32), n_ctx, cache_type)
    before = [None if a is None else ops.get(a).copy() for a in (kv.values, kv.scales)]
    plain = ops.put(q_lat.astype(np.float32))  # the plain product has its own tests
    monkeypatch.setattr(attention, "_plain_heads", lambda *_: plain)
    device, step = ops.put(new), step_of(ops, pos, p)
    got = ops.get(
        attention.latent(ops, ops.put(q), device[:, :r], device[:, r:], ops.put(norm), eps, k_b, kv,
                         step, halved, temperature)
    ).astype(np.float32)  # fmt: skip
    cos, sin = (ops.get(a) for a in (step.cos, step.sin))

    def rotated(x: Host) -> Host:
        c, s, y = (cos, sin, np.empty_like(x)) if x.ndim == 2 else (cos[:, None], sin[:, None],
                                                                    np.empty_like(x))  # fmt: skip
        y[..., ::2], y[..., 1::2] = (x[..., ::2] * c - x[..., 1::2] * s,
                                     x[..., ::2] * s + x[..., 1::2] * c)  # fmt: skip
        return y

    want = np.concatenate([q_lat, rotated(q[..., k:])], -1)
    if temperature is not None:
        grown = np.log1p(np.maximum(pos, 0) // temperature.length)
        want *= (1 + temperature.scale * grown)[:, None, None]
    if there.any():
        assert nmse(got[there], want[there]) <= (
            1e-10 if not halved else MANY if n > 8 else PROBABILITIES
        )
    c_kv = new[:, :r] / np.sqrt((new[:, :r] ** 2).mean(-1, keepdims=True) + np.float32(eps)) * norm
    rows = np.concatenate([c_kv, rotated(new[:, r:])], -1)
    numpy.write(np.array(pos)[there], rows[there])
    close = np.full((n_ctx, r + p), np.nan, np.float32)
    if cache_type == "q8_0":
        raw = ops.get(kv.values).reshape(n_ctx, -1, 32) * ops.get(kv.scales)[..., None].astype("f4")
        close = raw.reshape(n_ctx, -1)[:, : r + p]
    else:
        close = ops.get(kv.values)
        close = (close.astype(np.uint32) << 16).view("f4") if cache_type == "bf16" else close
    written = np.array(pos)[there]
    theirs = numpy.take(written)
    step_size = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2}[cache_type]
    assert np.allclose(close[written], theirs, step_size, 1e-6)
    assert np.mean(close[written] == theirs) > 0.5 if len(written) and cache_type != "f32" else True
    untouched = np.delete(np.arange(n_ctx), written)
    for array, old in zip((kv.values, kv.scales), before, strict=True):
        if array is not None:
            assert np.array_equal(ops.get(array)[untouched], old[untouched], equal_nan=True)


def test_store_writes_what_latent_writes() -> None:
    rng, ops, r, p, pos = np.random.default_rng(5), Launcher(SimtDevice()), 48, 8, [4, 5, -1]
    k_b = Weight.of(ops, rng.standard_normal((3, r, 32)), Q8_0)
    new, step = ops.put(rng.standard_normal((3, r + p)).astype(np.float32)), step_of(ops, pos, p)
    norm, q = (ops.put(rng.standard_normal(shape).astype("f4")) for shape in (r, (3, 3, 32 + p)))
    given = new[:, :r], new[:, r:], norm, 1e-6
    caches = [cached(ops, np.zeros((0, r + p), np.float32), 9, "q8_0")[0] for _ in range(2)]
    attention.store(ops, *given, caches[0], step)
    attention.latent(ops, q, *given, k_b, caches[1], step, True)
    for name in ("values", "scales"):
        alone, beside = (ops.get(getattr(kv, name)) for kv in caches)
        assert np.array_equal(alone, beside, equal_nan=True)


@pytest.mark.parametrize(
    "n, qtype, v", [(1, Q8_0, 40), (5, F16, 32), (17, Q8_0, 40), (33, BF16, 136)]
)
def test_combine(n: int, qtype: QType, v: int) -> None:
    rng, ops, h, r, p = np.random.default_rng(4), Launcher(SimtDevice()), 3, 64, 8
    pos = [*range(60, 60 + n - 1), -1] if n > 1 else [60]
    kv, numpy = cached(ops, rng.standard_normal((60 + n, r + p)).astype("f4"), 90 + n, "f16")
    q, step = half(rng.standard_normal((n, h, r + p))), step_of(ops, pos, p)
    v_b = Weight.of(ops, rng.standard_normal((h, v, r)), qtype)
    parts = attention.attend(ops, ops.put(q.astype(np.float16)), kv, step, r, 0.2, True)
    o = ops.get(attention.combine(ops, parts, v_b, step)).reshape(n, h, v)
    lat = exact(q, half(numpy.read(0, 60 + n)), pos, r, 0.2)
    assert nmse(o, np.einsum("hvr,nhr->nhv", v_b.values.astype(np.float64), lat)) <= MANY
