"""Shapes, metadata and tensor types of published models: what a synthetic model is made from.

Speed, memory and load times depend on these and not on what the weights say. Holds no arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlacli.errors import UsageError
from mlacli.flag_values import nearest

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model's sizes in the project's letters; q 0 = no query compression."""

    name: str = ""
    arch: str = "deepseek2"
    layers: int
    d: int  # width of the residual stream
    heads: int
    q: int  # query rank
    r: int = 512  # key and value rank
    k: int = 128  # key part without position
    p: int = 64  # key part with position
    v: int = 128
    dense: int  # leading layers without experts
    F: int  # FFN width of those
    f: int  # width of one expert
    experts: int
    used: int
    shared: int = 1
    sigmoid: bool = True
    vocab: int
    n_ctx: int
    indexer: tuple[int, int, int] | None = None  # heads, key size, top-k
    keys: Mapping[str, Any] = field(default_factory=dict)  # over the defaults, without the arch

    def shapes(self) -> dict[str, Shape]:
        """Tensor name -> row-major shape, in the order of the file."""
        found: dict[str, Shape] = {"token_embd.weight": (self.vocab, self.d)}
        for layer in range(self.layers):
            parts = self._attention() | (self._ffn() if layer < self.dense else self._moe())
            found |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
        return found | {"output_norm.weight": (self.d,), "output.weight": (self.vocab, self.d)}

    def _attention(self) -> dict[str, Shape]:
        d, h, key = self.d, self.heads, self.k + self.p
        found: dict[str, Shape] = {"attn_norm.weight": (d,)}
        if self.q:
            found |= {"attn_q_a.weight": (self.q, d), "attn_q_a_norm.weight": (self.q,)}
            found |= {"attn_q_b.weight": (h * key, self.q)}
        else:
            found |= {"attn_q.weight": (h * key, d)}
        found |= {
            "attn_kv_a_mqa.weight": (self.r + self.p, d),
            "attn_kv_a_norm.weight": (self.r,),
            "attn_k_b.weight": (h, self.r, self.k),
            "attn_v_b.weight": (h, self.v, self.r),
            "attn_output.weight": (d, h * self.v),
            "ffn_norm.weight": (d,),
        }
        if self.indexer:
            heads, size, _ = self.indexer
            found |= {"indexer.k_norm.weight": (size,), "indexer.k_norm.bias": (size,)}
            found |= {"indexer.proj.weight": (heads, d), "indexer.attn_k.weight": (size, d)}
            found |= {"indexer.attn_q_b.weight": (heads * size, self.q)}
        return found

    def _ffn(self) -> dict[str, Shape]:
        up, down = (self.F, self.d), (self.d, self.F)
        return {"ffn_gate.weight": up, "ffn_up.weight": up, "ffn_down.weight": down}

    def _moe(self) -> dict[str, Shape]:
        d, f, n, s = self.d, self.f, self.experts, self.f * self.shared
        found: dict[str, Shape] = {"ffn_gate_inp.weight": (n, d)}
        if self.sigmoid:
            found |= {"exp_probs_b.bias": (n,)}
        return found | {
            "ffn_gate_exps.weight": (n, f, d),
            "ffn_up_exps.weight": (n, f, d),
            "ffn_down_exps.weight": (n, d, f),
            "ffn_gate_shexp.weight": (s, d),
            "ffn_up_shexp.weight": (s, d),
            "ffn_down_shexp.weight": (d, s),
        }

    def metadata(self) -> dict[str, Any]:
        """Keys in llama.cpp's style, where head_count_kv is 1 and sizes are those of the latent."""
        own = {
            "block_count": self.layers,
            "context_length": self.n_ctx,
            "embedding_length": self.d,
            "feed_forward_length": self.F,
            "vocab_size": self.vocab,
            "attention.head_count": self.heads,
            "attention.head_count_kv": 1,
            "attention.key_length": self.r + self.p,
            "attention.value_length": self.r,
            "attention.key_length_mla": self.k + self.p,
            "attention.value_length_mla": self.v,
            "attention.kv_lora_rank": self.r,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": self.p,
            "rope.freq_base": 10000.0,
            "leading_dense_block_count": self.dense,
            "expert_count": self.experts,
            "expert_used_count": self.used,
            "expert_feed_forward_length": self.f,
            "expert_shared_count": self.shared,
            "expert_gating_func": 2 if self.sigmoid else 1,
            "expert_weights_norm": self.sigmoid,
            "expert_weights_scale": 1.0,
        }
        if self.q:
            own["attention.q_lora_rank"] = self.q
        if self.indexer:
            names = ("head_count", "key_length", "top_k")
            values = zip(names, self.indexer, strict=True)
            own |= {f"attention.indexer.{name}": value for name, value in values}
        return {f"{self.arch}.{name}": value for name, value in (own | dict(self.keys)).items()}


