"""Every op in plain NumPy: the definition that other backends must agree with.

Float32 throughout; -gap f16 rounds query, cached row as read and probabilities, sums stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlacli.backends import numpy_dsa
from mlacli.backends.numpy_weights import DequantCache, Floats, NumpyWeight
from mlacli.loading.quant_types import BF16, Q8_0, QType
from mlacli.loading.weights import from_float32, to_float32
from mlacli.ops import LayerWeights, Ops, Step
from mlacli.parallel.comm import Comm
from mlacli.parallel.memory import KV_BLOCK
from mlacli.params import ContextParams

if TYPE_CHECKING:
    from mlacli.models.parts import Routing, Temperature
    from mlacli.parallel.shards import Shard

Ints = NDArray[np.int64]
_STORED = {"bf16": BF16, "q8_0": Q8_0}


class LatentRows:
    """Cache rows [n_ctx, width] of one layer in the type of -ctk."""

    def __init__(self, n_ctx: int, width: int, cache_type: str) -> None:
        self.width = width
        self._qtype: QType | None = _STORED.get(cache_type)
        if self._qtype is None:
            self._rows: Any = np.empty((n_ctx, width), cache_type.replace("f", "float"))
        else:
            self._padded = -(-width // self._qtype.block) * self._qtype.block
            self._rows = np.empty((n_ctx, self._qtype.row_bytes(width)), np.uint8)

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes)

    def poison(self) -> None:
        """Fill with NaN bits (tests: nothing may read a row before it is written)."""
        self._rows.view(np.uint8)[:] = 0xFF

    def write(self, pos: Ints, values: Floats) -> None:
        if self._qtype is not None:
            padding = ((0, 0), (0, self._padded - self.width))
            self._rows[pos] = from_float32(np.pad(values, padding), self._qtype)
        else:
            self._rows[pos] = values

    def read(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32 [t, width]."""
        return self._float32(self._rows[start:stop])

    def take(self, wanted: Ints) -> Floats:
        """The wanted rows as float32 [t, width]."""
        return self._float32(self._rows[wanted])

    def _float32(self, rows: Any) -> Floats:
        if self._qtype is not None:
            return to_float32(rows, self._qtype)[:, : self.width]
        values: Floats = rows.astype(np.float32, copy=False)
        return values


@dataclass(frozen=True, slots=True)
class Chosen:
    """Expert ids and weights [n, n_used]."""

    ids: Ints
    weights: Floats


