"""Whole models on one GPU against transformers' logits and against the NumPy ranks."""

from pathlib import Path

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse, row_nmse, same_top1
from kit.toy_gguf import QTYPES, Toy, write_toy

import mlacli

MODELS = Path(__file__).parents[1] / "golden" / "models"
FILES = {path.stem: path for path in sorted(MODELS.glob("*.gguf"))}
EXACT = {"cache_type_k": "f32", "graph_attn_precision": "f32"}
UNPACKED = [t for t in QTYPES if t not in ("TQ1_0", "TQ2_0", "NVFP4")]


def golden(name: str) -> tuple[list[int], np.ndarray]:
    data = np.load(MODELS / f"{'v3' if name in ('v3_kv_b', 'v3_folded') else name}.npz")
    return data["tokens"].tolist(), data["logits"]


@pytest.mark.parametrize(
    "name", [n for n in FILES if (MODELS / f"{n}.npz").exists() and n != "glm_dsa"]
)
def test_logits_are_those_of_transformers(name: str) -> None:
    tokens, want = golden(name)
    with mlacli.load(FILES[name], device="cuda0", **EXACT) as engine:
        got = engine.logits(tokens)
    assert nmse(got, want) <= 1e-6
    assert same_top1(got, want)


def test_glm_dsa_runs_dense() -> None:
    data = np.load(MODELS / "glm_dsa.npz")
    with mlacli.load(FILES["glm_dsa"], device="cuda0", **EXACT, no_dsa=True) as engine:
        got = engine.logits(data["tokens"].tolist())
    assert nmse(got, data["dense"]) <= 1e-6


@pytest.mark.parametrize("name", ["v2lite", "v3", "glm47flash", "real_rows"])
def test_captured_decode_is_one_prefill(name: str) -> None:
    tokens, want = golden(name)
    with mlacli.load(FILES[name], device="cuda0", **EXACT) as engine:
        got = np.stack([engine.decode(token) for token in tokens])
        engine.rewind(0)
        again = np.stack([engine.decode(token) for token in tokens])
    assert nmse(got, want) <= 1e-6
    assert np.array_equal(got, again)


@pytest.mark.parametrize("cache_type", ["f16", "bf16"])
def test_default_precision_agrees_with_numpy(cache_type: str) -> None:
    tokens, _ = golden("v3")
    runs = []
    for device in ("cpu", "cuda0"):
        with mlacli.load(FILES["v3"], device=device, cache_type_k=cache_type) as engine:
            runs.append(engine.logits(tokens))
    assert np.median(row_nmse(runs[1], runs[0])) < 1e-7


@pytest.mark.parametrize("qtype", UNPACKED)
def test_every_weight_type(qtype: str, tmp_path: Path) -> None:
    toy = Toy(d=256, f=256, F=512, heads=8, r=256, q=256,
              qtypes={"": qtype, "attn_k_b": "Q8_0"})  # fmt: skip
    path = write_toy(tmp_path / "toy.gguf", toy)
    tokens = np.random.default_rng(0).integers(0, toy.vocab, 20).tolist()
    want = reference.forward(reference.load(path), tokens)
    with mlacli.load(path, device="cuda0", **EXACT) as engine:
        assert nmse(engine.logits(tokens), want) < 1e-8


def test_long_context_past_one_split() -> None:
    path = FILES["glm47flash"]
    tokens = np.random.default_rng(1).integers(0, 300, 700).tolist()
    want = reference.forward(reference.load(path), tokens)
    with mlacli.load(path, device="cuda0", **EXACT, ctx_size=1024) as engine:
        assert nmse(engine.logits(tokens), want) <= 1e-6
        engine.rewind(699)
        assert nmse(engine.decode(tokens[-1]), want[-1]) <= 1e-6


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
        assert nmse(engine.prefill(tokens)[0], want[-1]) <= 1e-6
        engine.rewind(0)
        engine.prefill(tokens[:1])  # a one-token step first, so that its graph is there
        engine.rewind(0)
        assert nmse(engine.prefill(tokens)[0], want[-1]) <= 1e-6
