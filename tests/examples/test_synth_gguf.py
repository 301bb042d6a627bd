"""The synthetic model writer at toy scale: it runs, values are spread as said, memory stays small.

That a preset has its model's shapes is held to the files' published sizes; that mlacli accepts all
tensors of a preset, to the plan.
"""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from kit.example_scripts import example
from kit.toy_gguf import Toy, write_toy

import mlacli
from mlacli.loading.presets import PRESETS, value_spread
from mlacli.loading.synthetic import tensor_infos
from mlacli.models import ARCHS


@pytest.fixture(scope="module")
def synth():
    return example("synth_gguf")


@pytest.mark.parametrize("quant", ["q4_k_m", "q4_0", "q8_0", "f16"])
def test_a_tiny_file_runs_and_its_values_are_spread_as_said(synth, tmp_path: Path, quant) -> None:
    path = synth.write_synth(tmp_path / "tiny.gguf", PRESETS["tiny"], quant)
    for tensor in gguf.GGUFReader(str(path)).tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        if len(shape) > 1:
            spread = float(np.std(dequantize(tensor.data, tensor.tensor_type)))
            assert spread == pytest.approx(value_spread(tensor.name, shape), rel=0.1)
    with mlacli.load(path, ctx_size=256) as engine:
        logits = engine.logits([1, 2, 3])
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10


@pytest.mark.parametrize("name", ["v2lite", "glm47flash", "v3", "kimi_k2", "mistral4", "glm5"])
def test_every_preset_in_small(synth, tmp_path: Path, name: str) -> None:
    small = {"layers": 2, "dense": 1, "d": 256, "heads": 2, "F": 256, "f": 256, "vocab": 64}
    small |= {"experts": 16, "q": PRESETS[name].q and 256}
    model = replace(PRESETS[name], **small)
    path = synth.write_synth(tmp_path / f"{name}.gguf", model)
    if model.arch not in ARCHS:
        pytest.skip(f"no {model.arch} yet")
    with mlacli.load(path, ctx_size=256) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()


# GB of published Q4_K_M files; ours store k_b and v_b apart, and deal Q6_K out less finely.
@pytest.mark.parametrize("name, gigabytes", [("v2lite", 10.4), ("v3", 404.5)])
def test_sizes_are_near_the_published_ones(name: str, gigabytes: float) -> None:
    total = sum(info.nbytes for info in tensor_infos(PRESETS[name]).values())
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_a_seed_gives_the_same_file(synth, tmp_path: Path) -> None:
    paths = [tmp_path / str(i) / "x.gguf" for i in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        path.parent.mkdir()
        synth.write_synth(path, PRESETS["tiny"], seed=seed)
    first, same, other = (path.read_bytes() for path in paths)
    assert first == same != other


def test_a_tokenizer_is_copied_and_filled_up(synth, tmp_path: Path) -> None:
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
    }
    donor = write_toy(tmp_path / "donor.gguf", Toy(metadata=keys))
    path = synth.write_synth(tmp_path / "text.gguf", PRESETS["tiny"], vocab_from=donor)
    with mlacli.load(path, ctx_size=256) as engine:
        assert engine.tokenizer.encode("aabb") == [3, 0, 2, 1]
        assert engine.tokenizer.n_vocab == engine.prepared.hparams.n_vocab == 1024
        assert len(list(engine.generate_ids([3, 0], 2))) == 2


def test_memory_does_not_grow_with_the_file(synth, tmp_path: Path) -> None:
    model = replace(PRESETS["tiny"], d=1024, f=1024, experts=32)
    tracemalloc.start()
    path = synth.write_synth(tmp_path / "x.gguf", model, "f16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 400e6  # several times the pools
    assert peak < 120e6
