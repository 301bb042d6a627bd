"""All golden models against logits of transformers' own classes, on any number of ranks.

What is peculiar to glm-dsa and mistral4 is in their own files; the rest here is deepseek2's.

Weakest link: the golden files come from tests/golden/make_golden.py, whose exporter is ours; it is
held in place by tests/kit/reference.py, which reads the files on its own.
"""

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse, row_nmse, same_top1
from kit.golden_files import EXACT, FILES, SPLITS, golden, logits

import mlacli
from mlacli.backends.numpy_ops import NumpyOps
from mlacli.backends.numpy_weights import NumpyWeight
from mlacli.loading.weights import from_float32, to_float32
from mlacli.parallel.shards import Shard


def test_there_are_golden_models() -> None:
    assert {"v2lite", "v2", "v3", "v3_kv_b", "v3_folded", "glm47flash", "real_rows"} <= set(FILES)
    assert {"glm_dsa", "mistral4", "mistral4_rows"} <= set(FILES)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_transformers(name: str, split: str) -> None:
    tokens, want = golden(name)
    got = logits(FILES[name], tokens, **EXACT, **SPLITS[split])
    assert nmse(got, want) <= 1e-6
    assert same_top1(got, want)


@pytest.mark.parametrize("split", ["1 rank", "3 ranks", "2 stages"])
@pytest.mark.parametrize("name", FILES)
def test_default_precision_stays_close(name: str, split: str) -> None:
    # The median over rows: a flipped expert may spoil single rows in any low precision.
    tokens, want = golden(name)
    rows = row_nmse(logits(FILES[name], tokens, **SPLITS[split]), want)
    assert 1e-12 < np.median(rows) <= 1e-4


@pytest.mark.parametrize("ubatch", [1, 7, 16, 33])
@pytest.mark.parametrize("name", ["v2", "v3", "glm47flash", "glm_dsa", "mistral4"])
def test_any_ubatch_size_gives_the_same_logits(name: str, ubatch: int) -> None:
    tokens, want = golden(name)
    got = logits(FILES[name], tokens, **EXACT, ubatch_size=ubatch)
    assert nmse(got, want) <= 1e-6


@pytest.mark.parametrize("split", ["1 rank", "2 ranks", "2 stages"])
@pytest.mark.parametrize("name", ["v3", "glm_dsa", "mistral4"])
def test_token_by_token_is_one_prefill(name: str, split: str) -> None:
    tokens, want = golden(name)
    with mlacli.load(FILES[name], **EXACT, **SPLITS[split]) as engine:
        got = np.stack([engine.decode(token) for token in tokens])
    assert nmse(got, want) <= 1e-6


@pytest.mark.parametrize("split", ["1 rank", "3 ranks"])
@pytest.mark.parametrize("mla", [1, 2, 3])
def test_absorbed_and_expanded_prefill_agree(mla: int, split: str) -> None:
    # 127, 128 and 129 tokens stand on both sides of the switch; 300 rows take two cache blocks.
    path = FILES["glm47flash"]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 300, 300).tolist()
    want = reference.forward(reference.load(path), tokens)
    for n in (127, 128, 129, 300):
        got = logits(path, tokens[:n], **EXACT, **SPLITS[split], mla_use=mla)
        assert nmse(got, want[:n]) <= 1e-6


def test_a_second_prefill_goes_on_where_the_first_ended() -> None:
    tokens, want = golden("v2lite")
    with mlacli.load(FILES["v2lite"], **EXACT) as engine:
        engine.prefill(tokens[:10])
        engine.prefill([1, 2, 3])
        engine.rewind(10)
        got = engine.prefill(tokens[10:], all_rows=True)
    assert nmse(got, want[10:]) <= 1e-6


@pytest.mark.parametrize("name", ["v2lite", "v3"])
def test_one_percent_of_w_uk_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The comparison above must be able to fail: W_UK scaled by 1.01 breaks its bar.
    plain = NumpyOps.upload

    def scaled(self: NumpyOps, raw: np.ndarray, shard: Shard) -> NumpyWeight:
        if shard.tensor.endswith("attn_k_b.weight"):
            raw = from_float32(to_float32(raw, shard.qtype) * np.float32(1.01), shard.qtype)
        return plain(self, raw, shard)

    monkeypatch.setattr(NumpyOps, "upload", scaled)
    tokens, want = golden(name)
    assert nmse(logits(FILES[name], tokens, **EXACT), want) > 1e-6


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "q8_0"])
def test_cache_types_differ_and_stay_close(cache_type: str) -> None:
    tokens, want = golden("v3")
    got = logits(FILES["v3"], tokens, cache_type_k=cache_type, graph_attn_precision="f32")
    bar = {"f16": 1e-6, "bf16": 1e-3, "q8_0": 1e-2}[cache_type]
    assert 1e-10 < np.median(row_nmse(got, want)) <= bar


def test_merged_gate_and_up_give_the_same_logits() -> None:
    tokens, want = golden("v3")
    with mlacli.load(FILES["v3"], **EXACT, merge_up_gate_experts=True) as engine:
        shards = {shard.tensor for shard in engine.prepared.plan.shards}
        got = engine.logits(tokens)
    assert "blk.1.ffn_gate_up_exps.weight" in shards
    assert "blk.1.ffn_gate_exps.weight" not in shards
    assert nmse(got, want) <= 1e-6


@pytest.mark.parametrize("reduce_type", ["f16", "bf16", "q8_0"])
def test_reduce_type_rounds_long_ubatches_only(reduce_type: str) -> None:
    tokens, _ = golden("v3")
    two = SPLITS["2 ranks"]
    for n, differs in ((32, False), (33, True)):
        plain = logits(FILES["v3"], tokens[:n], **EXACT, **two)
        typed = logits(FILES["v3"], tokens[:n], **EXACT, **two, graph_reduce_type=reduce_type)
        assert np.array_equal(plain, typed) is not differs
