"""deepseek2: DeepSeek-V2/V3/R1, Kimi-K2, GLM-4.7-Flash.

Multi-head latent attention (arXiv 2405.04434) with routed and shared experts (arXiv 2412.19437),
written from one rank's point of view: partial sums are reduced twice a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlacli.models.hparams import Hparams
from mlacli.models.mla_tensors import MODEL, layer_tensors
from mlacli.models.parts import gated_mlp, queries, routed_experts, through_layers

if TYPE_CHECKING:
    from mlacli.latent_cache import LatentCache
    from mlacli.ops import Act, LayerWeights, ModelWeights, Ops, Step

__all__ = ["MODEL", "Hparams", "forward", "layer_tensors"]


def forward(ops: Ops, hp: Hparams, w: ModelWeights, cache: LatentCache, step: Step) -> Act | None:
    """Logits [n_out, V] of the step's wanted rows; None on a pipeline stage that isn't the last."""
    return through_layers(ops, hp, w, cache, step, layer)


def layer(
    ops: Ops, hp: Hparams, w: LayerWeights, cache: LatentCache, il: int,
    residual: Act, x: Act, step: Step, next_norm: Any,
) -> tuple[Act, Act]:  # fmt: skip
    """The residual stream [n, d] after layer `il`, and its normed copy for what comes next."""
    y = attention(ops, hp, w, cache, il, x, step)
    residual, x = ops.reduce_add_norm(y, residual, w.ffn_norm, hp.eps)  # 1st reduction
    y = gated_mlp(ops, x, w) if hp.is_dense(il) else routed_experts(ops, x, w, hp.routing)
    return ops.reduce_add_norm(y, residual, next_norm, hp.eps)  # 2nd reduction


def attention(
    ops: Ops, hp: Hparams, w: LayerWeights, cache: LatentCache, il: int, x: Act, step: Step
) -> Act | None:
    """This rank's partial of the attention output [n, d]; None on a rank without heads."""
    if w.attn_output is None:
        return None
    q, c_kv, k_pe = queries(ops, hp, x, w)
    o = ops.latent_attention(q, c_kv, k_pe, w, cache.rows[il], step, hp)
    return ops.matmul(o, w.attn_output)  # [n, h * v] -> [n, d]
