"""Every op in plain NumPy: the definition that other backends must agree with.

Float32 throughout; -gap f16 rounds query, cached row as read and probabilities, sums stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlacli.attention_forms import SPARSE, AttentionForm, heads_at_once
from mlacli.backends import numpy_dsa
from mlacli.backends.numpy_attention import (
    AbsorbedKeys,
    ExpandedKeys,
    HeadKeys,
    Keys,
    blockwise,
    expand,
    join_heads,
    whole_matrix,
)
from mlacli.backends.numpy_cache import STORED, Ints, LatentRows
from mlacli.backends.numpy_weights import DequantCache, Floats, NumpyWeight
from mlacli.composed_ops import ComposedOps
from mlacli.loading.weights import from_float32, to_float32
from mlacli.ops import LayerCache, LayerWeights, Step
from mlacli.parallel.comm import Comm
from mlacli.params import ContextParams

if TYPE_CHECKING:
    from mlacli.models.parts import Routing, Temperature
    from mlacli.parallel.shards import Shard


@dataclass(frozen=True, slots=True)
class Chosen:
    """Expert ids and weights [n, n_used]."""

    ids: Ints
    weights: Floats


class NumpyOps(ComposedOps):
    """The ops of one CPU rank; `dequant` bounds the float32 copies of its weights."""

    def __init__(self, comm: Comm, context: ContextParams, dequant: int) -> None:
        self.comm, self.context = comm, context
        self.cache = DequantCache(dequant)
        self.forms = set()

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

    def new_rows(
        self, n_ctx: int, width: int, cache_type: str, transposed: bool = False
    ) -> LatentRows:
        return LatentRows(n_ctx, width, cache_type, transposed)

    def read_rows(self, rows: LatentRows, n: int) -> Floats:
        return rows.read(0, n)

    def write_rows(self, rows: LatentRows, values: Floats) -> None:
        rows.write(np.arange(len(values)), values)

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

    def store_columns(self, columns: LatentRows, c_kv: Floats, step: Step) -> None:
        columns.write(step.pos, c_kv)

    def store_heads(
        self, keys: LatentRows, values: LatentRows, c_kv: Floats, k_pe: Floats,
        k_b: NumpyWeight, v_b: NumpyWeight, step: Step,
    ) -> None:  # fmt: skip
        k, v = expand(c_kv, k_pe, self._dense(k_b), self._dense(v_b))
        keys.write(step.pos, k.reshape(step.n, -1))
        values.write(step.pos, v.reshape(step.n, -1))

    def attend_absorbed(
        self, q_lat: Floats, q_pe: Floats, kv: LayerCache, r: int, step: Step, scale: float,
        blockwise: bool,
    ) -> Floats:  # fmt: skip
        rounded = self._rounding(blockwise)
        keys = AbsorbedKeys(join_heads(q_lat, q_pe), kv.rows, kv.columns, r, rounded)
        return self._attend(keys, step, scale, AttentionForm("absorbed", blockwise))

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
        self, q_lat: Floats, q_pe: Floats, kv: LayerCache, chosen: Ints, r: int, step: Step,
        scale: float,
    ) -> Floats:  # fmt: skip
        self.forms.add(SPARSE)
        q, rounded = np.concatenate([q_lat, q_pe], axis=-1), self._rounding(self.context.flash_attn)
        return numpy_dsa.attend(q, kv.rows, chosen, r, step, scale, rounded)

    def attend_expanded(
        self, q_nope: Floats, q_pe: Floats, kv: LayerCache, k_b: NumpyWeight, v_b: NumpyWeight,
        step: Step, scale: float,
    ) -> Floats:  # fmt: skip
        up_k, up_v, rounded = self._dense(k_b), self._dense(v_b), self._rounding(True)
        keys = ExpandedKeys(join_heads(q_nope, q_pe), kv.rows, up_k, up_v, rounded)
        return self._attend(keys, step, scale, AttentionForm("expanded", True))

    def attend_heads(
        self, q_nope: Floats, q_pe: Floats, kv: LayerCache, step: Step, scale: float,
        blockwise: bool,
    ) -> Floats:  # fmt: skip
        q, rounded = join_heads(q_nope, q_pe), self._rounding(blockwise)
        keys = HeadKeys(q, kv.keys, kv.values, rounded)
        return self._attend(keys, step, scale, AttentionForm("per-head", blockwise))

    def _attend(self, keys: Keys, step: Step, scale: float, form: AttentionForm) -> Floats:
        self.forms.add(form)
        if form.blockwise:
            return blockwise(keys, step.pos, step.n_kv, scale, self._rounding(True))
        at_once = heads_at_once(self.context, len(keys.q), step.n, step.n_kv)
        return whole_matrix(keys, step.pos, step.n_kv, scale, at_once)

    def _rounding(self, blockwise: bool) -> Callable[[Floats], Floats]:
        """-gap: block-wise attention rounds query, cached row as read and probabilities."""
        if not blockwise or self.context.graph_attn_precision == "f32":
            return lambda x: x
        return lambda x: x.astype(np.float16).astype(np.float32)

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
        qtype = STORED[reduce_type]
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
