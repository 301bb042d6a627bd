"""Attention of one CUDA rank: in which form a step attends, over which kernels.

Absorbed on tensor cores (cuda_attention), expanded for many tokens (cuda_prefill), over the rows
that an indexer chose (cuda_sparse); in float32 under -gap f32 and on old devices (cuda_plain).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.attention_forms import SPARSE, AttentionForm, attention_form
from mlacli.backends import cuda_attention as absorbed
from mlacli.backends import cuda_prefill as expanded
from mlacli.backends import cuda_sparse as sparse
from mlacli.backends.cuda_acts import Act
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_attention import CacheRows
from mlacli.backends.cuda_weights import near
from mlacli.parallel.cuda_sizes import bucket

if TYPE_CHECKING:
    from mlacli.backends.cuda_ops import CudaOps
    from mlacli.models.indexer import Indexer
    from mlacli.ops import LayerWeights, Step


class Attention:
    """What a rank keeps between the layers of a step, and its choice of kernels."""

    def __init__(self, ops: CudaOps, hp: Any) -> None:
        self.ops, self.hp = ops, hp
        self._exact = ops.context.graph_attn_precision == "f32"
        self._form = attention_form(ops.context, 1)
        self.chosen: Any = None  # a full layer's choice also serves the shared ones after it

    def take_buffers(self, n_ubatch: int) -> None:
        if self.hp.sparse is not None:
            self.chosen = self.ops.device.take((n_ubatch, self.hp.sparse.top_k), np.int32)

    def new_rows(self, n_ctx: int, width: int, cache_type: str) -> CacheRows:
        return absorbed.new_rows(self.ops.device.take, n_ctx, width, cache_type)

    def new_index_rows(self, n_ctx: int, width: int, cache_type: str) -> sparse.IndexRows:
        return sparse.new_index_rows(self.ops.device.take, n_ctx, width, cache_type)

    def begin_step(self, n: int) -> None:
        """A step of `n` real tokens follows."""
        self._form = attention_form(self.ops.context, n)

    def step_kind(self, n: int, n_kv: int) -> tuple[Any, ...]:
        """What a captured step depends on beside its size."""
        chooses = self.hp.sparse is not None and n_kv > self.hp.sparse.top_k
        context, kind = self.ops.context, (0, False)
        form = attention_form(context, n)
        if form.keys == "expanded":
            size = bucket(n, context.n_ubatch)
            kind = expanded.step_kind(self._sizes(self.hp.H), size, context.n_ctx, n_kv)
        return form, *kind, chooses, n == 1 and n_kv <= 8 * absorbed.SHORT_SHARE

    def _sizes(self, h: int) -> expanded.Sizes:
        return expanded.Sizes(h, self.hp.r, self.hp.k, self.hp.p, self.hp.v)

    def attend(
        self, q: Array, c_kv: Array, k_pe: Array, w: LayerWeights, rows: CacheRows, step: Step,
        chosen: Array | None,
    ) -> Act:  # fmt: skip
        """[n, h * v], once the step's latent rows are in the cache."""
        hp, ops = self.hp, self.ops
        k_b, v_b = (near(ops, weight, step.n) for weight in (w.attn_k_b, w.attn_v_b))
        h, norm, half = k_b.shape[0], w.attn_kv_a_norm.raw, not self._exact
        q = q.reshape(step.n, h, hp.k + hp.p)
        if self._expands(h) and chosen is None:
            ops.forms.add(AttentionForm("expanded", True))
            absorbed.store(ops, c_kv, k_pe, norm, hp.eps, rows, step)
            o16 = expanded.attend_expanded(
                ops, q, rows, k_b, v_b, step, self._sizes(h), hp.softmax_scale, hp.temperature
            )
            return Act((step.n, h * hp.v), f16=o16)
        ops.forms.add(AttentionForm("absorbed", True) if chosen is None else SPARSE)
        if chosen is None and absorbed.is_short(ops, k_b, v_b, rows, step.n, step.n_kv, half):
            o = absorbed.attend_short(
                ops, q, c_kv, k_pe, norm, hp.eps, k_b, v_b, rows, step, hp.softmax_scale,
                hp.temperature,
            )  # fmt: skip
            return Act(o.shape, o)
        q_lat = absorbed.latent(
            ops, q, c_kv, k_pe, norm, hp.eps, k_b, rows, step, half, hp.temperature
        )
        parts = absorbed.attend(
            ops, q_lat, rows, step, hp.r, hp.softmax_scale, half, chosen, early=True
        )
        o = absorbed.combine(ops, parts, v_b, step)
        return Act(o.shape, o)

    def _expands(self, h: int) -> bool:
        """Whether the step under way attends in the expanded form."""
        sizes = self._sizes(h)
        asked = self._form.keys == "expanded" and not self._exact
        return asked and expanded.takes(self.ops.capability, sizes)

    def choose(
        self, x: Act, q_a: Act, w: LayerWeights, rows: sparse.IndexRows, step: Step,
        indexer: Indexer,
    ) -> Array | None:  # fmt: skip
        """The rows that each token attends to; None while the cache holds no more than top_k."""
        ops, chooses = self.ops, step.n_kv > indexer.top_k
        key = ops.new((step.n, indexer.width))
        weights = ops.new((step.n, indexer.n_heads)) if chooses else None
        pairs = [(w.indexer_attn_k, key)]
        q = None
        if weights is not None:
            pairs.append((w.indexer_proj, weights))
            q = ops.new((step.n, indexer.n_heads * indexer.width))
            ops.products(q_a, [(w.indexer_attn_q_b, q)])
        ops.products(x, pairs)
        queries = sparse.index(
            ops, rows, key, w.indexer_k_norm.raw, w.indexer_k_norm_bias.raw, indexer.eps, step, q,
            weights,
        )  # fmt: skip
        if not chooses:
            return None
        into = self.chosen[: step.n]
        imposed = ops.imposed.get(w.indexer_attn_k.name)
        return sparse.select(ops, queries, rows, step, indexer.top_k, imposed, into)
