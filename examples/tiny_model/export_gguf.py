"""Writes an MLA model of the transformers library as a GGUF file: deepseek2, glm-dsa, mistral4.

Key names, tensor names and types follow llama.cpp's convert_hf_to_gguf.py, so that llama.cpp loads
a file in the default layout and style unchanged. Nothing here knows mlacli.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

SOFTMAX, SIGMOID = 1, 2
GATING = {
    "deepseek_v2": SOFTMAX,
    "deepseek_v3": SIGMOID,
    "glm4_moe_lite": SIGMOID,
    "glm_moe_dsa": SIGMOID,
    "mistral4": SOFTMAX,
}
ARCHS = {"glm_moe_dsa": "glm-dsa", "mistral4": "mistral4"}  # the others are deepseek2
QTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.experts.up_proj.weight": "ffn_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj.weight": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def export_gguf(
    model_or_state: Any,
    config: Any,
    path: str | Path,
    *,
    qtype: str = "f32",
    layout: str = "split3d",
    style: str = "mainline",
    tokenizer_metadata: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] | None = None,
    name: str | None = None,
) -> None:
    """Writes `path` from a DeepseekV2 / DeepseekV3 / Glm4MoeLite / GlmMoeDsa / Mistral4 ForCausalLM
    or its state dict.

    `qtype`: f32, f16 or q8_0 for the matrices; 1-D tensors and gates are always F32, and under
    q8_0 a matrix whose rows are no multiple of 32 becomes F16. `overrides` sets the type of single
    tensors by the word before `.weight`, as in `{"attn_k_b": "f16"}`.

    `layout` of the up-projection of the latent: split3d = attn_k_b {N,L,H} and attn_v_b {L,V,H} in
    GGUF order; kv_b = attn_kv_b alone; folded = attn_kv_b, and 2-D attn_k_b {N,H*L} and attn_v_b
    {L,H*V} beside it. `style`: mainline = one KV head as wide as a cache row, true head sizes under
    `*_mla` keys (split3d only); ik = H KV heads of the true sizes.

    `tokenizer_metadata` holds whole GGUF keys (`tokenizer.ggml.tokens`, ...); without it the file
    says `no_vocab`. What GGUF cannot say raises ValueError, see `_check`.
    """
    if layout not in ("split3d", "kv_b", "folded"):
        raise ValueError(f"unknown layout {layout!r}")
    if style not in ("mainline", "ik") or (style == "mainline" and layout != "split3d"):
        raise ValueError(f"style {style!r} does not go with layout {layout!r}")
    _check(config)
    state = model_or_state if isinstance(model_or_state, Mapping) else model_or_state.state_dict()
    overrides = overrides or {}

    writer = gguf.GGUFWriter(str(path), arch_of(config))
    if name:
        writer.add_name(name)
    writer.add_file_type(QTYPES[qtype][1])
    if qtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_hparams(writer, config, style)
    for key, value in (tokenizer_metadata or {"tokenizer.ggml.model": "no_vocab"}).items():
        _add_value(writer, key, value)

    seen: set[str] = set()
    for tensor_name, array in _tensors(state, config, layout):
        if tensor_name in seen:
            raise ValueError(f"{tensor_name} comes up twice")
        seen.add(tensor_name)
        word = tensor_name.split(".")[-2]
        wanted = QTYPES[overrides.get(word, qtype)][0]
        if array.ndim < 2 or tensor_name.endswith(("ffn_gate_inp.weight", "indexer.proj.weight")):
            wanted = GGMLQuantizationType.F32
        elif wanted == GGMLQuantizationType.Q8_0 and array.shape[-1] % 32:
            wanted = GGMLQuantizationType.F16
        data = gguf.quants.quantize(np.ascontiguousarray(array, dtype=np.float32), wanted)
        writer.add_tensor(tensor_name, data, raw_dtype=wanted)
    _check_complete(seen, config, layout)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arch_of(config: Any) -> str:
    """GGUF's name of the architecture."""
    return ARCHS.get(config.model_type, "deepseek2")


def leading_dense(config: Any) -> int:
    """The number of first layers that have a plain FFN."""
    if not hasattr(config, "mlp_layer_types"):
        return int(config.first_k_dense_replace)
    types = list(config.mlp_layer_types)
    n_dense = types.index("sparse") if "sparse" in types else len(types)
    if "dense" in types[n_dense:]:
        raise ValueError(f"dense layers must come first, got {types}")
    return n_dense