def yarn(factor: float, n_ctx_orig: int, log_mul: float) -> dict[str, Any]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": n_ctx_orig,
        "rope.scaling.yarn_log_multiplier": log_mul,
    }


_V3 = Preset(
    layers=61, d=7168, heads=128, q=1536, dense=3, F=18432, f=2048, experts=256, used=8,
    vocab=129280, n_ctx=163840,
    keys={"expert_weights_scale": 2.5, "expert_group_count": 8, "expert_group_used_count": 4,
          **yarn(40.0, 4096, 0.1)},
)  # fmt: skip
PRESETS = {
    "tiny": Preset(
        layers=3, d=512, heads=8, q=256, r=256, k=64, v=64, dense=1, F=1024, f=256, experts=8,
        used=2, vocab=1024, n_ctx=16384,
    ),
    "v2lite": Preset(
        layers=27, d=2048, heads=16, q=0, dense=1, F=10944, f=1408, experts=64, used=6, shared=2,
        sigmoid=False, vocab=102400, n_ctx=163840, keys=yarn(40.0, 4096, 0.0707),
    ),
    "glm47flash": Preset(
        layers=47, d=2048, heads=20, q=768, k=192, v=256, dense=1, F=10240, f=1536, experts=64,
        used=4, vocab=154880, n_ctx=202752,
        keys={"rope.freq_base": 1e6, "expert_weights_scale": 1.8},
    ),
    "v3": _V3,
    "kimi_k2": replace(
        _V3, heads=64, dense=1, experts=384, vocab=163840, n_ctx=131072,
        keys={"rope.freq_base": 50000.0, "expert_weights_scale": 2.827, **yarn(32.0, 4096, 0.1)},
    ),
    "mistral4": Preset(
        arch="mistral4", layers=36, d=4096, heads=32, q=1024, r=256, k=64, dense=0, F=12288,
        f=2048, experts=128, used=4, sigmoid=False, vocab=131072, n_ctx=1048576,
        keys={"attention.temperature_scale": 0.1, "expert_weights_norm": True,
              **yarn(128.0, 8192, 0.1)},
    ),
    "glm5": Preset(
        arch="glm-dsa", layers=78, d=6144, heads=64, q=2048, k=192, v=256, dense=3, F=12288,
        f=2048, experts=256, used=8, vocab=154880, n_ctx=202752, indexer=(32, 128, 2048),
        keys={"rope.freq_base": 1e6, "expert_weights_scale": 2.5},
    ),
}  # fmt: skip


# ---- types ----------------------------------------------------------------------------------

QUANTS = ("q4_k_m", "q4_0", "q8_0", "f16")


def type_name(quant: str, name: str, shape: Shape, layers: int) -> str:
    """The type that llama.cpp's `quant` gives a tensor, near enough for byte counts."""
    if len(shape) == 1 or "ffn_gate_inp" in name or "indexer.proj" in name:
        return "F32"
    if quant == "f16":
        return "F16"
    if quant == "q8_0" or "attn_k_b" in name or "attn_v_b" in name:
        return "Q8_0"
    if quant == "q4_0":
        return "Q4_0"
    fine = name == "output.weight" or ("ffn_down" in name and _more_bits(name, layers))
    if shape[-1] % 256:  # rows that 256-blocks don't fill fall back to 32-blocks
        return "Q8_0" if fine else "Q5_0"
    return "Q6_K" if fine else "Q4_K"


def _more_bits(name: str, layers: int) -> bool:
    """llama.cpp's Q4_K_M keeps the outer eighths and every third layer between in Q6_K."""
    layer = int(name.split(".")[1])
    eighth = layers // 8
    return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


def value_spread(name: str, shape: Shape) -> float:
    """The standard deviation of a tensor's values: each layer keeps the size of its input."""
    if name == "token_embd.weight":
        return 1.0
    if name.endswith("exp_probs_b.bias"):
        return 0.02
    # k_b [heads, r, k] multiplies by its rows, so its inputs number r.
    return float(shape[1 if "attn_k_b" in name else -1] ** -0.5)


def preset(word: str) -> Preset:
    """The preset that `NAME` or `NAME:layers` means; UsageError for another word."""
    name, _, layers = word.partition(":")
    if name not in PRESETS:
        raise UsageError(f"{name!r} is no preset", nearest(name, PRESETS))
    found = PRESETS[name]
    if not layers:
        return replace(found, name=name)
    if not layers.isdecimal() or not found.dense < int(layers) <= found.layers:
        raise UsageError(
            f"{layers!r} is no number of layers for {name}",
            f"give a number from {found.dense + 1} to {found.layers}",
        )
    return replace(found, name=word, layers=int(layers))
