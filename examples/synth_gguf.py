"""Writes a GGUF file of a published model's exact shapes with random weights, for measurements.

Speed, memory and load times depend on shapes and types, not on what the weights say, so such a
file stands in for a download of many gigabytes. Values are spread as in a fresh network, so that
activations stay finite; the text they produce is noise. Memory stays under 200 MB at any size.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf.quants import dequantize

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model's sizes, in the letters of mlacli's code; q 0 = no query compression."""

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


_V3 = Model(
    layers=61, d=7168, heads=128, q=1536, dense=3, F=18432, f=2048, experts=256, used=8,
    vocab=129280, n_ctx=163840,
    keys={"expert_weights_scale": 2.5, "expert_group_count": 8, "expert_group_used_count": 4,
          **yarn(40.0, 4096, 0.1)},
)  # fmt: skip
PRESETS = {
    "tiny": Model(
        layers=3, d=512, heads=8, q=256, r=256, k=64, v=64, dense=1, F=1024, f=256, experts=8,
        used=2, vocab=1024, n_ctx=16384,
    ),
    "v2lite": Model(
        layers=27, d=2048, heads=16, q=0, dense=1, F=10944, f=1408, experts=64, used=6, shared=2,
        sigmoid=False, vocab=102400, n_ctx=163840, keys=yarn(40.0, 4096, 0.0707),
    ),
    "glm47flash": Model(
        layers=47, d=2048, heads=20, q=768, k=192, v=256, dense=1, F=10240, f=1536, experts=64,
        used=4, vocab=154880, n_ctx=202752,
        keys={"rope.freq_base": 1e6, "expert_weights_scale": 1.8},
    ),
    "v3": _V3,
    "kimi_k2": replace(
        _V3, heads=64, dense=1, experts=384, vocab=163840, n_ctx=131072,
        keys={"rope.freq_base": 50000.0, "expert_weights_scale": 2.827, **yarn(32.0, 4096, 0.1)},
    ),
    "mistral4": Model(
        arch="mistral4", layers=36, d=4096, heads=32, q=1024, r=256, k=64, dense=0, F=12288,
        f=2048, experts=128, used=4, sigmoid=False, vocab=131072, n_ctx=1048576,
        keys={"attention.temperature_scale": 0.1, "expert_weights_norm": True,
              **yarn(128.0, 8192, 0.1)},
    ),
    "glm5": Model(
        arch="glm-dsa", layers=78, d=6144, heads=64, q=2048, k=192, v=256, dense=3, F=12288,
        f=2048, experts=256, used=8, vocab=154880, n_ctx=202752, indexer=(32, 128, 2048),
        keys={"rope.freq_base": 1e6, "expert_weights_scale": 2.5},
    ),
}  # fmt: skip


# ---- types ----------------------------------------------------------------------------------

QUANTS = ("q4_k_m", "q4_0", "q8_0", "f16")
# Where a block's float16 scales lie, and their ratio: a Q4_K value is scale * sub-scale * x - min
# * sub-min with x in 0..15, so a min of 7.5 scales centres it.
_SCALES: Mapping[T, tuple[tuple[int, float], ...]] = {
    T.Q4_0: ((0, 1.0),),
    T.Q5_0: ((0, 1.0),),
    T.Q8_0: ((0, 1.0),),
    T.Q4_K: ((0, 1.0), (2, 7.5)),
    T.Q6_K: ((208, 1.0),),
}


def qtype(quant: str, name: str, shape: Shape, layers: int) -> T:
    """The type that llama.cpp's `quant` gives a tensor, near enough for byte counts."""
    if len(shape) == 1 or "ffn_gate_inp" in name or "indexer.proj" in name:
        return T.F32
    if quant == "f16":
        return T.F16
    if quant == "q8_0" or "attn_k_b" in name or "attn_v_b" in name:
        return T.Q8_0
    if quant == "q4_0":
        return T.Q4_0
    fine = name == "output.weight" or ("ffn_down" in name and _more_bits(name, layers))
    if shape[-1] % 256:  # rows that 256-blocks don't fill fall back to 32-blocks
        return T.Q8_0 if fine else T.Q5_0
    return T.Q6_K if fine else T.Q4_K


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
    return shape[1 if "attn_k_b" in name else -1] ** -0.5


