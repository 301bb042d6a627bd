"""glm-dsa: GLM-5, 5.1, 5.2. deepseek2's layers, each attending to the cache rows an indexer chose.

Sparse attention after DeepSeek-V3.2 (arXiv 2512.02556). The choice of a 'full' layer also serves
the 'shared' ones after it, so it travels through the layers beside the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlacli.models import mla_tensors
from mlacli.models.hparams import Hparams
from mlacli.models.mla_tensors import MODEL
from mlacli.models.parts import gated_mlp, routed_experts
from mlacli.models.tensor_table import TensorSpec

if TYPE_CHECKING:
    from mlacli.latent_cache import LatentCache
    from mlacli.ops import Act, LayerWeights, ModelWeights, Ops, Step

__all__ = ["MODEL", "Hparams", "forward", "layer_tensors"]

INDEXER = (  # mirrored, so that all ranks choose the same rows
    TensorSpec("indexer.attn_q_b.weight", "I*i, q", attention=True),
    TensorSpec("indexer.attn_k.weight", "i, d", attention=True),
    TensorSpec("indexer.k_norm.weight", "i", attention=True),
    TensorSpec("indexer.k_norm.bias", "i", attention=True),
    TensorSpec("indexer.proj.weight", "I, d", attention=True),
)


def layer_tensors(hp: Hparams, layer: int, present: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """deepseek2's specs, and the indexer's: read on full layers of a sparse run only."""
    table = mla_tensors.layer_tensors(hp, layer, present)
    if hp.indexer is None:
        return table
    unread = hp.sparse is None or not hp.sparse.full[layer]
    return table + tuple(replace(spec, unread=unread) for spec in INDEXER)


def forward(ops: Ops, hp: Hparams, w: ModelWeights, cache: LatentCache, step: Step) -> Act | None:
    """Logits [n_out, V] of the step's wanted rows; None on a pipeline stage that isn't the last."""
    first, last = min(w.layers), max(w.layers)
    residual = ops.receive() if w.token_embd is None else ops.embed(step.tokens, w.token_embd)
    chosen = ops.receive() if reuses(hp, first, step) else None
    norms = [layer_w.attn_norm for layer_w in w.layers.values()] + [w.output_norm]
    x = ops.rms_norm(residual, norms[0], hp.eps)
    for (il, layer_w), next_norm in zip(w.layers.items(), norms[1:], strict=True):
        y, chosen = attention(ops, hp, layer_w, cache, il, x, chosen, step)
        residual, x = ops.reduce_add_norm(y, residual, layer_w.ffn_norm, hp.eps)  # 1st reduction
        y = feed_forward(ops, hp, layer_w, il, x)
        residual, x = ops.reduce_add_norm(y, residual, next_norm, hp.eps)  # 2nd reduction
    if w.output_norm is None:
        ops.send(residual)
        if reuses(hp, last + 1, step):
            ops.send(chosen)
        return None
    return ops.logits(ops.rows(x, step.out_rows), w.output)


def reuses(hp: Hparams, il: int, step: Step) -> bool:
    """Whether layer `il` attends to rows that a layer before it chose."""
    return hp.sparse is not None and step.n_kv > hp.sparse.top_k and not hp.sparse.full[il]


def feed_forward(ops: Ops, hp: Hparams, w: LayerWeights, il: int, x: Act) -> Act | None:
    """This rank's partial of the dense or routed FFN [n, d]."""
    return gated_mlp(ops, x, w) if hp.is_dense(il) else routed_experts(ops, x, w, hp.routing)


def attention(
    ops: Ops, hp: Hparams, w: LayerWeights, cache: LatentCache, il: int, x: Act,
    chosen: Act | None, step: Step,
) -> tuple[Act | None, Act | None]:  # fmt: skip
    """(this rank's partial of the attention output [n, d], the rows chosen so far [n, top_k]).

    Both None on a rank without heads; no rows are chosen while the cache has no more than top_k.
    """
    if w.attn_output is None:
        return None, None
    q_a, c_kv, k_pe = ops.project(x, w.attn_q_a, w.attn_kv_a_mqa, hp.r)  # mirrored
    q_a = ops.rms_norm(q_a, w.attn_q_a_norm, hp.eps)
    if hp.sparse is not None and hp.sparse.full[il]:
        chosen = ops.choose_rows(x, q_a, w, cache.index_rows[il], step, hp.sparse)
    q = ops.matmul(q_a, w.attn_q_b)
    o = ops.latent_attention(q, c_kv, k_pe, w, cache.rows[il], step, hp, chosen)
    return ops.matmul(o, w.attn_output), chosen  # [n, h * v] -> [n, d]
