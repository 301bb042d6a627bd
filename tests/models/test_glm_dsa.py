"""glm-dsa's sparse attention: against transformers, the float64 reference, and itself when dense.

The golden model keeps 12 of up to 40 rows; layers 0 and 3 choose, 1 and 2 reuse layer 0's choice.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse, row_nmse, same_top1
from kit.golden_files import EXACT, FILES, SPLITS, golden, logits
from kit.residuals import watch
from kit.toy_gguf import Toy, write_toy

import mlacli
from mlacli.backends.numpy_ops import NumpyOps
from mlacli.backends.numpy_weights import NumpyWeight
from mlacli.parallel.shards import Shard

GLM = FILES["glm_dsa"]
TOP_K, N = 12, 40
TOKENS, WANT = golden("glm_dsa")
SEVEN = {"device": ",".join(["cpu"] * 7), "split_mode": "graph"}


def of_reference(path: Path, tokens: list[int], **dsa: object) -> np.ndarray:
    """Logits with the indexer as the file has it, but for `dsa`."""
    model = reference.load(path)
    model["hparams"]["dsa"] |= dsa
    return reference.forward(model, tokens)


@pytest.fixture
def selections(monkeypatch):
    """Rank -> what its dsa_select returned, call by call."""
    seen: dict[int, list[np.ndarray]] = {}
    plain = NumpyOps.dsa_select

    def watched(self: NumpyOps, *args: object, **more: object) -> np.ndarray:
        chosen = plain(self, *args, **more)
        seen.setdefault(self.comm.rank, []).append(chosen)
        return chosen

    monkeypatch.setattr(NumpyOps, "dsa_select", watched)
    return seen


# --- dense and sparse ------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_without_dsa_the_logits_are_the_dense_models(split: str) -> None:
    tokens, want = golden("glm_dsa", "dense")
    got = logits(GLM, tokens, **EXACT, **SPLITS[split], no_dsa=True)
    assert nmse(got, want) <= 1e-6
    assert same_top1(got, want)
    assert nmse(WANT, want) > 1e-2, "sparse and dense must be told apart"


@pytest.mark.parametrize("split", ["1 rank", "3 ranks", "2 stages"])
def test_up_to_top_k_rows_sparse_is_dense_bit_for_bit(split: str, selections) -> None:
    def both(n: int) -> tuple[np.ndarray, np.ndarray]:
        flags = SPLITS[split]
        return logits(GLM, TOKENS[:n], **flags), logits(GLM, TOKENS[:n], **flags, no_dsa=True)

    sparse, dense = both(TOP_K)
    assert np.array_equal(sparse, dense)
    assert not selections, "nothing is chosen while every row is kept"
    sparse, dense = both(TOP_K + 1)
    assert not np.array_equal(sparse, dense)


def test_keys_stored_while_dense_serve_once_it_is_sparse() -> None:
    with mlacli.load(GLM, **EXACT) as engine:
        engine.prefill(TOKENS[:TOP_K])
        got = engine.prefill(TOKENS[TOP_K:], all_rows=True)
    assert nmse(got, WANT[TOP_K:]) <= 1e-6


@pytest.mark.parametrize("split", ["1 rank", "5 ranks", "2 stages"])
@pytest.mark.parametrize("top_k", [1, 5, 20, 39])
def test_top_k_of_the_flag_counts(top_k: int, split: str) -> None:
    got = logits(GLM, TOKENS, **EXACT, **SPLITS[split], dsa_top_k=top_k)
    assert nmse(got, of_reference(GLM, TOKENS, top_k=top_k)) <= 1e-6


def test_a_top_k_of_the_length_is_dense_bit_for_bit() -> None:
    assert np.array_equal(logits(GLM, TOKENS, dsa_top_k=N), logits(GLM, TOKENS, no_dsa=True))


def test_dsa_may_be_asked_for_by_name() -> None:
    assert np.array_equal(logits(GLM, TOKENS, dsa=True), logits(GLM, TOKENS))


@pytest.mark.parametrize("mla", [1, 3])
def test_long_prefill_across_both_block_sizes(mla: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 300, 300).tolist()
    got = logits(GLM, tokens, **EXACT, mla_use=mla, ubatch_size=140)
    assert nmse(got, of_reference(GLM, tokens)) <= 1e-6


# --- ranks -----------------------------------------------------------------------------------


def test_all_ranks_choose_the_same_rows_and_keep_one_residual(selections, monkeypatch) -> None:
    residuals = watch(monkeypatch)
    with mlacli.load(GLM, **SPLITS["3 ranks"]) as engine:
        engine.prefill(TOKENS)
        engine.decode(5)
        reductions = [ops.comm.n_reductions for ops in engine._ranks.ops]
    assert reductions == [2 * 4 * 2] * 3
    assert residuals[0] == residuals[1] == residuals[2]
    assert [len(calls) for calls in selections.values()] == [2 * 2] * 3  # two layers, two steps
    for other in (1, 2):
        assert all(map(np.array_equal, selections[0], selections[other]))


def test_ranks_without_heads_take_part(selections) -> None:
    # 7 ranks share 5 heads: two choose nothing and attend to nothing.
    with mlacli.load(GLM, **EXACT, **SEVEN) as engine:
        got = engine.logits(TOKENS)
        held = [len(cache.index_rows) for cache in engine._caches]
    assert sorted(held) == [0, 0, 2, 2, 2, 2, 2]
    assert nmse(got, WANT) <= 1e-6
    assert len(selections) == 5


@pytest.mark.parametrize("shares", ["1,3", "3,1", "1,1,1,1"])
def test_a_choice_travels_to_the_next_stage(shares: str) -> None:
    # Stages begin at layers that share: 1 and 2, and with four stages at every layer.
    devices = ",".join(["cpu"] * len(shares.split(",")))
    flags = {"device": devices, "split_mode": "layer", "tensor_split": shares}
    with mlacli.load(GLM, **EXACT, **flags) as engine:
        whole = engine.logits(TOKENS)
        engine.rewind(0)
        singly = np.stack([engine.decode(token) for token in TOKENS])
    assert nmse(whole, WANT) <= 1e-6
    assert nmse(singly, WANT) <= 1e-6


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_type", ["f16", "bf16", "q8_0"])
def test_key_types_differ_and_stay_close(cache_type: str) -> None:
    # Rounded keys may choose other rows near the limit, so the median over rows is judged.
    exact = logits(GLM, TOKENS, **EXACT)
    got = logits(GLM, TOKENS, **{**EXACT, "indexer_cache_type_k": cache_type})
    with mlacli.load(GLM, indexer_cache_type_k=cache_type) as engine:
        rows = engine._caches[0].index_rows
        assert {r.nbytes for r in rows.values()} == {512 * (68 if cache_type == "q8_0" else 128)}
    assert np.median(row_nmse(got, exact)) <= 1e-3
    if cache_type == "q8_0":
        assert not np.array_equal(got, exact)


def test_an_imposed_choice_is_taken(monkeypatch) -> None:
    # The hook for low-precision runs: keys of q8_0 alone choose otherwise, the reference's rows
    # imposed they can't.
    choices: list = []
    want = reference.forward(reference.load(GLM), TOKENS, choices=choices)
    rows = [np.stack([np.argsort(~seen[t], kind="stable")[:TOP_K] for t in range(N)])
            for seen, _ in choices]  # fmt: skip
    rough = {**EXACT, "indexer_cache_type_k": "q8_0"}
    alone = nmse(logits(GLM, TOKENS, **rough), want)
    plain, calls = NumpyOps.dsa_select, iter(rows)
    monkeypatch.setattr(
        NumpyOps, "dsa_select", lambda *args: plain(*args, imposed=next(calls)[:, ::-1])
    )
    assert nmse(logits(GLM, TOKENS, **rough), want) <= 1e-6 < alone


@pytest.mark.parametrize("word", ["attn_q_b", "attn_k", "proj", "k_norm.bias"])
def test_a_wrong_indexer_is_noticed(word: str, monkeypatch) -> None:
    # The comparisons above must be able to fail: each tensor of the indexer zeroed, or reversed.
    plain = NumpyOps.upload

    def bent(self: NumpyOps, raw: np.ndarray, shard: Shard) -> NumpyWeight:
        if f"indexer.{word}" in shard.tensor:
            raw = np.zeros_like(raw) if "bias" in word else np.ascontiguousarray(raw[::-1])
        return plain(self, raw, shard)

    monkeypatch.setattr(NumpyOps, "upload", bent)
    assert nmse(logits(GLM, TOKENS, **EXACT), WANT) > 1e-3


# --- other makes, against the reference ------------------------------------------------------

# eps differs from the LayerNorm's, 24 key values hold 16 rotated ones, layer 2 has no tensors.
TOY = Toy(
    arch="glm-dsa", layers=4, heads=5, q=64, f=160, F=224, groups=2, groups_used=1,
    indexed=(0, 1, 3), metadata={"attention.layer_norm_rms_epsilon": 1e-3},
)  # fmt: skip
TOYS = {
    "absent on one layer": TOY,
    "types beside tensors": replace(
        TOY, metadata={"attention.indexer.types": [True, False, True, True]}
    ),
    "Q8_0": replace(TOY, qtypes={"": "Q8_0"}, index_width=32),
    "kv_b, merged, MTP": replace(TOY, layout="kv_b", style="ik", merged=True, mtp=1),
    "context of GLM-5.2": replace(TOY, n_ctx=1 << 20, indexed=(0, 1, 2, 3)),
    "no key for the gate": replace(TOY, metadata={"expert_gating_func": None}),
}
TOY_SPLITS = {
    "1": {},
    "3,2,1": {"device": "cpu,cpu,cpu", "split_mode": "graph", "tensor_split": "3,2,1"},
    "stages": {"device": "cpu,cpu", "split_mode": "layer"},
}


@pytest.mark.parametrize("name", TOYS)
def test_toys_give_the_references_logits(name: str, tmp_path: Path) -> None:
    path = write_toy(tmp_path / "a.gguf", TOYS[name])
    tokens = np.random.default_rng(3).integers(0, 80, 24).tolist()
    choices: list = []
    want = reference.forward(reference.load(path), tokens, choices=choices)
    distances = np.concatenate([distance for _, distance in choices])
    # Scores of exactly 0 (no head sees anything) tie often, and then the lower row wins.
    assert (distances == 0).any() and not ((distances > 0) & (distances < 1e-5)).any()
    for split, flags in TOY_SPLITS.items():
        got = logits(path, tokens, **EXACT, **flags, ctx_size=256)
        assert nmse(got, want) < (2e-4 if "kv_b" in name else 1e-9), split
