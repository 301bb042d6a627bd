"""The whole model in float64 NumPy: expanded attention, plain loops, one sequence, no cache.

An oracle for tests. Imports nothing from mlacli; reads GGUF files with gguf-py alone.
Covers deepseek2, glm-dsa with and without its indexer (DSA), mistral4.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

Model = dict[str, Any]
Array = np.ndarray[Any, Any]


def load(path: str | Path) -> Model:
    """`{"hparams": ..., "weights": ...}`; weights are float64 under their GGUF names, with W_UK and
    W_UV of each layer under `blk.i.k` [H, N, L] and `blk.i.v` [H, V, L] whatever the layout."""
    reader = gguf.GGUFReader(str(path))
    weights = {
        t.name: np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float64)
        for t in reader.tensors
    }
    meta = {key: field.contents() for key, field in reader.fields.items()}
    hp = _hparams(meta, weights)
    for i in range(hp["n_layer"]):
        weights[f"blk.{i}.k"], weights[f"blk.{i}.v"] = _up_projection(weights, f"blk.{i}.", hp)
    return {"hparams": hp, "weights": weights}


def forward(
    model: Model,
    tokens: Any,
    margins: list[Array] | None = None,
    choices: list[tuple[Array, Array]] | None = None,
) -> Array:
    """Logits [n, vocab] of every position, float64.

    `margins` receives, for each MoE layer, the distance [n] in selection score between what was
    chosen and the best of what was not: a run in lower precision may route otherwise below it.
    `choices` receives, for each layer with an indexer, which rows each token attends to [n, n] and
    the same distance in index score.
    """
    hp, w = model["hparams"], model["weights"]
    tokens = np.asarray(tokens)
    h = w["token_embd.weight"][tokens]  # [n, D]
    seen = np.tri(len(tokens), dtype=bool)  # [n, n]: the rows that each token attends to
    for i in range(hp["n_layer"]):
        b = f"blk.{i}."
        x = rms(h, w[b + "attn_norm.weight"], hp["eps"])
        if hp["dsa"] and hp["dsa"]["full"][i]:
            seen, distance = choose(hp, w, b, x)
            if choices is not None:
                choices.append((seen, distance))
        h = h + attention(hp, w, b, x, seen)
        y = rms(h, w[b + "ffn_norm.weight"], hp["eps"])
        h = h + (ffn(w, b, "", y) if i < hp["n_dense"] else moe(hp, w, b, y, margins))
    head = w.get("output.weight", w["token_embd.weight"])
    return rms(h, w["output_norm.weight"], hp["eps"]) @ head.T


def attention(hp: dict[str, Any], w: dict[str, Array], b: str, x: Array, seen: Array) -> Array:
    """[n, D] from the normed input x [n, D]: per-head keys and values are built, then MHA."""
    n, n_heads, rank, nope, rot = len(x), hp["H"], hp["L"], hp["N"], hp["R"]
    pos = np.arange(n)
    if b + "attn_q.weight" in w:
        q = x @ w[b + "attn_q.weight"].T
    else:
        q_a = rms(x @ w[b + "attn_q_a.weight"].T, w[b + "attn_q_a_norm.weight"], hp["eps"])
        q = q_a @ w[b + "attn_q_b.weight"].T
    q = q.reshape(n, n_heads, nope + rot)
    if hp["temp_scale"]:
        q = q * (1 + hp["temp_scale"] * np.log1p(pos // hp["temp_length"]))[:, None, None]
    kv = x @ w[b + "attn_kv_a_mqa.weight"].T
    latent = rms(kv[:, :rank], w[b + "attn_kv_a_norm.weight"], hp["eps"])
    k_pe = rotate(kv[:, rank:], pos, hp)

    out = np.zeros((n, n_heads, hp["V"]))
    for head in range(n_heads):
        q_nope, q_pe = q[:, head, :nope], rotate(q[:, head, nope:], pos, hp)
        k_nope = latent @ w[b + "k"][head].T  # [n, N]
        value = latent @ w[b + "v"][head].T  # [n, V]
        score = hp["scale"] * (q_nope @ k_nope.T + q_pe @ k_pe.T)
        score = np.where(seen, score, -np.inf)
        out[:, head] = softmax(score) @ value
    return out.reshape(n, -1) @ w[b + "attn_output.weight"].T


def choose(hp: dict[str, Any], w: dict[str, Array], b: str, x: Array) -> tuple[Array, Array]:
    """The lightning indexer's choice [n, n] and by how much the last chosen row leads the rest."""
    dsa, n, rot = hp["dsa"], len(x), hp["R"]
    pos = np.arange(n)

    def turned(y: Array) -> Array:  # the rope part comes first
        return np.concatenate([rotate(y[:, :rot], pos, hp), y[:, rot:]], axis=1)

    key = x @ w[b + "indexer.attn_k.weight"].T
    key = (key - key.mean(axis=1, keepdims=True)) / np.sqrt(key.var(axis=1, keepdims=True) + 1e-6)
    key = turned(key * w[b + "indexer.k_norm.weight"] + w[b + "indexer.k_norm.bias"])
    q_a = rms(x @ w[b + "attn_q_a.weight"].T, w[b + "attn_q_a_norm.weight"], hp["eps"])
    q = (q_a @ w[b + "indexer.attn_q_b.weight"].T).reshape(n, dsa["heads"], -1)
    weight = x @ w[b + "indexer.proj.weight"].T / math.sqrt(dsa["heads"] * q.shape[2])
    score = np.zeros((n, n))
    for head in range(dsa["heads"]):
        score += weight[:, head, None] * np.maximum(turned(q[:, head]) @ key.T, 0)
    seen, distance = np.zeros((n, n), bool), np.full(n, np.inf)
    for t in range(n):
        rows, distance[t] = top(score[t, : t + 1], min(dsa["top_k"], t + 1))
        seen[t, rows] = True
    return seen, distance


