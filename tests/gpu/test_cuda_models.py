"""Whole models on one GPU against transformers' logits and against the NumPy ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse, row_nmse, same_top1
from kit.golden_files import EXACT, FILES, MODELS, golden
from kit.imposed import Choices, Judge, of_numpy
from kit.toy_gguf import QTYPES, Toy, write_toy
from kit.toy_scales import tamed

import mlacli

# NMSE of logits. Each product sums in float32, whose error is far below these.
FLOAT32 = 1e-6  # plain kernels: float32 throughout
# Prefill on weights in tiles rounds a product's inputs to float16, a relative error of 2^-11 / 1.7
# at most and 2.1e-4 in the mean square, 4.5e-8 of the product; Q8_0 and the like as much again when
# weights are scaled. Three or four layers of seven products one after another make 1e-6 to 7e-6:
# float64 with those roundings alone gives 2e-6 (test_float16_inputs_explain_the_error).
ACTIVATIONS = 2e-5
# Decode keeps 16 bits of an activation's mantissa: 2^-17 relative, 2e-11 a product.
DECODE = 1e-8
# -gap f16 rounds query, cached row and probabilities to float16: three roundings of 4.5e-8 a layer.
DECODE_HALF = 2e-6
UNPACKED = [t for t in QTYPES if t not in ("TQ1_0", "TQ2_0", "NVFP4")]
GOLDENS = [name for name in FILES if (MODELS / f"{name}.npz").exists()]


def of_cpu(path: Path, tokens: list[int]) -> tuple[np.ndarray, Choices]:
    """Logits and choices of the NumPy backend."""
    with of_numpy() as choices, mlacli.load(path, device="cpu", **EXACT) as engine:
        return engine.logits(tokens), choices


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_are_those_of_transformers(name: str) -> None:
    """With its choices: NumPy's, whose logits are those of transformers to 1e-8."""
    tokens, want = golden(name)
    of_numpy_backend, choices = of_cpu(FILES[name], tokens)
    assert nmse(of_numpy_backend, want) <= 1e-8
    judge = Judge(choices)
    with mlacli.load(FILES[name], device="cuda0", **EXACT) as engine:
        alone = engine.logits(tokens)
        with judge.imposing(engine):
            got = engine.logits(tokens)
    print(f"{name}: prefill {nmse(got, want):.1e} (alone {nmse(alone, want):.1e})", end="; ")
    print(judge.check(ACTIVATIONS))
    assert nmse(got, want) <= ACTIVATIONS
    assert same_top1(got, want)


@pytest.mark.parametrize("name", ["v2lite", "v3", "glm_dsa", "mistral4", "real_rows"])
def test_decode_is_that_of_transformers(name: str) -> None:
    """Choices are its own: their margins exceed decode's error in all golden models."""
    tokens, want = golden(name)
    with mlacli.load(FILES[name], device="cuda0", **EXACT) as engine:
        got = np.stack([engine.decode(token) for token in tokens])
        engine.rewind(0)
        again = np.stack([engine.decode(token) for token in tokens])
    print(f"{name}: decode {nmse(got, want):.1e}")
    assert nmse(got, want) <= DECODE
    assert np.array_equal(got, again)


@pytest.mark.parametrize("name", ["v2lite", "v3", "glm_dsa", "real_rows"])
def test_decode_in_the_default_precision(name: str) -> None:
    """With NumPy's choices: those of glm_dsa are as close as this precision's error."""
    tokens, want = golden(name)
    half = {**EXACT, "graph_attn_precision": "f16"}
    judge = Judge(of_cpu(FILES[name], tokens)[1])
    with mlacli.load(FILES[name], device="cuda0", **half) as engine:
        got = judge.decoded(engine, tokens)
    print(f"{name}: decode -gap f16 {nmse(got, want):.1e}")
    assert nmse(got, want) <= DECODE_HALF


@pytest.mark.parametrize("name", ["v2lite", "v3", "glm_dsa"])
def test_old_devices_compute_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tiles and no tensor cores: what compute capability 7.5 runs."""
    monkeypatch.setenv("MLACLI_ARCH", "75")
    tokens, want = golden(name)
    with mlacli.load(FILES[name], device="cuda0", **EXACT) as engine:
        got = engine.logits(tokens)
        engine.rewind(20)
        singly = np.stack([engine.decode(token) for token in tokens[20:]])
    print(f"{name}: 7.5 {nmse(got, want):.1e} {nmse(singly, want[20:]):.1e}")
    assert nmse(got, want) <= FLOAT32
    assert nmse(singly, want[20:]) <= FLOAT32


def test_glm_dsa_runs_dense() -> None:
    tokens, want = golden("glm_dsa", "dense")
    with mlacli.load(FILES["glm_dsa"], device="cuda0", **EXACT, no_dsa=True) as engine:
        got = engine.logits(tokens)
    assert nmse(got, want) <= ACTIVATIONS


def test_float16_inputs_explain_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 whose products take float16 inputs is as far from float64 as the bars above say."""
    model, tokens = reference.load(FILES["v3"]), golden("v3")[0]
    want = reference.forward(model, tokens)
    rms = reference.rms

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float64)

    def gated(w: Any, gate: Any, up: Any, down: Any, y: np.ndarray) -> np.ndarray:
        return rounded(reference.silu(y @ gate.T) * (y @ up.T)) @ down.T

    def rounded_expert(hp: Any, w: Any, b: str, e: int, y: np.ndarray) -> np.ndarray:
        names = (f"{b}ffn_{x}_exps.weight" for x in ("gate", "up", "down"))
        return gated(w, *(w[name][e] for name in names), y)

    def rounded_ffn(w: Any, b: str, end: str, y: np.ndarray) -> np.ndarray:
        return gated(w, *(w[f"{b}ffn_{x}{end}.weight"] for x in ("gate", "up", "down")), y)

    monkeypatch.setattr(reference, "rms", lambda *args: rounded(rms(*args)))
    monkeypatch.setattr(reference, "expert", rounded_expert)
    monkeypatch.setattr(reference, "ffn", rounded_ffn)
    for name, weight in model["weights"].items():
        if weight.ndim > 1 and "ffn_gate_inp" not in name:
            model["weights"][name] = rounded(weight)
    error = nmse(reference.forward(model, tokens), want)
    print(f"float64 with float16 inputs: {error:.1e}")
    assert ACTIVATIONS / 100 <= error <= ACTIVATIONS


