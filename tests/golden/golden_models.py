"""The golden models: configs of transformers' own classes, and the files that are made of them.

Small enough to ship, and different in what can go wrong: routing, rope, layouts, row sizes.
Read by make_golden.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

VOCAB = 300

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,  # transformers' q_a and kv_a norms use 1e-6 whatever the config says
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
KV_F16 = {"attn_kv_b": "f16", "attn_k_b": "f16", "attn_v_b": "f16"}
EXPERTS_Q8 = {f"ffn_{side}_exps": "q8_0" for side in ("gate", "up", "down")}


def _yarn(factor: float, mscale: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": original,
    }


def _config(kind: str, heads: int, **own: Any) -> Any:
    rope = own.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    own["max_position_embeddings"] = int(
        rope.get("original_max_position_embeddings", 512) * rope.get("factor", 1)
    )
    made = {**COMMON, "num_attention_heads": heads, "num_key_value_heads": heads, **own}
    return getattr(transformers, f"{kind}Config")(**made)


def v2lite() -> Any:
    """No q_lora, plain top-k on softmax, not renormalised, 2 shared experts, YaRN 40 / 0.707."""
    return _config(
        "DeepseekV2",
        4,
        first_k_dense_replace=1,
        q_lora_rank=None,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_parameters=_yarn(40.0, 0.707, 4096),
    )


def v2() -> Any:
    """Group-limited top-k, a group's score is its maximum, weights times 16; output head tied."""
    return _config(
        "DeepseekV2",
        4,
        first_k_dense_replace=0,
        q_lora_rank=48,
        kv_lora_rank=64,
        n_group=2,
        topk_group=1,  # fewer than the experts used, or the groups would not bind
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        tie_word_embeddings=True,
    )


def v3() -> Any:
    """Sigmoid gate with bias, groups by the sum of their two best, renormalised, YaRN 40 / 1."""
    return _config(
        "DeepseekV3",
        8,
        first_k_dense_replace=1,
        q_lora_rank=32,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        rope_parameters=_yarn(40.0, 1.0, 64),
    )


def glm47flash() -> Any:
    """Sigmoid gate with bias, no groups, scale 1.8, five heads, rope 32, no YaRN."""
    return _config(
        "Glm4MoeLite",
        5,
        q_lora_rank=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.8,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def real_rows() -> Any:
    """DeepSeek-V3's attention sizes: latent 512, rope 64, nope 128, v 128; the rest is small."""
    return _config(
        "DeepseekV3",
        4,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
        rope_parameters=_yarn(40.0, 1.0, 4096),
    )


def glm_dsa() -> Any:
    """An indexer that keeps 12 rows, on layers 0 and 3; layers 1 and 2 share layer 0's choice."""
    return _config(
        "GlmMoeDsa",
        5,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        q_lora_rank=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=12,
        indexer_types=["full", "shared", "shared", "full"],
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


def _mistral4(heads: int, beta: float, **own: Any) -> Any:
    """Softmax gate, renormalised; 40 tokens run to five times the original context."""
    return _config(
        "Mistral4",
        heads,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        rope_parameters=_yarn(16.0, 1.0, 8) | {"llama_4_scaling_beta": beta},
        **own,
    )


def mistral4() -> Any:
    """Queries that grow with position (the metadata's temperature)."""
    return _mistral4(6, 0.3, q_lora_rank=32)


def mistral4_rows() -> Any:
    """Mistral-Small-4's attention sizes: latent 256, rope 64, nope 64, v 128; no temperature."""
    return _mistral4(
        3,
        0.0,
        num_hidden_layers=1,
        q_lora_rank=48,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
    )


@dataclass(frozen=True)
class Golden:
    """One GGUF file; `logits` names the .npz file where it is not the file's own."""

    file: str
    config: Any
    qtype: str
    seed: int
    layout: str = "split3d"
    style: str = "mainline"
    overrides: dict[str, str] = field(default_factory=dict)
    logits: str = ""


GOLDENS = (
    Golden("v2lite", v2lite, "f16", 1),
    Golden("v2lite_q8", v2lite, "q8_0", 1),
    Golden("v2", v2, "f16", 50, overrides=EXPERTS_Q8 | {"attn_q_b": "f32"}),
    Golden("v3", v3, "q8_0", 6, overrides=KV_F16),
    Golden("v3_kv_b", v3, "q8_0", 6, "kv_b", "ik", KV_F16, logits="v3"),
    Golden("v3_folded", v3, "q8_0", 6, "folded", "ik", KV_F16, logits="v3"),
    Golden("v3_q8", v3, "q8_0", 6),
    Golden("glm47flash", glm47flash, "f16", 86, overrides=EXPERTS_Q8),
    Golden("glm47flash_q8", glm47flash, "q8_0", 86),
    Golden("real_rows", real_rows, "q8_0", 46),
    Golden("glm_dsa", glm_dsa, "q8_0", 3, overrides=KV_F16),
    Golden("mistral4", mistral4, "q8_0", 7, overrides=KV_F16),
    Golden("mistral4_rows", mistral4_rows, "q8_0", 10),
)