def _check(config: Any) -> None:
    """Refuses what these GGUF files cannot say, or would say differently from transformers."""
    if config.model_type not in GATING:
        raise ValueError(f"unknown model type {config.model_type!r}")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ValueError("biases have no place in an MLA GGUF")
    if config.hidden_act != "silu":
        raise ValueError(f"activation {config.hidden_act!r} is not silu")
    if config.model_type == "deepseek_v2" and config.norm_topk_prob:
        # transformers ignores it, DeepSeek's code then skips the scale, llama.cpp does both
        raise ValueError("DeepseekV2 with norm_topk_prob means something else everywhere")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope type {kind!r} is neither default nor yarn")
    whole = config.qk_rope_head_dim / config.head_dim  # what the rotated part is of head_dim
    if rope.get("partial_rotary_factor", whole) != whole:
        raise ValueError("a partial rotary factor has no place in an MLA GGUF")
    if kind == "yarn":
        # The rotation itself has magnitude 1 in GGUF, YaRN's magnitude sits in the score scale.
        if not rope.get("mscale_all_dim") or rope.get("mscale") != rope["mscale_all_dim"]:
            raise ValueError("YaRN needs mscale == mscale_all_dim, both given")
        if rope.get("attention_factor") not in (None, 1.0) or not rope.get("truncate", True):
            raise ValueError("YaRN's attention_factor and truncate=False have no place in GGUF")


def _add_hparams(w: gguf.GGUFWriter, config: Any, style: str) -> None:
    n_heads = config.num_attention_heads
    nope, rot = config.qk_nope_head_dim, config.qk_rope_head_dim
    latent, value = config.kv_lora_rank, config.v_head_dim

    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_vocab_size(config.vocab_size)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_leading_dense_block_count(leading_dense(config))

    w.add_head_count(n_heads)
    if config.q_lora_rank is not None:
        w.add_q_lora_rank(config.q_lora_rank)
    elif config.num_hidden_layers not in (26, 27):
        w.add_q_lora_rank(0)  # llama.cpp knows lite models by layer count, else asks for the key
    w.add_kv_lora_rank(latent)
    if style == "mainline":
        w.add_head_count_kv(1)
        w.add_key_length(latent + rot)
        w.add_value_length(latent)
        w.add_key_length_mla(nope + rot)
        w.add_value_length_mla(value)
    else:
        w.add_head_count_kv(n_heads)
        w.add_key_length(nope + rot)
        w.add_value_length(value)

    rope = config.rope_parameters
    w.add_rope_dimension_count(rot)
    w.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type", "default") == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast") is not None:
            w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])

    w.add_expert_count(config.n_routed_experts)
    w.add_expert_used_count(config.num_experts_per_tok)
    w.add_expert_feed_forward_length(config.moe_intermediate_size)
    w.add_expert_shared_count(config.n_shared_experts)
    w.add_expert_weights_scale(config.routed_scaling_factor)
    if config.norm_topk_prob:
        w.add_expert_weights_norm(True)
    w.add_uint32(f"{arch_of(config)}.expert_gating_func", GATING[config.model_type])
    if config.n_group is not None and getattr(config, "topk_method", None) != "greedy":
        w.add_expert_group_count(config.n_group)
        w.add_expert_group_used_count(config.topk_group)

    if config.model_type == "glm_moe_dsa":
        w.add_indexer_head_count(config.index_n_heads)
        w.add_indexer_key_length(config.index_head_dim)
        w.add_indexer_top_k(config.index_topk)
        full = [kind == "full" for kind in config.indexer_types]
        w.add_array("glm-dsa.attention.indexer.types", full)
    if scale := rope.get("llama_4_scaling_beta"):
        w.add_attn_temperature_scale(scale)
        w.add_attn_temperature_length(rope["original_max_position_embeddings"])


