"""Writes MLA GGUF files: tiny seeded ones with weights, and headers of real models' shapes.

Built on gguf.GGUFWriter and the format's rules alone; imports nothing from mlacli.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf.quants import dequantize, quantize

# Types that gguf can unpack but not pack: byte offsets of their float16 scales in a block.
SCALES_AT: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
        "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
        "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ1_M": (), "NVFP4": (),
    }
)  # fmt: skip
PACKED = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
QTYPES = ("F32", *PACKED, *SCALES_AT)  # all that gguf can unpack


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One model. Sizes in the project's legend letters; q 0 = lite."""

    arch: str = "deepseek2"
    layers: int = 2  # without the MTP blocks
    dense: int = 1
    d: int = 64
    heads: int = 4
    q: int = 48
    r: int = 32
    k: int = 32
    p: int = 16
    v: int = 32
    F: int = 96
    f: int = 64
    experts: int = 8
    used: int = 2
    groups: int = 1
    groups_used: int = 1
    shared: int = 1
    sigmoid: bool = True
    biased: tuple[int, ...] | None = None  # layers with exp_probs_b; None = all MoE layers
    vocab: int = 80
    n_ctx: int = 512
    mtp: int = 0
    layout: str = "split3d"  # kv_b, folded (2-D k_b and v_b beside kv_b, as ik's converter writes)
    style: str = "mainline"  # ik: head_count_kv = heads, sizes in key_length and value_length
    tied: bool = False
    merged: bool = False  # one ffn_gate_up_exps
    indexed: tuple[int, ...] = ()  # layers with indexer tensors
    index_heads: int = 4
    index_width: int = 24
    top_k: int = 6
    # Tensor word (attn_q_b) -> type; "" = all other matrices.
    qtypes: Mapping[str, str] = field(default_factory=dict)
    # Key (without the architecture, or whole) -> value over the default; None removes it.
    metadata: Mapping[str, Any] = field(default_factory=dict)
    alignment: int = 32
    seed: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> row-major shape, in the order of the file."""
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, self.d)}
        for layer in range(self.layers + self.mtp):
            for name, shape in self._layer(layer).items():
                found[f"blk.{layer}.{name}"] = shape
        found["output_norm.weight"] = (self.d,)
        if not self.tied:
            found["output.weight"] = (self.vocab, self.d)
        return found

    def _layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        d, H, r, k, v, f = self.d, self.heads, self.r, self.k, self.v, self.f
        found: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,)}
        head = H * (k + self.p)
        if self.q:
            found |= {"attn_q_a.weight": (self.q, d), "attn_q_a_norm.weight": (self.q,)}
            found |= {"attn_q_b.weight": (head, self.q)}
        else:
            found |= {"attn_q.weight": (head, d)}
        found |= {"attn_kv_a_mqa.weight": (r + self.p, d), "attn_kv_a_norm.weight": (r,)}
        if self.layout in ("kv_b", "folded"):
            found |= {"attn_kv_b.weight": (H * (k + v), r)}
        if self.layout == "folded":
            found |= {"attn_k_b.weight": (H * r, k), "attn_v_b.weight": (H * v, r)}
        if self.layout == "split3d":
            found |= {"attn_k_b.weight": (H, r, k), "attn_v_b.weight": (H, v, r)}
        if layer in self.indexed:
            i, n = self.index_width, self.index_heads
            found |= {"indexer.attn_q_b.weight": (n * i, self.q), "indexer.attn_k.weight": (i, d)}
            found |= {"indexer.k_norm.weight": (i,), "indexer.k_norm.bias": (i,)}
            found |= {"indexer.proj.weight": (n, d)}
        found |= {"attn_output.weight": (d, H * v), "ffn_norm.weight": (d,)}
        if layer < self.dense or not self.experts:
            return found | {
                "ffn_gate.weight": (self.F, d),
                "ffn_up.weight": (self.F, d),
                "ffn_down.weight": (d, self.F),
            }
        found |= {"ffn_gate_inp.weight": (self.experts, d)}
        if layer in self.biased if self.biased is not None else self.sigmoid:
            found |= {"exp_probs_b.bias": (self.experts,)}
        if self.merged:
            found |= {"ffn_gate_up_exps.weight": (self.experts, 2 * f, d)}
        else:
            found |= {"ffn_gate_exps.weight": (self.experts, f, d)}
            found |= {"ffn_up_exps.weight": (self.experts, f, d)}
        found |= {"ffn_down_exps.weight": (self.experts, d, f)}
        if self.shared:
            s = f * self.shared
            found |= {"ffn_gate_shexp.weight": (s, d), "ffn_up_shexp.weight": (s, d)}
            found |= {"ffn_down_shexp.weight": (d, s)}
        if layer >= self.layers:
            found |= {"nextn.eh_proj.weight": (d, 2 * d), "nextn.enorm.weight": (d,)}
        return found

    def qtype(self, name: str, shape: tuple[int, ...]) -> T:
        """Norms, biases and the gate are F32; matrices what `qtypes` says, else F32."""
        word = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if len(shape) == 1 or word in ("ffn_gate_inp", "bias"):
            return T[self.qtypes.get(word, "F32")]
        return T[self.qtypes.get(word, self.qtypes.get("", "F32"))]

    def keys(self) -> dict[str, tuple[Any, V]]:
        """Metadata with GGUF types, `metadata` laid over the defaults."""
        mainline = self.style == "mainline"
        key = self.k + self.p
        own: dict[str, Any] = {
            "block_count": self.layers + self.mtp,
            "context_length": self.n_ctx,
            "embedding_length": self.d,
            "feed_forward_length": self.F,
            "attention.head_count": self.heads,
            "attention.head_count_kv": 1 if mainline else self.heads,
            "attention.key_length": self.r + self.p if mainline else key,
            "attention.value_length": self.r if mainline else self.v,
            "attention.key_length_mla": key if mainline else None,
            "attention.value_length_mla": self.v if mainline else None,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.q_lora_rank": self.q or None,
            "attention.kv_lora_rank": self.r,
            "rope.dimension_count": self.p,
            "rope.freq_base": 10000.0,
            "leading_dense_block_count": self.dense,
            "vocab_size": self.vocab,
            "nextn_predict_layers": self.mtp or None,
        }
        if self.experts:
            own |= {
                "expert_count": self.experts,
                "expert_used_count": self.used,
                "expert_feed_forward_length": self.f,
                "expert_shared_count": self.shared,
                "expert_weights_scale": 2.5 if self.sigmoid else 1.0,
                "expert_weights_norm": self.sigmoid,
                "expert_gating_func": 2 if self.sigmoid else 1,
            }
        if self.groups > 1:
            own |= {
                "expert_group_count": self.groups,
                "expert_group_used_count": self.groups_used,
            }
        if self.indexed:
            own |= {
                "attention.indexer.head_count": self.index_heads,
                "attention.indexer.key_length": self.index_width,
                "attention.indexer.top_k": self.top_k,
            }
        arch = f"{self.arch}."
        whole: dict[str, Any] = {
            arch + name: value for name, value in own.items()
        } | {
            name if name.startswith(("general.", "tokenizer.", "split.", arch))
            else arch + name: value
            for name, value in self.metadata.items()
        }  # fmt: skip
        return {name: (x, _value_type(x)) for name, x in whole.items() if x is not None}


def _value_type(value: Any) -> V:
    if isinstance(value, bool):
        return V.BOOL
    if isinstance(value, int):
        return V.UINT32 if value >= 0 else V.INT32
    if isinstance(value, float):
        return V.FLOAT32
    return V.STRING if isinstance(value, str) else V.ARRAY


TOY = Toy()


def write_toy(path: Path, toy: Toy = TOY, split_max_tensors: int = 0) -> Path:
    """`path`, now a model with random weights; with `split_max_tensors` a set of parts.

    A split set is written by gguf's own splitter, and the path of its first part returned.
    """
    writer = _writer(path, toy, split_max_tensors)
    rng = np.random.default_rng(toy.seed)
    for name, shape in toy.shapes().items():
        qtype = toy.qtype(name, shape)
        raw = random_weight(shape, qtype, rng, mean=1.0 if name.endswith("norm.weight") else 0.0)
        writer.add_tensor(name, raw, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not split_max_tensors:
        return path
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def random_weight(
    shape: tuple[int, ...], qtype: T, rng: np.random.Generator, mean: float = 0.0
) -> np.ndarray[Any, Any]:
    """GGUF data of a weight with values of about 1/sqrt(columns) around `mean`."""
    if qtype.name in SCALES_AT:
        return random_blocks(shape, qtype, rng)
    values = rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1]).astype(np.float32)
    values = (0.2 * values + mean if mean else values).astype(np.float32)
    if qtype is T.F32:
        return values
    if qtype is T.F16:
        return values.astype(np.float16)
    return quantize(values, qtype)


def random_blocks(
    shape: tuple[int, ...], qtype: T, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Random valid bytes of a type that gguf can't pack, scales set so that values are small."""
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
    for at in SCALES_AT[qtype.name]:
        scale = rng.uniform(5e-4, 2e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    if qtype is T.IQ1_M:  # its float16 scale is spread over the top nibbles of four uint16
        bits = int(np.float16(0.01).view(np.uint16))
        for i in range(4):
            high = blocks[:, 49 + 2 * i]
            blocks[:, 49 + 2 * i] = (high & 15) | ((bits >> 4 * i & 15) << 4)
    if qtype is T.NVFP4:  # four scales of its own 8-bit float; keep their exponents low
        blocks[:, :4] &= 0x1F
    assert np.isfinite(dequantize(blocks[:64], qtype)).all()
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def _writer(path: Path, toy: Toy, split_max_tensors: int = 0) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, toy.arch, split_max_tensors=split_max_tensors)
    writer.add_name("toy")
    if toy.alignment != 32:
        writer.add_custom_alignment(toy.alignment)
    for name, (value, kind) in toy.keys().items():
        if kind is V.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kind)
    return writer


