"""The tensors of a model with latent attention, as deepseek2 names them and its kin keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlacli.models.tensor_table import Split, TensorSpec

if TYPE_CHECKING:
    from mlacli.models.hparams import Hparams

MODEL = (
    TensorSpec("token_embd.weight", "V, d"),
    TensorSpec("output_norm.weight", "d"),
    TensorSpec("output.weight", "V, d", Split.VOCAB, derived_from="token_embd.weight"),
)
NORMS = (TensorSpec("attn_norm.weight", "d"), TensorSpec("ffn_norm.weight", "d"))
QUERY_LITE = (TensorSpec("attn_q.weight", "H*(k+p), d", Split.HEAD_OUT, attention=True),)
QUERY_FULL = (
    TensorSpec("attn_q_a.weight", "q, d", attention=True),
    TensorSpec("attn_q_a_norm.weight", "q", attention=True),
    TensorSpec("attn_q_b.weight", "H*(k+p), q", Split.HEAD_OUT, attention=True),
)
ATTENTION = (
    TensorSpec("attn_kv_a_mqa.weight", "r+p, d", attention=True),
    TensorSpec("attn_kv_a_norm.weight", "r", attention=True),
    TensorSpec(
        "attn_k_b.weight",
        "H, r, k",
        Split.HEAD_LEAD,
        attention=True,
        derived_from="attn_kv_b.weight",
    ),
    TensorSpec(
        "attn_v_b.weight",
        "H, v, r",
        Split.HEAD_LEAD,
        attention=True,
        derived_from="attn_kv_b.weight",
    ),
    TensorSpec("attn_output.weight", "d, H*v", Split.HEAD_IN, attention=True),
)
DENSE = (
    TensorSpec("ffn_gate.weight", "F, d", Split.FF_OUT, width="F"),
    TensorSpec("ffn_up.weight", "F, d", Split.FF_OUT, width="F"),
    TensorSpec("ffn_down.weight", "d, F", Split.FF_IN, width="F"),
)
GATE = (
    TensorSpec("ffn_gate_inp.weight", "E, d"),
    TensorSpec("exp_probs_b.bias", "E", optional=True),
)
EXPERTS = (
    TensorSpec("ffn_gate_exps.weight", "E, f, d", Split.FF_OUT, width="f", experts=True),
    TensorSpec("ffn_up_exps.weight", "E, f, d", Split.FF_OUT, width="f", experts=True),
    TensorSpec("ffn_down_exps.weight", "E, d, f", Split.FF_IN, width="f", experts=True),
)
EXPERTS_MERGED = (
    TensorSpec(
        "ffn_gate_up_exps.weight", "E, 2*f, d", Split.FF_OUT, width="f", experts=True, halves=2
    ),
    EXPERTS[2],
)
SHARED = (
    TensorSpec("ffn_gate_shexp.weight", "s, d", Split.FF_OUT, width="s"),
    TensorSpec("ffn_up_shexp.weight", "s, d", Split.FF_OUT, width="s"),
    TensorSpec("ffn_down_shexp.weight", "d, s", Split.FF_IN, width="s"),
)


def layer_tensors(hp: Hparams, layer: int, present: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """The specs of `layer`, chosen by hparams and by which tensors the file has."""
    table = NORMS + (QUERY_FULL if hp.q else QUERY_LITE) + ATTENTION
    if hp.is_dense(layer):
        return table + DENSE
    merged = f"blk.{layer}.ffn_gate_up_exps.weight" in present
    table += GATE + (EXPERTS_MERGED if merged else EXPERTS)
    return table + SHARED if hp.n_shared else table
