"""Expanded prefill's cases and what they must give, for the CPU and the GPU tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from kit.tiled import tile_weight

from mlacli.backends.cuda_prefill import Sizes, attend_expanded
from mlacli.models.parts import Temperature

V2_LITE = Sizes(16, 512, 128, 64, 128)
GLM_FLASH = Sizes(20, 512, 192, 64, 256)
MISTRAL = Sizes(32, 256, 64, 64, 128)
TOY = Sizes(4, 32, 16, 8, 16)


@dataclass(frozen=True)
class Case:
    """n tokens of which the last n_padded are none, after n_past rows."""

    sizes: Sizes
    n: int
    n_past: int
    n_padded: int = 0
    cache: str = "f16"
    weights: tuple[str, str] = ("F16", "F16")  # of k_b and v_b
    tiled: bool = False  # weights in tiles, else in raw GGUF bytes
    sharp: float = 1.0  # standard deviation of scores
    temperature: Temperature | None = None
    n_free: int = 300  # NaN rows past the last token's

    @property
    def n_kv(self) -> int:
        return self.n_past + self.n - self.n_padded


@dataclass
class Weight:
    """GGUF bytes [.., row bytes] and the values they stand for, in float32."""

    name: str
    raw: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, name: str) -> Weight:
        qtype = GGMLQuantizationType[name]
        raw = quantize(values, qtype).view(np.uint8)
        return cls(name, raw, dequantize(raw, qtype).reshape(values.shape))

    def put(self, ops: Any, tiled: bool) -> Any:
        """As a CudaWeight, or what of it attend_expanded reads."""
        shape, qtype = self.values.shape, SimpleNamespace(id=int(GGMLQuantizationType[self.name]))
        raw = None if tiled else ops.put(self.raw)
        tiles = ops.put(tile_weight(self.raw, self.name, shape)) if tiled else None
        return SimpleNamespace(
            shape=shape, qtype=qtype, raw=raw, tiles=tiles, row_bytes=self.raw.shape[-1]
        )


@dataclass
class Inputs:
    q: np.ndarray
    rows: np.ndarray  # as cached, NaN where nothing is
    k_b: Weight
    v_b: Weight
    pos: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


def inputs(case: Case, seed: int = 0) -> Inputs:
    rng, s = np.random.default_rng(seed), case.sizes

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    pos = np.arange(case.n_past, case.n_past + case.n, dtype=np.int32)
    if case.n_padded:
        pos[-case.n_padded :] = -1
    rows = normal(case.n_kv + case.n_free, s.r + s.p)
    rows[case.n_kv :] = np.nan
    k_b = normal(s.h, s.r, s.k) / np.float32(np.sqrt(s.r))
    v_b = normal(s.h, s.v, s.r) / np.float32(np.sqrt(s.r))
    q = normal(case.n, s.h * (s.k + s.p)) * np.float32(case.sharp)
    if case.n_padded:
        q[-case.n_padded :] = np.nan
    angle = np.maximum(pos, 0)[:, None] * 1e4 ** (-2 * np.arange(s.p // 2) / s.p)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    k_b, v_b = (Weight.of(*pair) for pair in zip((k_b, v_b), case.weights, strict=True))
    return Inputs(q, rows, k_b, v_b, pos, cos, sin)


def cached(x: Inputs, cache: str) -> np.ndarray:
    """The rows in the cache's type: bf16 as uint16, q8_0 as int8 without its scales."""
    if cache == "q8_0":
        return quantized(x)[0]
    if cache == "bf16":
        return ((x.rows.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return x.rows.astype({"f16": np.float16, "f32": np.float32}[cache])


def quantized(x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The rows as q8_0: int8 [t, 32 * blocks] and float16 scales [t, blocks], NaN where x's are."""
    padded = np.pad(x.rows, ((0, 0), (0, -x.rows.shape[1] % 32)))
    blocks = padded.reshape(len(padded), -1, 32)
    scales = np.abs(blocks).max(-1) / 127
    with np.errstate(invalid="ignore"):
        numbers = np.nan_to_num(np.round(blocks / scales[..., None]), nan=127)
    return numbers.astype(np.int8).reshape(len(padded), -1), scales.astype(np.float16)


def values_of(x: Inputs, cache: str) -> np.ndarray:
    """What the cached rows stand for."""
    stored = cached(x, cache)
    if cache == "q8_0":
        scales = np.repeat(quantized(x)[1].astype(np.float32), 32, axis=1)
        return (stored * scales)[:, : x.rows.shape[1]]
    if cache == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored


class Attention:
    """A case's inputs on a device; called, it launches the kernels and returns their result."""

    def __init__(self, ops: Any, case: Case, x: Inputs) -> None:
        self.ops, self.case = ops, case
        self.step = SimpleNamespace(
            n=case.n, n_kv=case.n_kv, pos=ops.put(x.pos), cos=ops.put(x.cos), sin=ops.put(x.sin)
        )
        self.kv = SimpleNamespace(
            cache_type=case.cache, values=ops.put(cached(x, case.cache)),
            scales=ops.put(quantized(x)[1]) if case.cache == "q8_0" else None,
        )  # fmt: skip
        self.q = ops.put(x.q)
        self.weights = x.k_b.put(ops, case.tiled), x.v_b.put(ops, case.tiled)

    def __call__(self) -> Any:
        s = self.case.sizes
        return attend_expanded(
            self.ops, self.q, self.kv, *self.weights, self.step, s, float((s.k + s.p) ** -0.5),
            self.case.temperature,
        )  # fmt: skip

    def refill(self, x: Inputs) -> None:
        """Other tokens and rows in the same places; the weights stay."""
        places = (self.q, self.kv.values, self.step.pos, self.step.cos, self.step.sin)
        hosts = (x.q, cached(x, self.case.cache), x.pos, x.cos, x.sin)
        for place, host in zip(places, hosts, strict=True):
            self.ops.copy_in(place, host)

    def result(self, o: Any) -> np.ndarray:
        """o [n, h, v] on the host."""
        o16 = self.ops.get(o).astype(np.float64)
        return np.asarray(16.0 * o16.reshape(self.case.n, self.case.sizes.h, -1))


def run(ops: Any, case: Case, x: Inputs) -> np.ndarray:
    """o [n, h, v] of the kernels."""
    attention = Attention(ops, case, x)
    return attention.result(attention())


def expected(
    case: Case, x: Inputs, tokens: np.ndarray, heads: list[int], rounded: bool
) -> np.ndarray:
    """o [len(tokens), len(heads), v] in float64; `rounded` rounds where the kernels do."""
    s = case.sizes

    def f16(a: np.ndarray) -> np.ndarray:
        return a.astype(np.float16).astype(np.float64) if rounded else a.astype(np.float64)

    def up(w: np.ndarray) -> np.ndarray:  # in tiles they are rounded after scaling
        return w.astype(np.float64) if case.tiled else f16(w)

    rows = f16(values_of(x, case.cache)[: case.n_kv])
    c_kv, k_pe = rows[:, : s.r], rows[:, s.r :]
    q = x.q[tokens].astype(np.float64).reshape(len(tokens), s.h, -1)
    even, odd = q[..., s.k :: 2].copy(), q[..., s.k + 1 :: 2].copy()
    cos, sin = x.cos[tokens, None].astype(np.float64), x.sin[tokens, None].astype(np.float64)
    q[..., s.k :: 2], q[..., s.k + 1 :: 2] = even * cos - odd * sin, even * sin + odd * cos
    if t := case.temperature:
        q *= (1 + t.scale * np.log1p(np.maximum(x.pos[tokens], 0) // t.length))[:, None, None]
    q, out = f16(q), np.zeros((len(tokens), len(heads), s.v))
    for i, head in enumerate(heads):
        keys = np.hstack([f16(c_kv @ up(x.k_b.values[head])), k_pe])
        values = f16(c_kv @ up(x.v_b.values[head]).T)
        scores = q[:, head] @ keys.T * (s.k + s.p) ** -0.5
        scores[np.arange(case.n_kv) > x.pos[tokens, None]] = -np.inf
        top = scores.max(axis=1, keepdims=True)
        p = np.exp(scores - np.where(np.isinf(top), 0, top))
        total = p.sum(axis=1, keepdims=True)
        out[:, i] = f16(p) @ values / np.where(total == 0, 1, total)
    return out


def compare(
    case: Case, x: Inputs, got: np.ndarray, n_tokens: int = 10**9
) -> tuple[float, float, str]:
    """NMSE against float64 and against float64 with the kernels' roundings; where it is worst."""
    rng, s = np.random.default_rng(1), case.sizes
    tokens = np.arange(case.n)
    if case.n > n_tokens:
        ends = [0, 1, 63, 64, 127, 128, case.n - case.n_padded - 1, case.n - 1]
        some = np.r_[ends, rng.integers(0, case.n, n_tokens - len(ends))]
        tokens = np.unique(some[some < case.n])
    heads = sorted({0, s.h // 2, s.h - 1})
    got, errors, worst = got[tokens][:, heads], [], ""
    for rounded in (False, True):
        want = expected(case, x, tokens, heads, rounded)
        wrong = np.abs(got - want)
        wrong = np.where(np.isnan(wrong), np.inf, wrong)
        errors.append(float((wrong**2).sum() / (want**2).sum()))
        at = np.unravel_index(wrong.argmax(), wrong.shape)
        worst = (
            f"token {tokens[at[0]]} head {heads[at[1]]} value {at[2]}: {got[at]:.6g}, want "
            f"{want[at]:.6g}; {(wrong > 0.02 * np.abs(want).max()).mean():.1%} far off"
        )
    return errors[0], errors[1], worst


def few(sizes: Sizes, h: int) -> Sizes:
    """The same with h heads."""
    return replace(sizes, h=h)
