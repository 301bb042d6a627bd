"""Large activations, and a text's perplexity: what rounding to float16 must not spoil."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from kit import reference
from kit.compare import nmse
from kit.golden_files import EXACT
from kit.toy_gguf import Toy, write_toy

import mlacli
from mlacli.backends.numpy_ops import NumpyOps
from mlacli.perplexity import cut, perplexity

ROOT = Path(__file__).parents[2]
N = 20


def scaled(path: Path, word: str, factor: float) -> Path:
    """The file with one kind of norm weights, float32, times `factor`."""
    reader = gguf.GGUFReader(path, "r+")
    found = [t for t in reader.tensors if t.name.endswith(f".{word}.weight")]
    assert found
    for tensor in found:
        tensor.data[:] *= np.float32(factor)
    reader.data.flush()
    return path


def largest_gated(path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest input of a down product."""
    largest = [0.0]
    plain = NumpyOps.silu_mul

    def noted(self: Any, gate: Any, up: Any) -> Any:
        y = plain(self, gate, up)
        largest[0] = max(largest[0], float(np.abs(y).max()))
        return y

    with monkeypatch.context() as patch:
        patch.setattr(NumpyOps, "silu_mul", noted)
        with mlacli.load(path, device="cpu", **EXACT) as engine:
            engine.logits(tokens)
    return largest[0]


@pytest.mark.parametrize("qtype", ["F16", "Q8_0", "Q4_K"])
def test_activations_of_1e5_do_not_overflow(
    qtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 ends at 65504; a sixteenth of a value, as prefill holds it, at 1.05e6."""
    toy = Toy(d=256, f=256, F=512, heads=8, q=256, r=256, qtypes={"": qtype, "attn_k_b": "Q8_0"})
    factor = 5.0 if qtype == "Q4_K" else 150.0  # random Q4_K blocks have larger values
    path = scaled(write_toy(tmp_path / "toy.gguf", toy), "ffn_norm", factor)
    tokens = np.random.default_rng(0).integers(0, toy.vocab, N).tolist()
    largest = largest_gated(path, tokens, monkeypatch)
    assert 1e5 <= largest <= 9e5, "the case is as large as it says"
    want = reference.forward(reference.load(path), tokens)
    with mlacli.load(path, device="cuda0", **EXACT) as engine:
        many = nmse(engine.logits(tokens), want)
        engine.rewind(0)
        few = nmse(np.stack([engine.decode(token) for token in tokens]), want)
    print(f"{qtype}: up to {largest:.1e}, prefill {many:.1e}, decode {few:.1e}")
    assert many <= 2e-5
    assert few <= 1e-8


def test_beyond_that_prefill_saturates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(d=256, f=256, F=512, heads=8, q=256, r=256, qtypes={"": "Q8_0"})
    path = scaled(write_toy(tmp_path / "toy.gguf", toy), "ffn_norm", 5e3)
    tokens = np.random.default_rng(0).integers(0, toy.vocab, N).tolist()
    assert largest_gated(path, tokens, monkeypatch) > 1e7
    want = reference.forward(reference.load(path), tokens)
    with mlacli.load(path, device="cuda0", **EXACT) as engine:
        assert np.isfinite(engine.logits(tokens)).all()
        engine.rewind(0)
        singly = np.stack([engine.decode(token) for token in tokens])
    assert nmse(singly, want) <= 1e-8  # decode holds float32


def test_perplexity_of_the_bundled_model_is_the_cpus() -> None:
    text = (ROOT / "examples" / "tiny_model" / "heldout.txt").read_text()
    values, n_tokens = [], 0
    for device in ("cpu", "cuda0"):
        with mlacli.load(None, device=device, ctx_size=512) as engine:
            assert engine.tokenizer is not None
            ids = engine.tokenizer.encode(text)[:6144]
            n_tokens = len(ids)
            values.append(list(perplexity(engine, cut(ids, 512, bos=None)))[-1].value)
    print(f"{n_tokens} tokens: {values[0]:.4f} on the CPU, {values[1]:.4f} on the GPU")
    assert n_tokens > 3000
    assert abs(values[1] / values[0] - 1) <= 0.002
