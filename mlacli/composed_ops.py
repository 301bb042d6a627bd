"""Coarse ops made of fine ones: what each of them means, for backends without fused kernels.

Fine ops are abstract. Letters as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlacli.attention_forms import attention_form
from mlacli.ops import Act, LayerCache, LayerWeights, Ops, Step, Weight

if TYPE_CHECKING:
    from mlacli.models.indexer import Indexer
    from mlacli.models.parts import Temperature


class ComposedOps(Ops, Protocol):
    """Ops by definition; a backend defines the fine ones."""

    # ---- fine ops ---------------------------------------------------------------------------

    def step(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int],
    ) -> Step:  # fmt: skip
        """The arrays of one forward."""
        ...

    def rope(self, x: Act, step: Step) -> Act:
        """x [n, p] or [n, h, p] with pairs (2i, 2i+1) rotated."""
        ...

    def temper(self, q: Act, temperature: Temperature, step: Step) -> Act:
        """q [n, ...] times 1 + scale * ln(1 + floor(pos / length)) of each token."""
        ...

    def silu_mul(self, gate: Act, up: Act) -> Act:
        """silu(gate) * up."""
        ...

    def add(self, a: Act, b: Act) -> Act: ...

    def columns(self, x: Act, start: int, stop: int) -> Act:
        """The last axis from start to stop."""
        ...

    def store(self, rows: Any, c_kv: Act, k_pe: Act, step: Step) -> None:
        """Write one cache row per token: c_kv, then k_pe."""
        ...

    def store_columns(self, columns: Any, c_kv: Act, step: Step) -> None:
        """Write c_kv to the transposed copy."""
        ...

    def store_heads(
        self, keys: Any, values: Any, c_kv: Act, k_pe: Act, k_b: Weight, v_b: Weight, step: Step
    ) -> None:
        """Expand c_kv and write each head's key and value."""
        ...

    def heads_up(self, x: Act, w: Weight) -> Act:
        """Per head x[:, h] w[h]^T: [n, h, a], [h, b, a] -> [n, h, b]."""
        ...

    def split_heads(self, q: Act, k: int, p: int) -> tuple[Act, Act]:
        """[n, h * (k + p)] -> ([n, h, k], [n, h, p])."""
        ...

    def attend_absorbed(
        self, q_lat: Act, q_pe: Act, kv: LayerCache, r: int, step: Step, scale: float,
        blockwise: bool,
    ) -> Act:  # fmt: skip
        """Softmax over latent rows: [n, h, r]. Values come from the transposed copy if there."""
        ...

    def attend_expanded(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, k_b: Weight, v_b: Weight, step: Step,
        scale: float,
    ) -> Act:  # fmt: skip
        """Block-wise softmax with keys and values built per head, block by block: [n, h, v]."""
        ...

    def attend_heads(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, step: Step, scale: float, blockwise: bool
    ) -> Act:
        """Softmax over cached keys and values of each head: [n, h, v]."""
        ...

    def moe_up(self, x: Act, chosen: Any, w: LayerWeights) -> Any:
        """silu(gate_e x) * up_e x for each chosen expert held here."""
        ...

    def moe_down(self, h: Any, chosen: Any, w: LayerWeights) -> Act:
        """Weighted sum over chosen experts held here [n, d]."""
        ...

    def layer_norm(self, x: Act, w: Weight, bias: Weight, eps: float) -> Act:
        """(x - mean) / sqrt(variance + eps) * w + bias."""
        ...

    def rope_first(self, x: Act, step: Step) -> Act:
        """x [n, i] or [n, I, i] with its first p columns rotated like `rope`, the rest as it is."""
        ...

    def store_index(self, rows: Any, keys: Act, step: Step) -> None:
        """Write one index key per token."""
        ...

    def heads(self, x: Act, n_heads: int) -> Act:
        """[n, I * i] -> [n, I, i]."""
        ...

    def dsa_select(
        self, q: Act, weights: Act, rows: Any, step: Step, top_k: int, imposed: Act | None = None
    ) -> Act:
        """The top_k cache rows of each token in ascending order [n, top_k]; needs n_kv > top_k.

        Row j scores sum_I weights[I] * max(0, q[I] . key_j) / sqrt(I * i); rows beyond the token
        score -inf, ties go to the lower row. `imposed` rows are taken instead (a test hook).
        """
        ...

    def attend_chosen(
        self, q_lat: Act, q_pe: Act, kv: LayerCache, chosen: Act, r: int, step: Step, scale: float
    ) -> Act:
        """Softmax over each token's chosen rows, those beyond the token left out: [n, h, r]."""
        ...

    # ---- coarse ops -------------------------------------------------------------------------

    def host(self, x: Act) -> Any:
        """A host array of an activation."""
        return x

    def new_index_rows(self, n_ctx: int, width: int, cache_type: str) -> Any:
        """As any other rows."""
        return self.new_rows(n_ctx, width, cache_type)

    def project(self, x: Act, q: Weight, kv_a: Weight, r: int) -> tuple[Act, Act, Act]:
        """(q x, c_kv [n, r], k_pe [n, p]): the products of one input."""
        kv = self.matmul(x, kv_a)
        return self.matmul(x, q), self.columns(kv, 0, r), self.columns(kv, r, kv.shape[-1])

    def experts(self, x: Act, chosen: Any, w: LayerWeights) -> Act | None:
        """Weighted sum over chosen experts held here plus the shared expert [n, d]; None: neither.

        `chosen` is None on a rank without routed experts.
        """
        y = None if chosen is None else self.moe_down(self.moe_up(x, chosen, w), chosen, w)
        if w.ffn_down_shexp is not None:
            shared = self.matmul(self.gated(x, w.ffn_gate_shexp, w.ffn_up_shexp), w.ffn_down_shexp)
            y = shared if y is None else self.add(y, shared)
        return y

    def gated(self, x: Act, gate: Weight, up: Weight) -> Act:
        """silu(gate x) * up x."""
        return self.silu_mul(self.matmul(x, gate), self.matmul(x, up))

    def store_kv(
        self, kv: LayerCache, c_kv: Act, k_pe: Act, k_b: Weight, v_b: Weight, step: Step
    ) -> None:
        """Write each token to every part of a layer's cache."""
        if kv.keys is not None:
            self.store_heads(kv.keys, kv.values, c_kv, k_pe, k_b, v_b, step)
            return
        self.store(kv.rows, c_kv, k_pe, step)
        if kv.columns is not None:
            self.store_columns(kv.columns, c_kv, step)

    def latent_attention(
        self, q: Act, c_kv: Act, k_pe: Act, w: LayerWeights, kv: LayerCache, step: Step, hp: Any,
        chosen: Act | None = None,
    ) -> Act:  # fmt: skip
        """Attention of local heads [n, h * v], once each token's latent row is in the cache.

        c_kv [n, r] is normed and k_pe [n, p] rotated on the way there;
        q [n, h * (k + p)] comes unrotated; `chosen` rows [n, top_k] alone are met where given.
        """
        c_kv = self.rms_norm(c_kv, w.attn_kv_a_norm, hp.eps)
        self.store_kv(kv, c_kv, self.rope(k_pe, step), w.attn_k_b, w.attn_v_b, step)
        if hp.temperature is not None:
            q = self.temper(q, hp.temperature, step)  # both parts; rotation commutes with it
        q_nope, q_pe = self.split_heads(q, hp.k, hp.p)  # [n, h, k], [n, h, p]: local heads
        held = q_nope, self.rope(q_pe, step), kv, w.attn_k_b, w.attn_v_b
        if chosen is None:
            return self.mla_attention(*held, step, hp.softmax_scale)
        return self.sparse_attention(*held, chosen, step, hp.softmax_scale)

    def mla_attention(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, k_b: Weight, v_b: Weight, step: Step,
        scale: float,
    ) -> Act:  # fmt: skip
        """Attention of local heads over a layer's cache [n, h * v], in the form that -mla and -fa
        ask for.

        k_b [h, r, k] takes a query into latent space, v_b [h, v, r] takes the result out of it.
        """
        form = attention_form(self.context, step.n)
        if form.keys == "per-head":
            o = self.attend_heads(q_nope, q_pe, kv, step, scale, form.blockwise)
        elif form.keys == "expanded":
            o = self.attend_expanded(q_nope, q_pe, kv, k_b, v_b, step, scale)
        else:
            q_lat, r = self.heads_up(q_nope, k_b), k_b.shape[1]
            o = self.attend_absorbed(q_lat, q_pe, kv, r, step, scale, form.blockwise)
            o = self.heads_up(o, v_b)
        return o.reshape(step.n, -1)

    def sparse_attention(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, k_b: Weight, v_b: Weight, chosen: Act,
        step: Step, scale: float,
    ) -> Act:  # fmt: skip
        """`mla_attention` over each token's chosen rows alone [n, h * v], always absorbed."""
        q_lat = self.heads_up(q_nope, k_b)
        o = self.attend_chosen(q_lat, q_pe, kv, chosen, k_b.shape[1], step, scale)
        return self.heads_up(o, v_b).reshape(step.n, -1)

    def choose_rows(
        self, x: Act, q_a: Act, w: LayerWeights, rows: Any, step: Step, indexer: Indexer
    ) -> Act | None:
        """The cache rows [n, top_k] that each token attends to; None while there are no more.

        The tokens' index keys are stored in `rows` either way: later steps will score them.
        """
        key = self.layer_norm(
            self.matmul(x, w.indexer_attn_k), w.indexer_k_norm, w.indexer_k_norm_bias, indexer.eps
        )
        self.store_index(rows, self.rope_first(key, step), step)
        if step.n_kv <= indexer.top_k:
            return None
        q = self.heads(self.matmul(q_a, w.indexer_attn_q_b), indexer.n_heads)  # [n, I, i]
        weights = self.matmul(x, w.indexer_proj)  # [n, I]
        return self.dsa_select(self.rope_first(q, step), weights, rows, step, indexer.top_k)

    def reduce_add_norm(
        self, partial: Act | None, residual: Act, norm: Weight | None, eps: float
    ) -> tuple[Act, Act]:
        """(residual + sum of all ranks' partials, its norm). The residual is never rounded."""
        residual = self.add(residual, self.comm.all_reduce(partial))
        return residual, None if norm is None else self.rms_norm(residual, norm, eps)

    def logits(self, x: Act, output: Weight | None) -> Act:
        """[n_out, V], each rank's vocabulary rows put together in rank order."""
        return self.comm.all_gather(None if output is None else self.matmul(x, output))