class NumpyOps(Ops):
    """The ops of one CPU rank; `dequant` bounds the float32 copies of its weights."""

    def __init__(self, comm: Comm, context: ContextParams, dequant: int) -> None:
        self.comm, self.context = comm, context
        self.cache = DequantCache(dequant)
        self._half = context.graph_attn_precision == "f16"

    # ---- inputs and weights -----------------------------------------------------------------

    def step(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int],
    ) -> Step:  # fmt: skip
        n = len(tokens)
        pos = np.arange(n_past, n_past + n)
        angles = pos[:, None] * np.array(frequencies)  # float64: long positions need it
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return Step(np.array(tokens), pos, cos, sin, n, n_past + n, out_rows)

    def upload(self, pieces: NDArray[np.uint8], shard: Shard) -> NumpyWeight:
        by_column = shard.axis == len(shard.shape) - 1
        return NumpyWeight(
            shard.tensor, shard.shape, shard.qtype, pieces,
            skip=shard.start % shard.qtype.block if by_column else 0,
            first=shard.start if shard.axis == 0 else 0,
        )  # fmt: skip

    def download(self, w: NumpyWeight) -> NDArray[np.uint8]:
        return w.raw

    def new_rows(self, n_ctx: int, width: int, cache_type: str) -> LatentRows:
        return LatentRows(n_ctx, width, cache_type)

    # ---- products ---------------------------------------------------------------------------

    def embed(self, tokens: Ints, w: NumpyWeight) -> Floats:
        return w.float32(tokens)

    def matmul(self, x: Floats, w: NumpyWeight) -> Floats:
        return self.cache.product(x, w)

    def heads_up(self, x: Floats, w: NumpyWeight) -> Floats:
        y: Floats = self._dense(w) @ x.transpose(1, 2, 0)  # [h, b, a] [h, a, n]
        return y.transpose(2, 0, 1)

    def _dense(self, w: NumpyWeight) -> Floats:
        dense = self.cache.whole(w)
        return w.float32() if dense is None else dense

    # ---- element-wise -----------------------------------------------------------------------

    def rms_norm(self, x: Floats, w: NumpyWeight, eps: float) -> Floats:
        mean = np.mean(x * x, axis=-1, keepdims=True)
        normed: Floats = x / np.sqrt(mean + np.float32(eps)) * self._dense(w)
        return normed

    def layer_norm(self, x: Floats, w: NumpyWeight, bias: NumpyWeight, eps: float) -> Floats:
        centred = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred / np.sqrt(variance + np.float32(eps))
        return np.asarray(normed * self._dense(w) + self._dense(bias))

    def rope(self, x: Floats, step: Step) -> Floats:
        cos, sin = step.cos, step.sin
        if x.ndim == 3:
            cos, sin = cos[:, None], sin[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        y = np.empty_like(x)
        y[..., ::2] = even * cos - odd * sin
        y[..., 1::2] = even * sin + odd * cos
        return y

    def rope_first(self, x: Floats, step: Step) -> Floats:
        p = 2 * step.cos.shape[-1]
        return np.concatenate([self.rope(x[..., :p], step), x[..., p:]], axis=-1)

    def temper(self, q: Floats, temperature: Temperature, step: Step) -> Floats:
        grown = np.log1p((step.pos // temperature.length).astype(np.float32))
        factor = np.float32(1) + np.float32(temperature.scale) * grown
        return np.asarray(q * factor[:, None])

    def silu_mul(self, gate: Floats, up: Floats) -> Floats:
        return gate * _sigmoid(gate) * up

    def add(self, a: Floats, b: Floats) -> Floats:
        return a + b

    def columns(self, x: Floats, start: int, stop: int) -> Floats:
        return x[..., start:stop]

    def rows(self, x: Floats, wanted: Sequence[int]) -> Floats:
        return x[list(wanted)]

    # ---- attention --------------------------------------------------------------------------

    def store(self, rows: LatentRows, c_kv: Floats, k_pe: Floats, step: Step) -> None:
        rows.write(step.pos, np.concatenate([c_kv, k_pe], axis=-1))

    def split_heads(self, q: Floats, k: int, p: int) -> tuple[Floats, Floats]:
        q = q.reshape(len(q), -1, k + p)
        return q[..., :k], q[..., k:]

    def attend_absorbed(
        self, q_lat: Floats, q_pe: Floats, rows: LatentRows, r: int, step: Step, scale: float
    ) -> Floats:
        n, h, _ = q_lat.shape
        # All heads share the keys, so heads times tokens are the rows of one product.
        q = self._round(np.concatenate([q_lat, q_pe], axis=-1))
        q = q.transpose(1, 0, 2).reshape(1, h * n, -1)

        def block(start: int, stop: int) -> tuple[Floats, Floats]:
            keys = self._round(rows.read(start, stop))
            return q @ keys.T * np.float32(scale), keys[None, :, :r]

        o = self._online_softmax(np.tile(step.pos, h), step.n_kv, block)
        return o.reshape(h, n, r).transpose(1, 0, 2)

    def heads(self, x: Floats, n_heads: int) -> Floats:
        return x.reshape(len(x), n_heads, -1)

    def store_index(self, rows: LatentRows, keys: Floats, step: Step) -> None:
        rows.write(step.pos, keys)

    def dsa_select(
        self, q: Floats, weights: Floats, rows: LatentRows, step: Step, top_k: int,
        imposed: Ints | None = None,
    ) -> Ints:  # fmt: skip
        if imposed is not None:
            return np.sort(imposed, axis=1)
        return numpy_dsa.select(q, weights, rows, step, top_k)

    def attend_chosen(
        self, q_lat: Floats, q_pe: Floats, rows: LatentRows, chosen: Ints, r: int, step: Step,
        scale: float,
    ) -> Floats:  # fmt: skip
        q = np.concatenate([q_lat, q_pe], axis=-1)
        return numpy_dsa.attend(q, rows, chosen, r, step, scale, self._round)

    def attend_expanded(
        self, q_nope: Floats, q_pe: Floats, rows: LatentRows, k_b: NumpyWeight,
        v_b: NumpyWeight, step: Step, scale: float,
    ) -> Floats:  # fmt: skip
        up_k, up_v = self._dense(k_b), self._dense(v_b)  # [h, r, k], [h, v, r]
        r = up_k.shape[1]
        q_nope, q_pe = (self._round(q).transpose(1, 0, 2) for q in (q_nope, q_pe))

        def block(start: int, stop: int) -> tuple[Floats, Floats]:
            row = self._round(rows.read(start, stop))
            c_kv, k_pe = row[:, :r], row[:, r:]
            scores = q_nope @ (c_kv @ up_k).transpose(0, 2, 1) + q_pe @ k_pe.T
            return scores * np.float32(scale), c_kv @ up_v.transpose(0, 2, 1)

        return self._online_softmax(step.pos, step.n_kv, block).transpose(1, 0, 2)

    def _online_softmax(
        self, pos: Ints, n_kv: int, block: Callable[[int, int], tuple[Floats, Floats]]
    ) -> Floats:
        """softmax(scores) values [b, m, w], block by block with a running maximum and sum.

        `block(start, stop)` gives scores [b, m, t] and values [b, t, w]; row m sees cache rows up
        to pos[m]. Every row sees position 0, so the first block has no empty row.
        """
        top: Any = np.float32(0)
        total, o = top, top
        for start in range(0, n_kv, KV_BLOCK):
            stop = min(start + KV_BLOCK, n_kv)
            scores, values = block(start, stop)
            if stop - 1 > pos.min():
                scores[:, pos[:, None] < np.arange(start, stop)] = -np.inf
            peak = scores.max(axis=-1, keepdims=True)
            old, top = top, peak if start == 0 else np.maximum(top, peak)
            p = np.exp(scores - top)
            part = p.sum(axis=-1, keepdims=True)
            update = self._round(p) @ values
            if start == 0:
                total, o = part, update
            else:
                keep = np.exp(old - top)
                total, o = total * keep + part, o * keep + update
        return np.asarray(o / total)

    def _round(self, x: Floats) -> Floats:
        return x.astype(np.float16).astype(np.float32) if self._half else x

    # ---- routed experts ---------------------------------------------------------------------

    def route(
        self, x: Floats, gate: NumpyWeight, bias: NumpyWeight | None, routing: Routing
    ) -> Chosen:
        scores = self.matmul(x, gate)
        scores = _sigmoid(scores) if routing.sigmoid else _softmax(scores)
        select = scores if bias is None else scores + self._dense(bias)
        if routing.n_groups > 1:
            select = _limit_groups(select, routing)
        ids = _top(select, routing.n_used)
        weights = np.take_along_axis(scores, ids, axis=-1)  # the bias chooses, it doesn't weigh
        if routing.renormalise:
            weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-20)
        return Chosen(ids, weights * np.float32(routing.scale))

    def moe_up(
        self, x: Floats, chosen: Chosen, w: LayerWeights
    ) -> list[tuple[int, Ints, Ints, Floats]]:
        down: NumpyWeight = w.ffn_down_exps
        held = range(down.first, down.first + down.shape[0])
        out = []
        for e in np.unique(chosen.ids).tolist():
            if e not in held:
                continue
            rows, slots = np.nonzero(chosen.ids == e)
            out.append((e, rows, slots, self._gated_expert(x[rows], w, e)))
        return out

    def _gated_expert(self, x: Floats, w: LayerWeights, e: int) -> Floats:
        if w.ffn_gate_up_exps is None:
            gate = self.cache.product(x, w.ffn_gate_exps, e)
            return self.silu_mul(gate, self.cache.product(x, w.ffn_up_exps, e))
        both = self.cache.product(x, w.ffn_gate_up_exps, e)
        half = both.shape[-1] // 2
        return self.silu_mul(both[:, :half], both[:, half:])

    def moe_down(
        self, h: list[tuple[int, Ints, Ints, Floats]], chosen: Chosen, w: LayerWeights
    ) -> Floats:
        y = np.zeros((len(chosen.ids), w.ffn_down_exps.shape[1]), np.float32)
        for e, rows, slots, act in h:
            part = self.cache.product(act, w.ffn_down_exps, e)
            y[rows] += chosen.weights[rows, slots, None] * part
        return y


def join_columns(parts: list[Floats]) -> Floats:
    """Vocabulary slices put together in rank order."""
    return np.concatenate(parts, axis=-1)


def reduce_typed(reduce_type: str) -> Callable[[Floats], Floats] | None:
    """-grt: rounds partials of more than 32 tokens to the type that would travel."""
    if reduce_type == "f32":
        return None

    def typed(x: Floats) -> Floats:
        if len(x) <= 32:
            return x
        if reduce_type == "f16":
            return x.astype(np.float16).astype(np.float32)
        qtype = _STORED[reduce_type]
        return to_float32(from_float32(np.ascontiguousarray(x), qtype), qtype)

    return typed


def _sigmoid(x: Floats) -> Floats:
    return np.float32(1) / (np.float32(1) + np.exp(-np.maximum(x, np.float32(-80))))


def _softmax(x: Floats) -> Floats:
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


def _top(scores: Floats, k: int) -> Ints:
    """Indices of the k largest [n, k], ties to the lower index."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def _limit_groups(scores: Floats, routing: Routing) -> Floats:
    """-inf outside the best groups: by their maximum (softmax gate) or best two (sigmoid gate)."""
    n, groups = len(scores), routing.n_groups
    grouped = scores.reshape(n, groups, -1)
    best = np.sort(grouped, axis=-1)[..., -2 if routing.sigmoid else -1 :].sum(axis=-1)
    kept = np.zeros((n, groups), bool)
    np.put_along_axis(kept, _top(best, routing.n_groups_used), True, axis=-1)
    return np.where(kept[..., None], grouped, -np.inf).reshape(scores.shape)