def moe(
    hp: dict[str, Any], w: dict[str, Array], b: str, y: Array, margins: list[Array] | None
) -> Array:
    """[n, D]: the routed experts' weighted sum plus the shared experts."""
    logits = y @ w[b + "ffn_gate_inp.weight"].T  # [n, E]
    if hp["gating"] == 1:
        probs = softmax(logits)
    elif hp["gating"] == 2:
        probs = 1 / (1 + np.exp(-logits))
    elif hp["gating"] == 3:  # softmax over the selected ones
        probs = logits
    else:
        raise NotImplementedError(f"gating function {hp['gating']}")
    select = probs + w.get(b + "exp_probs_b.bias", 0.0)

    out, distance = np.zeros_like(y), np.full(len(y), np.inf)
    for t in range(len(y)):
        score = select[t]
        if hp["n_group"] > 1:
            groups = score.reshape(hp["n_group"], -1)
            best = np.sort(groups, axis=1)[:, ::-1]
            group_score = best[:, : hp["group_best"]].sum(axis=1)
            chosen, gap = top(group_score, hp["n_group_used"])
            kept = np.full_like(groups, -np.inf)
            kept[chosen] = groups[chosen]
            score, distance[t] = kept.reshape(-1), gap
        experts, gap = top(score, hp["n_used"])
        distance[t] = min(distance[t], gap)
        weight = probs[t, experts]
        if hp["gating"] == 3:
            weight = softmax(weight)
        if hp["norm"]:
            weight = weight / weight.sum()
        for e, factor in zip(experts, weight * hp["expert_scale"], strict=True):
            out[t] += factor * expert(hp, w, b, e, y[t])
    if margins is not None:
        margins.append(distance)
    if b + "ffn_gate_shexp.weight" in w:
        out += ffn(w, b, "_shexp", y)
    return out


def expert(hp: dict[str, Any], w: dict[str, Array], b: str, e: int, y: Array) -> Array:
    if b + "ffn_gate_up_exps.weight" in w:
        gate, up = np.split(w[b + "ffn_gate_up_exps.weight"][e], 2)
    else:
        gate, up = w[b + "ffn_gate_exps.weight"][e], w[b + "ffn_up_exps.weight"][e]
    return w[b + "ffn_down_exps.weight"][e] @ (silu(gate @ y) * (up @ y))


def ffn(w: dict[str, Array], b: str, end: str, y: Array) -> Array:
    gate = y @ w[f"{b}ffn_gate{end}.weight"].T
    up = y @ w[f"{b}ffn_up{end}.weight"].T
    return (silu(gate) * up) @ w[f"{b}ffn_down{end}.weight"].T


def rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def top(score: Array, k: int) -> tuple[Array, float]:
    """The k best, ties to the lower index, and by how much the worst of them leads the rest."""
    order = np.argsort(-score, kind="stable")
    gap = score[order[k - 1]] - score[order[k]] if k < len(score) else np.inf
    return order[:k], float(gap)


def rotate(x: Array, pos: Array, hp: dict[str, Any]) -> Array:
    """x [n, R] with the pairs (2i, 2i+1) turned by pos * theta_i; magnitudes stay as they are."""
    angle = pos[:, None] * hp["theta"]
    cos, sin = np.cos(angle), np.sin(angle)
    even, odd = x[:, 0::2], x[:, 1::2]
    out = np.empty_like(x)
    out[:, 0::2] = even * cos - odd * sin
    out[:, 1::2] = even * sin + odd * cos
    return out