@pytest.mark.parametrize("cache_type", ["f16", "bf16"])
def test_default_precision_agrees_with_numpy(cache_type: str) -> None:
    tokens, _ = golden("v3")
    runs = []
    for device in ("cpu", "cuda0"):
        with mlacli.load(FILES["v3"], device=device, cache_type_k=cache_type) as engine:
            runs.append(engine.logits(tokens))
    error = np.median(row_nmse(runs[1], runs[0]))
    print(f"{cache_type} cache: {error:.1e}")
    assert error <= ACTIVATIONS


@pytest.mark.parametrize("qtype", UNPACKED)
def test_every_weight_type(qtype: str, tmp_path: Path) -> None:
    toy = Toy(d=256, f=256, F=512, heads=8, r=256, q=256,
              qtypes={"": qtype, "attn_k_b": "Q8_0"})  # fmt: skip
    path = tamed(write_toy(tmp_path / "toy.gguf", toy))
    tokens = np.random.default_rng(0).integers(0, toy.vocab, 20).tolist()
    want = reference.forward(reference.load(path), tokens)
    of_numpy_backend, choices = of_cpu(path, tokens)
    assert nmse(of_numpy_backend, want) <= DECODE
    judge = Judge(choices)
    with mlacli.load(path, device="cuda0", **EXACT) as engine:
        with judge.imposing(engine):
            many = nmse(engine.logits(tokens), want)
        engine.rewind(0)
        few = nmse(np.stack([engine.decode(token) for token in tokens]), want)
    bar = DECODE if qtype == "F32" else ACTIVATIONS  # others' products take float16
    print(f"{qtype}: prefill {many:.1e}, decode {few:.1e}; {judge.check(bar)}")
    assert many <= bar
    assert few <= DECODE


def test_long_context_past_one_split() -> None:
    path = FILES["glm47flash"]
    tokens = np.random.default_rng(1).integers(0, 300, 700).tolist()
    want = reference.forward(reference.load(path), tokens)
    with mlacli.load(path, device="cuda0", **EXACT, ctx_size=1024) as engine:
        many = np.median(row_nmse(engine.logits(tokens), want))  # some tokens choose otherwise
        engine.rewind(0)
        for token in tokens[:-1]:
            engine.decode(token)
        few = nmse(engine.decode(tokens[-1]), want[-1])
    print(f"700 tokens: prefill {many:.1e}, decode {few:.1e}")
    assert many <= ACTIVATIONS
    assert few <= DECODE


def test_greedy_text_of_the_bundled_model_is_that_of_the_cpu() -> None:
    texts = []
    for device in ("cpu", "cuda0"):
        with mlacli.load(None, device=device, temp=0, **EXACT) as engine:
            texts.append("".join(engine.generate("Once upon a time", 60)))
    assert texts[0] == texts[1]


def test_memory_in_use_is_what_the_plan_says() -> None:
    with mlacli.load(None, device="cuda0") as engine:
        engine.prefill([1, 2, 3])
        used = engine.memory()["cuda0"]
        planned = engine.prepared.plan.ranks[0].total
    assert planned <= used <= planned + (512 << 20)


@pytest.mark.parametrize("ubatch", [16, 39])
def test_a_prompt_of_several_ubatches_ends_in_the_same_logits(ubatch: int) -> None:
    """Ubatches before the last ask for no logits at all; 39 leaves one token for the last."""
    tokens, want = golden("v3")
    with mlacli.load(FILES["v3"], device="cuda0", **EXACT, ubatch_size=ubatch) as engine:
        assert nmse(engine.prefill(tokens)[0], want[-1]) <= ACTIVATIONS
        engine.rewind(0)
        engine.prefill(tokens[:1])  # a one-token step first, so that its graph is there
        engine.rewind(0)
        assert nmse(engine.prefill(tokens)[0], want[-1]) <= ACTIVATIONS
