"""mistral4's position-dependent queries, with and without the metadata that asks for them."""

from pathlib import Path

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse
from kit.golden_files import EXACT, FILES, SPLITS, golden, logits
from kit.toy_gguf import Toy, write_toy

import mlacli

PATH = FILES["mistral4"]  # original context 8, so 40 tokens reach the fifth stretch
TOKENS, WANT = golden("mistral4")
PLAIN = {"override_kv": ["mistral4.attention.temperature_scale=float:0"]}
YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "attention.temperature_scale": 0.5,
    "rope.scaling.original_context_length": 7, "rope.scaling.yarn_log_multiplier": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("split", ["1 rank", "5 ranks", "2 stages"])
def test_without_the_key_queries_keep_their_size(split: str) -> None:
    model = reference.load(PATH)
    model["hparams"]["temp_scale"] = 0.0
    got = logits(PATH, TOKENS, **EXACT, **SPLITS[split], **PLAIN)
    assert nmse(got, reference.forward(model, TOKENS)) <= 1e-6
    assert nmse(got, WANT) > 1e-3


def test_within_the_original_context_nothing_changes() -> None:
    assert np.array_equal(logits(PATH, TOKENS[:8]), logits(PATH, TOKENS[:8], **PLAIN))
    nine, plain = logits(PATH, TOKENS[:9]), logits(PATH, TOKENS[:9], **PLAIN)
    assert np.array_equal(nine[:8], plain[:8]) and not np.array_equal(nine[8], plain[8])


@pytest.mark.parametrize("mla", [1, 3])
def test_absorbed_and_expanded_prefill_agree(mla: int) -> None:
    tokens = np.random.default_rng(2).integers(0, 300, 150).tolist()
    want = reference.forward(reference.load(PATH), tokens)
    assert nmse(logits(PATH, tokens, **EXACT, mla_use=mla, ctx_size=256), want) <= 1e-6


@pytest.mark.parametrize("arch", ["mistral4", "deepseek2"])
@pytest.mark.parametrize("length", [None, 0, 5])
@pytest.mark.parametrize("q", [48, 0])
def test_length_falls_back_to_the_original_context(
    arch: str, length: int | None, q: int, tmp_path: Path
) -> None:
    # deepseek2 too: Mistral-Large-3 files are of that name.
    keys = YARN | {"attention.temperature_length": length}
    path = write_toy(tmp_path / "a.gguf", Toy(arch=arch, q=q, sigmoid=False, metadata=keys))
    tokens = np.random.default_rng(3).integers(0, 80, 24).tolist()
    model = reference.load(path)
    model["hparams"]["temp_length"] = length or 7
    got = logits(path, tokens, **EXACT)
    assert nmse(got, reference.forward(model, tokens)) < 1e-9
    model["hparams"]["temp_length"] = 6
    assert nmse(got, reference.forward(model, tokens)) > 1e-6


def test_experts_stay_merged_and_rows_are_320_wide() -> None:
    with mlacli.load(PATH) as engine:
        names = {shard.tensor for shard in engine.prepared.plan.shards}
        assert not engine.prepared.hparams.routing.sigmoid
    assert "blk.1.ffn_gate_up_exps.weight" in names
    assert not any("ffn_gate_exps" in name or "ffn_up_exps" in name for name in names)
    with mlacli.load(FILES["mistral4_rows"]) as engine:
        assert engine.prepared.hparams.cache_width == 320
        assert engine._caches[0].nbytes == 256 * 320 * 2
