"""Weights in host memory on a GPU: the same results as with all of them on the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.golden_files import EXACT, FILES, golden
from kit.toy_gguf import Toy, write_toy
from kit.toy_scales import tamed

import mlacli
from mlacli.loading.presets import preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.parallel import host_stream

DECODE = 1e-8  # as test_cuda_models.py: another order of float32 sums stays far below
ACTIVATIONS = 2e-5  # as there: float16 inputs
NAMES = [n for n in ("v2lite", "v3", "glm_dsa", "mistral4", "glm47flash", "real_rows")
         if n in FILES]  # fmt: skip
CMOE: dict[str, Any] = {"cpu_moe": True}
Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def runs(file: Any, tokens: list[int], **flags: Any) -> Runs:
    """Decode, prefill, and decode after it: the ring is filled twice, graphs run in between."""
    with mlacli.load(file, **EXACT, **{"device": "cuda0"} | flags) as engine:
        first = np.stack([engine.decode(token) for token in tokens[:9]])
        many = engine.logits(tokens)
        again = engine.logits(tokens)
        assert np.array_equal(many, again)
        engine.rewind(9)
        after = np.stack([engine.decode(token) for token in tokens[9:12]])
    return first, many, after


def same(got: Runs, want: Runs) -> None:
    for one, other in zip(got, want, strict=True):
        assert np.isfinite(one).all()
        assert np.array_equal(one, other), nmse(one, other)


@pytest.mark.parametrize("slot", [host_stream.SLOT_BYTES, 20 << 10])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_experts_on_the_device(
    name: str, slot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with a layer's experts as one chunk and as several."""
    tokens, _ = golden(name)
    want = runs(FILES[name], tokens)
    monkeypatch.setattr(host_stream, "SLOT_BYTES", slot)
    same(runs(FILES[name], tokens, **CMOE), want)


def test_few_tokens_read_where_the_experts_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of many tokens over the link, without copies."""
    tokens, _ = golden("v3")
    want = runs(FILES["v3"], tokens)
    monkeypatch.setattr(host_stream, "_SHARE", 2.0)
    same(runs(FILES["v3"], tokens, **CMOE), want)


@pytest.mark.parametrize(
    "flags",
    [{"override_tensor": ("ffn_up_exps=CPU",)},
     {"override_tensor": (r"blk\.2\.=CUDA0,exps=CPU,attn_output|token_embd|output=CPU",)},
     {"n_cpu_moe": 2}, {"gpu_layers": 1}, {"gpu_layers": 0}],
    ids=str,
)  # fmt: skip
def test_other_placements(flags: dict[str, Any]) -> None:
    tokens, _ = golden("v3")
    same(runs(FILES["v3"], tokens, **flags), runs(FILES["v3"], tokens))


@pytest.mark.parametrize("name", ["v3", "mistral4"])
def test_gate_and_up_as_one_weight(name: str) -> None:
    tokens, _ = golden(name)
    want = runs(FILES[name], tokens)
    merged = runs(FILES[name], tokens, merge_up_gate_experts=True)
    for got, other in zip(merged, want, strict=True):
        assert nmse(got, other) <= DECODE
    same(
        runs(FILES[name], tokens, merge_up_gate_experts=True, run_time_repack=True, **CMOE), merged
    )


@pytest.mark.parametrize("devices", ["cuda0,cuda0", "cuda0,cuda1"])
def test_pipeline_stages(devices: str) -> None:
    """-sm graph becomes layer; each GPU reads its own layers' experts."""
    from cupy.cuda import runtime

    if runtime.getDeviceCount() < len(set(devices.split(","))):
        pytest.skip("needs two GPUs")
    tokens, _ = golden("v3")
    want = runs(FILES["v3"], tokens)
    for mode in ("layer", "graph"):
        same(runs(FILES["v3"], tokens, device=devices, split_mode=mode, **CMOE), want)


@pytest.mark.parametrize(
    "qtype", ["Q4_K", "Q6_K", "Q5_0", "Q8_0", "MXFP4", "IQ4_XS", "Q2_K", "IQ2_XXS"]
)
def test_weight_types(qtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles and, last, as GGUF stores them, of which many tokens round each value."""
    toy = Toy(d=256, f=256, F=512, heads=8, r=256, q=256,
              qtypes={"": qtype, "attn_k_b": "Q8_0"})  # fmt: skip
    path = tamed(write_toy(tmp_path / "toy.gguf", toy))
    tokens = np.random.default_rng(0).integers(0, toy.vocab, 20).tolist()
    want = runs(path, tokens)
    monkeypatch.setattr(host_stream, "SLOT_BYTES", 500 << 10)
    got = runs(path, tokens, check_tensors=True, **CMOE)
    if qtype != "IQ2_XXS":
        same(got, want)
    assert nmse(got[0], want[0]) <= DECODE
    for one, other in zip(got[1:], want[1:], strict=True):
        assert nmse(one, other) <= ACTIVATIONS


@pytest.mark.parametrize("name", ["v2lite", "glm_dsa"])
def test_memory_that_can_not_be_locked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda.runtime import CUDARuntimeError

    from mlacli.backends import cuda_host

    def refused(ptr: int, nbytes: int) -> None:
        raise CUDARuntimeError(2)

    tokens, _ = golden(name)
    want = runs(FILES[name], tokens)
    monkeypatch.setattr(cuda_host, "_register", refused)
    got = runs(FILES[name], tokens, **CMOE)
    assert np.array_equal(got[1], want[1])
    assert nmse(got[0], want[0]) <= DECODE and nmse(got[2], want[2]) <= DECODE


def test_a_wide_model() -> None:
    """V2-Lite's shapes, several chunks a layer; with -ngl all of its weights come over the link."""
    tokens = np.random.default_rng(1).integers(0, 1000, 300).tolist()
    flags: dict[str, Any] = {"ctx_size": 512, "ubatch_size": 256}
    found = []
    for more in ({}, CMOE, {"gpu_layers": 0}):
        with mlacli.load(SyntheticFile(preset("v2lite:3")), device="cuda0", **flags, **more) as e:
            found.append((e.prefill(tokens), np.stack([e.decode(t) for t in tokens[:4]])))
    for got in found[1:]:
        assert np.array_equal(found[0][0], got[0]) and np.array_equal(found[0][1], got[1])
