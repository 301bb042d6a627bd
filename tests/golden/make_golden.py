"""Makes tests/golden/models: tiny GGUF files and the logits transformers computes for them.

The weights are random with fixed seeds. The reference comes from transformers' own classes, loaded
with the weights as the finished file holds them (rounded, dequantised), run in float64 as far as
those classes allow, and is then compared with the independent NumPy model of tests/kit.
Needs torch and transformers; the tests that use the files do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
N_TOKENS = 40


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


export = _module(ROOT / "examples" / "tiny_model" / "export_gguf.py")
reference = _module(ROOT / "tests" / "kit" / "reference.py")
models = _module(HERE / "golden_models.py")


def make_model(config: Any, seed: int) -> Any:
    """A model whose attention is peaked, whose routing is decided and whose logits have std 1-4."""
    kind = type(config).__name__.removesuffix("Config")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    rng = torch.Generator().manual_seed(seed)
    # Gain of a matrix: the std of its output for an input of unit variance.
    gains = {
        "embed_tokens": config.hidden_size**0.5,  # so that the stored values have std 1
        "lm_head": 2.0,
        "q_proj": 1.6,
        "q_b_proj": 1.6,
        "mlp.gate.": 2.0,
        "indexer.wq_b": 2.0,
        "indexer.weights_proj": 2.0,
        "experts.down_proj": 2.0 / max(1.0, config.routed_scaling_factor),
    }
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float32)
            if name.endswith(("inv_freq",)):
                continue
            if name.endswith("e_score_correction_bias"):
                p.copy_(0.15 * noise)
            elif name.endswith("k_norm.bias"):
                p.copy_(0.3 * noise)
            elif p.ndim == 1:
                p.copy_(1.0 + 0.2 * noise)
            else:
                gain = next((g for word, g in gains.items() if word in name), 1.0)
                if config.tie_word_embeddings and "embed_tokens" in name:
                    gain = 2.0
                p.copy_(gain * noise / p.shape[-1] ** 0.5)
    return model


def read_back(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """The state dict that a GGUF file (split3d, interleaved rope) stands for, dequantised."""
    tensors = {
        t.name: np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
        for t in gguf.GGUFReader(str(path)).tensors
    }
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    state = {hf: tensors[ours] for hf, ours in export.GLOBAL_NAMES.items() if ours in tensors}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(config.num_hidden_layers):
        hf, ours = f"model.layers.{i}.", f"blk.{i}."
        for theirs, name in export.LAYER_NAMES.items():
            if ours + name in tensors and not theirs.startswith("mlp.experts."):
                state[hf + theirs] = tensors[ours + name]
        k_b = tensors[ours + "attn_k_b.weight"].transpose(0, 2, 1)
        kv_b = np.concatenate([k_b, tensors[ours + "attn_v_b.weight"]], axis=1)
        assert kv_b.shape[0] == heads
        state[hf + "self_attn.kv_b_proj.weight"] = kv_b.reshape(-1, rank)
        if ours + "ffn_down_exps.weight" in tensors:
            both = tensors.get(ours + "ffn_gate_up_exps.weight")
            if both is None:
                sides = [tensors[f"{ours}ffn_{side}_exps.weight"] for side in ("gate", "up")]
                both = np.concatenate(sides, axis=1)
            state[hf + "mlp.experts.gate_up_proj"] = both
            state[hf + "mlp.experts.down_proj"] = tensors[ours + "ffn_down_exps.weight"]
    return {name: torch.from_numpy(np.array(a)) for name, a in state.items()}


def run(model: Any, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """transformers' logits [n, vocab], float64."""
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        return model.double()(input_ids=ids, use_cache=False).logits[0].numpy()