_YARN = MappingProxyType(
    {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.1,
    }
)
_V3 = Toy(
    layers=61, dense=3, d=7168, heads=128, q=1536, r=512, k=128, p=64, v=128, F=18432, f=2048,
    experts=256, used=8, groups=8, groups_used=4, vocab=129280, n_ctx=163840, metadata=_YARN,
)  # fmt: skip
PRESETS: Mapping[str, Toy] = MappingProxyType(
    {
        "v3": _V3,
        "v2lite": Toy(
            layers=27, d=2048, heads=16, q=0, r=512, k=128, p=64, v=128, F=10944, f=1408,
            experts=64, used=6, shared=2, sigmoid=False, vocab=102400, n_ctx=163840,
            metadata={**_YARN, "rope.scaling.yarn_log_multiplier": 0.0707},
        ),
        "glm47flash": Toy(
            layers=47, d=2048, heads=20, q=768, r=512, k=192, p=64, v=256, F=10240, f=1536,
            experts=64, used=4, vocab=154880, n_ctx=202752, mtp=1,
        ),
        "kimi_k2": replace(
            _V3, dense=1, heads=64, experts=384, groups=1, groups_used=1, vocab=163840,
            n_ctx=131072,
        ),
    }
)  # fmt: skip


def q4_k_m(name: str, shape: tuple[int, ...]) -> T:
    """The type llama.cpp's Q4_K_M gives a tensor, near enough for byte counts."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return T.F32
    if "attn_k_b" in name or "attn_v_b" in name:
        return T.Q8_0
    if "down" in name or name == "output.weight":
        return T.Q6_K if shape[-1] % 256 == 0 else T.Q8_0
    return T.Q4_K if shape[-1] % 256 == 0 else T.Q5_0


def header_only(
    path: Path,
    preset: str,
    qtype: Callable[[str, tuple[int, ...]], T] = q4_k_m,
    with_vocab: bool = False,
    **changes: Any,
) -> Path:
    """`path`, a sparse file: the preset's whole header, and a hole where the weights belong."""
    toy = replace(PRESETS[preset], **changes)
    writer = _writer(path, toy)
    if with_vocab:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("deepseek-v3")
        words = [f"token{i:06d}" for i in range(toy.vocab)]
        writer.add_token_list(words)
        writer.add_token_types([1] * toy.vocab)
        writer.add_token_merges([f"{a} {b}" for a, b in itertools.pairwise(words)])
    size = 0
    for name, shape in toy.shapes().items():
        kind = qtype(name, shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kind)
        size += writer.ggml_pad(nbytes, toy.alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = writer.ggml_pad(path.stat().st_size, toy.alignment)
    os.truncate(path, start + size)
    return path