def _add_value(w: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        w.add_bool(key, value)
    elif isinstance(value, (int, np.integer)):
        w.add_uint32(key, int(value))
    elif isinstance(value, float):
        w.add_float32(key, value)
    elif isinstance(value, str):
        w.add_string(key, value)
    else:
        w.add_array(key, list(value))


def _tensors(
    state: Mapping[str, Any], config: Any, layout: str
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """GGUF names and arrays in row-major (numpy) order, in the order of the state dict."""
    n_heads, rot = config.num_attention_heads, config.qk_rope_head_dim
    half_split = not getattr(config, "rope_interleave", True)
    experts: dict[tuple[int, str], dict[int, np.ndarray[Any, Any]]] = {}

    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = _to_numpy(tensor)
        if name in GLOBAL_NAMES:
            yield GLOBAL_NAMES[name], array
            continue
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            raise ValueError(f"no GGUF name for {name}")
        layer, rest = int(match[1]), match[2]
        if layer >= config.num_hidden_layers:
            continue  # multi-token prediction head
        prefix = f"blk.{layer}."

        if rest == "self_attn.kv_b_proj.weight":
            for word, part in _up_projection(array, config, layout):
                yield f"{prefix}{word}.weight", part
        elif rest == "mlp.experts.gate_up_proj":  # [E, 2F, D]
            if config.model_type == "mistral4":  # whose converter keeps them together
                yield prefix + "ffn_gate_up_exps.weight", array
                continue
            gate, up = np.split(array, 2, axis=1)
            yield prefix + "ffn_gate_exps.weight", gate
            yield prefix + "ffn_up_exps.weight", up
        elif one := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)\.weight", rest):  # checkpoint names
            parts = experts.setdefault((layer, one[2]), {})
            parts[int(one[1])] = array
            if len(parts) == config.n_routed_experts:
                stacked = np.stack([parts[i] for i in range(config.n_routed_experts)])
                yield prefix + LAYER_NAMES[f"mlp.experts.{one[2]}.weight"], stacked
        elif rest in LAYER_NAMES:
            if half_split and rest in ("self_attn.q_proj.weight", "self_attn.q_b_proj.weight"):
                heads = array.reshape(n_heads, -1, array.shape[-1])
                array = _interleave_rope(heads, rot).reshape(array.shape)
            elif half_split and rest == "self_attn.kv_a_proj_with_mqa.weight":
                array = _interleave_rope(array[None], rot)[0]
            yield prefix + LAYER_NAMES[rest], array
        else:
            raise ValueError(f"no GGUF name for {name}")


def _up_projection(
    kv_b: np.ndarray[Any, Any], config: Any, layout: str
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """attn_k_b and attn_v_b, or attn_kv_b, from kv_b [H*(N+V), L] with N rows of k first."""
    n_heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    if layout != "split3d":
        yield "attn_kv_b", kv_b
    if layout == "kv_b":
        return
    heads = kv_b.reshape(n_heads, nope + config.v_head_dim, latent)
    k_b = heads[:, :nope].transpose(0, 2, 1)  # [H, L, N]
    v_b = heads[:, nope:]  # [H, V, L]
    if layout == "folded":
        k_b, v_b = k_b.reshape(-1, nope), v_b.reshape(-1, latent)
    yield "attn_k_b", k_b
    yield "attn_v_b", v_b


def _interleave_rope(heads: np.ndarray[Any, Any], rot: int) -> np.ndarray[Any, Any]:
    """[H, rows, cols] with the last `rot` rows of each head reordered: GGUF rotates rows 2i and
    2i+1 together, a half-split model rows i and i + rot/2."""
    out = heads.copy()
    out[:, -rot::2] = heads[:, -rot : -rot // 2]
    out[:, -rot + 1 :: 2] = heads[:, -rot // 2 :]
    return out


def _check_complete(seen: set[str], config: Any, layout: str) -> None:
    """Raises ValueError when a tensor that the architecture needs was not in the state dict."""
    n_dense = leading_dense(config)
    up = {"split3d": ("attn_k_b", "attn_v_b"), "kv_b": ("attn_kv_b",)}.get(
        layout, ("attn_kv_b", "attn_k_b", "attn_v_b")
    )
    attn = ["attn_norm", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_output", "ffn_norm", *up]
    q_words = (
        ("attn_q",) if config.q_lora_rank is None else ("attn_q_a", "attn_q_a_norm", "attn_q_b")
    )
    need = {"token_embd.weight", "output_norm.weight"}
    if not config.tie_word_embeddings:
        need.add("output.weight")
    for layer in range(config.num_hidden_layers):
        ends = ("",) if layer < n_dense else ("_exps", "_shexp")
        words = [f"ffn_{side}{end}" for side in ("gate", "up", "down") for end in ends]
        if layer >= n_dense:
            words.append("ffn_gate_inp")
            if config.model_type == "mistral4":
                words = [w for w in words if w not in ("ffn_gate_exps", "ffn_up_exps")]
                words.append("ffn_gate_up_exps")
            if GATING[config.model_type] == SIGMOID:
                need.add(f"blk.{layer}.exp_probs_b.bias")
        if config.model_type == "glm_moe_dsa" and config.indexer_types[layer] == "full":
            words += [
                n[:-7] for n in LAYER_NAMES.values() if n.startswith("indexer.") and "bias" not in n
            ]
            need.add(f"blk.{layer}.indexer.k_norm.bias")
        need |= {f"blk.{layer}.{word}.weight" for word in (*attn, *q_words, *words)}
    if missing := sorted(need - seen):
        raise ValueError(f"the state dict lacks what makes {missing}")


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """The tensor as float32; takes torch tensors of any float type and numpy arrays."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float().cpu().numpy()
    return np.asarray(tensor, dtype=np.float32)