def run_dense(model: Any, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The logits with an indexer that keeps every row."""
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    for indexer in filter(None, indexers):
        indexer.index_topk = len(tokens)
    return run(model, tokens)


def nmse(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    return float(np.sum((got - want) ** 2) / np.sum((want - want.mean()) ** 2))


def make(golden: Any, folder: Path) -> str:
    """Writes one file and, unless shared, its logits; returns a line of figures."""
    path = folder / f"{golden.file}.gguf"
    config = golden.config()
    model = make_model(config, golden.seed)
    export.export_gguf(
        model,
        config,
        path,
        qtype=golden.qtype,
        layout=golden.layout,
        style=golden.style,
        overrides=golden.overrides,
        name=f"mlacli golden {golden.file}",
    )
    tokens = np.random.default_rng(golden.seed).integers(0, models.VOCAB, N_TOKENS).astype(np.int32)
    margins: list[np.ndarray[Any, Any]] = []
    choices: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    ours = reference.load(path)
    plain = reference.forward(ours, tokens, margins, choices)
    more: dict[str, np.ndarray[Any, Any]] = {}

    if golden.logits:
        logits = np.load(folder / f"{golden.logits}.npz")["logits"].astype(np.float64)
    else:
        model.load_state_dict(read_back(path, config))
        logits = run(model, tokens)
        if choices:
            more["index_margin"] = np.min([margin for _, margin in choices], axis=0)
            more["dense"] = run_dense(model, tokens)
        top2 = np.sort(logits, axis=1)[:, -2:]
        np.savez_compressed(
            folder / f"{golden.file}.npz",
            tokens=tokens,
            logits=logits.astype(np.float32),
            top_gap=(top2[:, 1] - top2[:, 0]).astype(np.float32),
            route_margin=np.min(margins, axis=0).astype(np.float32),
            **{name: a.astype(np.float32) for name, a in more.items()},
        )

    seen = {name: nmse(reference.forward(m, tokens), plain) for name, m in mutants(ours)}
    figures = (
        f"{golden.file:14s} {path.stat().st_size:7d} B  agree {nmse(plain, logits):.0e}  "
        f"std {logits.std():.2f}  route margin {np.min(margins):.0e}  top gap {_gap(logits):.0e}  "
        f"peak {_peak(ours, tokens):.2f} | " + "  ".join(f"{k} {v:.0e}" for k, v in seen.items())
    )
    if choices:
        dense = reference.forward(ours | {"hparams": ours["hparams"] | {"dsa": None}}, tokens)
        error, margin = nmse(dense, more["dense"]), more["index_margin"].min()
        figures += f" | dense agrees {error:.0e}, index margin {margin:.0e}"
        assert error < 1e-10 and margin > 1e-4, figures
    assert nmse(plain, logits) < 1e-10, figures
    assert min(seen.values()) > 1e-5, figures
    return figures


def mutants(ours: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Models that are wrong in one way each; the logits must tell every one from the right one."""
    hp, weights = ours["hparams"], ours["weights"]

    def model(
        hparams: dict[str, Any] | None = None, factors: dict[str, float] | None = None
    ) -> dict[str, Any]:
        changed = {
            name: a * next((f for end, f in (factors or {}).items() if name.endswith(end)), 1.0)
            for name, a in weights.items()
        }
        return {"hparams": hp | (hparams or {}), "weights": changed}

    if hp["dsa"]:
        yield "dense", model({"dsa": None})
        yield "one row less", model({"dsa": hp["dsa"] | {"top_k": hp["dsa"]["top_k"] - 1}})
        shared = [*hp["dsa"]["full"][:-1], False]
        yield "last layer shared", model({"dsa": hp["dsa"] | {"full": shared}})
        yield "k_norm bias", model(factors={"indexer.k_norm.bias": 0.0})
    if hp["temp_scale"]:
        yield "no-temperature", model({"temp_scale": 0.0})
        yield "temperature+5%", model({"temp_scale": 1.05 * hp["temp_scale"]})
        yield "other length", model({"temp_length": hp["temp_length"] + 1})
    yield "W_UK+1%", model(factors={".k": 1.01})
    yield "W_UV+1%", model(factors={".v": 1.01})
    yield "no-shexp", model(factors={"_shexp.weight": 0.0})
    if hp["yarn"]:
        yield "no-yarn", model({"theta": reference.rope_theta(hp["R"], hp["base"])})
        linear = reference.rope_theta(hp["R"], hp["base"], hp["factor"])
        yield "no-ramp", model({"theta": linear})
        yield "no-mscale", model({"scale": (hp["N"] + hp["R"]) ** -0.5})
    if hp["n_group"] > 1:
        yield "no-groups", model({"n_group": 1})
        yield "other-group-rule", model({"group_best": 3 - hp["group_best"]})
    if any(name.endswith("exp_probs_b.bias") for name in weights):
        yield "no-bias", model(factors={"exp_probs_b.bias": 0.0})
    yield "other-norm", model({"norm": not hp["norm"]})
    if hp["expert_scale"] != 1:
        yield "no-scale", model({"expert_scale": 1.0})


def check_half_split(folder: Path) -> str:
    """A model with half-split rope must export to the interleaved pairs of GGUF."""
    config = models.glm47flash()
    config.rope_interleave = False
    model = make_model(config, 6)
    path = folder / "half_split.gguf"
    export.export_gguf(model, config, path)
    tokens = np.random.default_rng(6).integers(0, models.VOCAB, N_TOKENS)
    error = nmse(reference.forward(reference.load(path), tokens), run(model, tokens))
    assert error < 1e-10, error
    return f"half-split rope, exported and compared: {error:.1e}"


def _gap(logits: np.ndarray[Any, Any]) -> float:
    top2 = np.sort(logits, axis=1)[:, -2:]
    return float((top2[:, 1] - top2[:, 0]).min())


def _peak(ours: dict[str, Any], tokens: np.ndarray[Any, Any]) -> float:
    """Mean over heads and the later positions of layer 0's largest attention probability."""
    peaks: list[float] = []
    plain = reference.softmax

    def spy(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        p = plain(x)
        if p.shape == (len(tokens), len(tokens)):
            peaks.append(float(p[len(tokens) // 2 :].max(axis=1).mean()))
        return p

    reference.softmax = spy
    try:
        reference.forward(ours, tokens)
    finally:
        reference.softmax = plain
    return float(np.mean(peaks[: ours["hparams"]["H"]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "models")
    parser.add_argument("--only", help="make only files whose name contains this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for golden in models.GOLDENS:
        if not args.only or args.only in golden.file:
            print(make(golden, args.out), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(check_half_split(Path(folder)))
    total = sum(p.stat().st_size for p in args.out.iterdir())
    print(f"{total} bytes in all")


if __name__ == "__main__":
    main()