class Pool:
    """Random bytes drawn once per type; every tensor takes rotations of them, scaled to fit."""

    _BYTES = 16 << 20

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._kept: dict[T, tuple[np.ndarray, float]] = {}

    def blocks(self, kind: T, spread: float) -> np.ndarray:
        """uint8 [n, block bytes] whose values have standard deviation `spread`."""
        if kind not in self._kept:
            self._kept[kind] = self._drawn(kind)
        drawn, own = self._kept[kind]
        if kind in (T.F32, T.F16):
            values = drawn.view(np.float32) * np.float32(spread)
            raw = values.astype(np.float32 if kind is T.F32 else np.float16)
            return raw.reshape(-1, 1).view(np.uint8)
        return _scaled(drawn.copy(), kind, spread / own)

    def _drawn(self, kind: T) -> tuple[np.ndarray, float]:
        if kind in (T.F32, T.F16):
            return self.rng.standard_normal(self._BYTES // 4, np.float32), 1.0
        size = gguf.GGML_QUANT_SIZES[kind][1]
        drawn = self.rng.integers(0, 256, (self._BYTES // size, size), np.uint8)
        scaled = _scaled(drawn[:4096].copy(), kind, 2.0**-8)
        return drawn, float(np.std(dequantize(scaled, kind))) * 2**8

    def stream(self, kind: T, shape: Shape, spread: float) -> Iterator[memoryview]:
        """The bytes of one tensor, a pool's worth at a time."""
        blocks = self.blocks(kind, spread)
        left = math.prod(shape) // gguf.GGML_QUANT_SIZES[kind][0]
        while left:
            start = int(self.rng.integers(len(blocks)))
            part = blocks[start : start + left]
            yield memoryview(np.ascontiguousarray(part)).cast("B")
            left -= len(part)


def _scaled(blocks: np.ndarray, kind: T, scale: float) -> np.ndarray:
    for at, ratio in _SCALES[kind]:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale * ratio).tobytes(), np.uint8)
    return blocks


# ---- the file -------------------------------------------------------------------------------


def tensor_bytes(kind: T, shape: Shape) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert shape[-1] % block == 0, f"rows of {shape} don't fill {kind.name} blocks"
    return math.prod(shape) // block * size


def write_synth(
    path: Path, model: Model, quant: str = "q4_k_m", vocab_from: Path | None = None, seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:  # fmt: skip
    """`path`, now a GGUF of `model`; `progress` is told bytes written and bytes in all.

    `vocab_from` is a GGUF whose tokenizer is copied, filled up to the model's vocabulary.
    """
    writer = gguf.GGUFWriter(path, model.arch)
    if vocab_from is None:
        writer.add_tokenizer_model("none")
    else:
        model = _copy_tokenizer(writer, vocab_from, model)
    writer.add_name(f"synthetic {path.stem}")
    for key, value in model.metadata().items():
        _add(writer, key, value)
    shapes = model.shapes()
    kinds = {name: qtype(quant, name, shape, model.layers) for name, shape in shapes.items()}
    sizes = {name: tensor_bytes(kinds[name], shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    pool, total = Pool(seed), sum(sizes.values())
    with path.open("ab") as out:
        done = 0
        for name, shape in shapes.items():
            _pad(out)
            _write_tensor(out, pool, name, shape, kinds[name])
            done += sizes[name]
            if progress is not None:
                progress(done, total)
        _pad(out)
    return path


def _write_tensor(out: BinaryIO, pool: Pool, name: str, shape: Shape, kind: T) -> None:
    if name.endswith("norm.weight"):
        out.write(np.ones(shape, np.float32).tobytes())
    elif name.endswith("k_norm.bias"):
        out.write(bytes(4 * math.prod(shape)))
    else:
        for part in pool.stream(kind, shape, value_spread(name, shape)):
            out.write(part)


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING}
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _copy_tokenizer(writer: gguf.GGUFWriter, path: Path, model: Model) -> Model:
    """`model` with room for all tokens of the file; unused ids get control tokens."""
    fields = gguf.GGUFReader(str(path)).fields
    found = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    tokens = found["tokenizer.ggml.tokens"]
    model = replace(model, vocab=max(model.vocab, len(tokens)))
    spare = range(len(tokens), model.vocab)
    found["tokenizer.ggml.tokens"] = tokens + [f"<|unused {i}|>" for i in spare]
    if "tokenizer.ggml.token_type" in found:
        found["tokenizer.ggml.token_type"] += [3] * len(spare)
    for key, value in found.items():
        _add(writer, key, value)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quant", choices=QUANTS, default="q4_k_m")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--vocab-gguf", type=Path, help="copy the tokenizer of this file")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model = PRESETS[args.preset]
    if args.layers:
        model = replace(model, layers=args.layers)

    def progress(done: int, total: int) -> None:
        print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", flush=True)

    write_synth(args.out, model, args.quant, args.vocab_gguf, args.seed, progress)
    print()


if __name__ == "__main__":
    main()