def rope_theta(
    rot: int,
    base: float,
    factor: float = 1.0,
    n_ctx_orig: int = 0,
    yarn: bool = False,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Array:
    """Angle per position [R/2]; YaRN blends theta (fast dimensions) and theta / factor (slow)."""
    i = np.arange(rot // 2)
    theta = base ** (-2.0 * i / rot)
    if not yarn:
        return theta / factor

    def dim(beta: float) -> float:
        return rot * math.log(n_ctx_orig / (2 * math.pi * beta)) / (2 * math.log(base))

    low = max(0, math.floor(dim(beta_fast)))
    high = min(rot - 1, math.ceil(dim(beta_slow)))
    ramp = 1 - np.clip((i - low) / max(0.001, high - low), 0, 1)
    return theta / factor * (1 - ramp) + theta * ramp


def _hparams(meta: dict[str, Any], weights: dict[str, Array]) -> dict[str, Any]:
    arch = meta["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        return value[0] if isinstance(value, list) else value

    n_layer = get("block_count") - get("nextn_predict_layers", 0)
    rot = get("rope.dimension_count")
    yarn = get("rope.scaling.type") == "yarn"
    base = get("rope.freq_base", 10000.0)
    factor = get("rope.scaling.factor", 0) or 1.0
    key_length = get("attention.key_length_mla", get("attention.key_length"))
    mscale = get("rope.scaling.attn_factor", 1.0) * (
        1 + get("rope.scaling.yarn_log_multiplier", 0.0) * math.log(factor)
    )
    gating = get("expert_gating_func", 0)
    if not gating:  # llama.cpp's rule for old files
        flash = n_layer in (47, 48) and len(weights["token_embd.weight"]) == 154880
        gating = 2 if flash or arch == "glm-dsa" else 1
    context = get("context_length")
    n_ctx_orig = get("rope.scaling.original_context_length", context)
    return {
        "arch": arch,
        "n_layer": n_layer,
        "n_dense": get("leading_dense_block_count", 0),
        "eps": get("attention.layer_norm_rms_epsilon"),
        "H": get("attention.head_count"),
        "L": get("attention.kv_lora_rank"),
        "N": key_length - rot,
        "R": rot,
        "V": get("attention.value_length_mla", get("attention.value_length")),
        "scale": mscale**2 / math.sqrt(key_length),
        "yarn": yarn,
        "factor": factor,
        "base": base,
        "theta": rope_theta(
            rot,
            base,
            factor,
            n_ctx_orig,
            yarn,
            get("rope.scaling.yarn_beta_fast", 32.0),
            get("rope.scaling.yarn_beta_slow", 1.0),
        ),
        "temp_scale": get("attention.temperature_scale", 0.0),
        "temp_length": get("attention.temperature_length", n_ctx_orig),
        "gating": gating,
        "n_used": get("expert_used_count", 0),
        "n_group": get("expert_group_count", 1),
        "n_group_used": get("expert_group_used_count", 1),
        "group_best": 1 if gating == 1 else 2,  # a group's score is the sum of its best 1 or 2
        "norm": get("expert_weights_norm", False),
        "expert_scale": get("expert_weights_scale", 1.0),
        "dsa": _dsa(meta, arch, weights, n_layer, context),
    }


def _dsa(
    meta: dict[str, Any], arch: str, weights: dict[str, Array], n_layer: int, context: int
) -> dict[str, Any] | None:
    """The indexer's sizes, and which layers have one that counts."""
    if not any(f"blk.{i}.indexer.proj.weight" in weights for i in range(n_layer)):
        return None
    key = f"{arch}.attention.indexer."
    types = meta.get(key + "types")
    if types is None:
        old = context < 1048576
        types = [old or i in (0, 1) or i % 4 == 2 for i in range(n_layer)]
    return {
        "heads": meta[key + "head_count"],
        "top_k": meta[key + "top_k"],
        "full": [
            bool(types[i]) and f"blk.{i}.indexer.proj.weight" in weights for i in range(n_layer)
        ],
    }


def _up_projection(w: dict[str, Array], b: str, hp: dict[str, Any]) -> tuple[Array, Array]:
    """W_UK [H, N, L] and W_UV [H, V, L]; attn_k_b and attn_v_b, 3-D or folded, win over kv_b."""
    n_heads, rank, nope, value = hp["H"], hp["L"], hp["N"], hp["V"]
    if b + "attn_k_b.weight" in w:
        k_b = w[b + "attn_k_b.weight"].reshape(n_heads, rank, nope)
        return k_b.transpose(0, 2, 1), w[b + "attn_v_b.weight"].reshape(n_heads, value, rank)
    kv_b = w[b + "attn_kv_b.weight"].reshape(n_heads, nope + value, rank)
    return kv_b[:, :nope], kv_b[:, nope:]
