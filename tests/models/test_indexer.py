"""What a glm-dsa file and the flags make of the indexer, before any weight is read."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit.toy_gguf import Toy, header_only, write_toy

import mlacli
from mlacli.backends.numpy_dsa import select
from mlacli.backends.numpy_ops import LatentRows, NumpyOps
from mlacli.compat import check
from mlacli.errors import (
    BadTensorShape,
    GgufError,
    MissingTensor,
    PlanError,
    UsageError,
)
from mlacli.flag_values import rows_kept
from mlacli.flags import to_params
from mlacli.loading.gguf_file import GgufFile
from mlacli.models import glm_dsa
from mlacli.parallel.comm import SoloComm
from mlacli.parallel.memory import scratch_bytes
from mlacli.params import ContextParams
from mlacli.prepare import prepare, settle_indexer

ALL = (0, 1, 2, 3)
TOY = Toy(arch="glm-dsa", layers=4, indexed=ALL)
GLM5 = {
    "arch": "glm-dsa", "layers": 78, "dense": 3, "d": 6144, "heads": 64, "q": 2048, "k": 192,
    "v": 256, "F": 12288, "f": 2048, "groups": 1, "groups_used": 1, "vocab": 154880, "mtp": 1,
    "n_ctx": 202752, "indexed": tuple(range(79)), "index_heads": 32, "index_width": 128,
    "top_k": 2048, "metadata": {},
}  # fmt: skip
TYPES = "attention.indexer.types"


def ask(path: Path, **values: object):
    """prepare() with `values` as given flags, spelled by their long names."""
    typed = {key: "--" + key.replace("_", "-") for key in values}
    return prepare(path, to_params(values, typed))


def toy(path: Path, **changes: object) -> Path:
    """A file of TOY with `changes`; metadata keys are laid over its own."""
    return write_toy(path / "a.gguf", replace(TOY, **changes))


def full(path: Path) -> tuple[bool, ...]:
    return ask(path).hparams.sparse.full


def without(path: Path, *ends: str, **changes: object) -> Path:
    """A file of TOY that lacks every tensor with one of these endings."""

    class Bent(Toy):
        def shapes(self):
            return {n: s for n, s in super().shapes().items() if not n.endswith(ends)}

    fields = {name: getattr(TOY, name) for name in Toy.__dataclass_fields__}
    return write_toy(path / "a.gguf", Bent(**(fields | changes)))


# --- which layers choose ---------------------------------------------------------------------


def test_every_layer_chooses_below_glm_52s_context(tmp_path: Path) -> None:
    assert full(toy(tmp_path)) == (True,) * 4


def test_glm_52s_pattern_at_its_context(tmp_path: Path) -> None:
    path = header_only(tmp_path / "a.gguf", "v3", **GLM5 | {"n_ctx": 1 << 20})
    chooses = [il for il, one in enumerate(full(path)) if one]
    assert chooses == [0, 1, *range(2, 78, 4)]
    assert len(chooses) == 21


@pytest.mark.parametrize("n_ctx", [512, 1 << 20])
@pytest.mark.parametrize("extra", [0, 1])
def test_metadata_wins_over_the_rule(tmp_path: Path, n_ctx: int, extra: int) -> None:
    # The list may count the MTP block too.
    types = [True, False, False, True, True][: 4 + extra]
    path = toy(tmp_path, n_ctx=n_ctx, metadata={TYPES: types}, mtp=extra)
    assert full(path) == (True, False, False, True)


def test_layers_without_tensors_share(tmp_path: Path) -> None:
    path = toy(tmp_path, indexed=(0, 3), metadata={TYPES: [1, 1, 0, 1]})
    assert full(path) == (True, False, False, True)


def test_tensors_of_layers_that_share_are_not_read(tmp_path: Path) -> None:
    plan = ask(toy(tmp_path, metadata={TYPES: [1, 0, 1, 0]})).plan
    assert {s.layer for s in plan.shards if ".indexer." in s.tensor} == {0, 2}


@pytest.mark.parametrize("why", [{"indexed": (1, 2, 3)}, {"metadata": {TYPES: [0, 1, 1, 1]}}])
def test_sharing_needs_a_layer_before(tmp_path: Path, why: dict) -> None:
    path = toy(tmp_path, **why)
    with pytest.raises(GgufError, match="layer 0 has no sparse indexer of its own") as caught:
        ask(path)
    assert "--no-dsa" in caught.value.hint
    assert ask(path, no_dsa=True).hparams.sparse is None


@pytest.mark.parametrize("types", [[1, 0, 1], [1, 2, 0, 1], ["full", "full", "full", "full"]])
def test_broken_types_are_named(tmp_path: Path, types: list) -> None:
    with pytest.raises(GgufError, match=r"attention\.indexer\.types"):
        ask(toy(tmp_path, metadata={TYPES: types}))


def test_a_file_without_indexer_is_dense(tmp_path: Path) -> None:
    found = ask(toy(tmp_path, indexed=()))
    assert found.hparams.indexer is None
    assert "sparse attention" not in {row[0] for row in found.effective}


def test_an_indexer_of_the_mtp_block_alone_does_not_count(tmp_path: Path) -> None:
    assert ask(toy(tmp_path, indexed=(4,), mtp=1)).hparams.indexer is None


# --- sizes -----------------------------------------------------------------------------------


def test_glm_5s_sizes(tmp_path: Path) -> None:
    found = ask(header_only(tmp_path / "a.gguf", "v3", **GLM5), vram=(80 << 30,) * 8,
                split_mode="graph", ctx_size=4096)  # fmt: skip
    hp = found.hparams
    assert (hp.n_layer, hp.n_skipped, hp.indexer.n_heads, hp.indexer.width) == (78, 1, 32, 128)
    assert hp.sparse.top_k == 2048 and hp.sparse.eps == 1e-6
    assert hp.routing.sigmoid
    assert found.plan.ranks[0].cache == 4096 * 78 * 2 * (576 + 128)
    for shard in found.plan.shards:
        if ".indexer." in shard.tensor:
            assert shard.axis is None, "mirrored: all ranks choose alike"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.indexer.head_count", 0, "head_count is 0"),
        ("attention.indexer.head_count", None, "head_count is missing"),
        ("attention.indexer.key_length", None, "key_length is missing"),
        ("attention.indexer.top_k", 0, "top_k is 0"),
        ("attention.indexer.top_k", None, "top_k is missing"),
        ("attention.layer_norm_epsilon", -1.0, "layer_norm_epsilon is -1.0"),
        ("attention.indexer.key_length", 8, "key_length 8 has no room for 16 rotated values"),
    ],
)
def test_impossible_sizes_are_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(GgufError, match=message):
        ask(toy(tmp_path, metadata={key: value}))


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadTensorShape, match=r"blk\.0\.indexer\.attn_q_b\.weight"):
        ask(toy(tmp_path, metadata={"attention.indexer.head_count": 5}))


@pytest.mark.parametrize("word", ["attn_q_b.weight", "k_norm.bias", "proj.weight"])
def test_part_of_an_indexer_is_not_enough(tmp_path: Path, word: str) -> None:
    name = f"blk.2.indexer.{word}"
    with pytest.raises(MissingTensor, match=name):
        ask(without(tmp_path, name))


def test_a_lite_query_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingTensor, match="attn_q_a"):
        ask(toy(tmp_path, q=0, indexed=(), metadata={"attention.q_lora_rank": 16}))


def test_other_architectures_have_no_indexer(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"indexer\.attn_q_b\.weight is not part"):
        ask(toy(tmp_path, arch="deepseek2"))


def test_the_gate_is_sigmoid_without_a_key(tmp_path: Path) -> None:
    path = toy(tmp_path, metadata={"expert_gating_func": None})
    assert glm_dsa.Hparams.from_gguf(GgufFile.open(path)).routing.sigmoid


# --- MTP -------------------------------------------------------------------------------------


def test_the_mtp_tail_is_skipped_whole_and_said_so(tmp_path: Path) -> None:
    # Published files lack k_b and v_b there, or hold half an indexer.
    gone = ("blk.4.attn_k_b.weight", "blk.4.attn_v_b.weight", "blk.4.indexer.proj.weight")
    found = ask(without(tmp_path, *gone, mtp=1, indexed=(*ALL, 4)))
    rows = {name: (value, note) for name, value, note in found.effective}
    assert rows["architecture"] == ("glm-dsa", "1 MTP blocks skipped")
    assert {s.layer for s in found.plan.shards} == {None, *ALL}


# --- cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache_type", "row"), [("f32", 96), ("f16", 48), ("q8_0", 34)])
@pytest.mark.parametrize("split", ["none", "layer", "graph"])
def test_only_layers_that_choose_hold_keys(
    tmp_path: Path, cache_type: str, row: int, split: str
) -> None:
    path = toy(tmp_path, metadata={TYPES: [1, 0, 0, 1]})
    device = "cpu" if split == "none" else "cpu,cpu,cpu"
    flags = {"device": device, "split_mode": split, "ctx_size": 256}
    with mlacli.load(path, **flags, indexer_cache_type_k=cache_type) as engine:
        planned = [rank.cache for rank in engine.prepared.plan.ranks]
        assert planned == [cache.nbytes for cache in engine._caches]
        held = {"none": [2], "layer": [1, 0, 1], "graph": [2, 2, 2]}[split]
        layers = {"none": [4], "layer": [2, 1, 1], "graph": [4, 4, 4]}[split]
    assert planned == [256 * (n * row + m * 96) for n, m in zip(held, layers, strict=True)]
    with mlacli.load(path, **flags, no_dsa=True) as engine:
        dense = [rank.cache for rank in engine.prepared.plan.ranks]
        assert dense == [cache.nbytes for cache in engine._caches] == [256 * m * 96 for m in layers]


def test_keys_count_in_the_context_that_fits(tmp_path: Path) -> None:
    path = toy(tmp_path)
    sparse, dense = ask(path, ctx_size=256), ask(path, ctx_size=256, no_dsa=True)
    assert sparse.plan.n_ctx_fits < dense.plan.n_ctx_fits


def test_choosing_stays_within_the_planned_scratch(tmp_path: Path) -> None:
    n, n_kv = 128, 10_000
    hp = ask(toy(tmp_path, top_k=1000)).hparams
    rng, ops = np.random.default_rng(1), NumpyOps(SoloComm(), ContextParams(), 0)
    keys = LatentRows(n_kv, 24, "f16")
    keys.write(np.arange(n_kv), rng.normal(size=(n_kv, 24)).astype(np.float32))
    q = rng.normal(size=(n, 4, 24)).astype(np.float32)
    step = ops.step([0] * n, n_kv - n, [1.0], [])
    tracemalloc.start()
    select(q, q[:, :, 0], keys, step, 1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    planned = scratch_bytes(hp, ContextParams(n_ubatch=n), n_kv, (0, 4), (0, 0), 1)
    assert 0.3 * planned < peak <= planned


# --- flags -----------------------------------------------------------------------------------


def rows(found) -> dict:
    return {name: (value, note) for name, value, note in found.effective}


def test_what_runs_is_reported(tmp_path: Path) -> None:
    path = toy(tmp_path, indexed=(0, 2))
    said = rows(ask(path, indexer_cache_type_k="q8_0"))["sparse attention"]
    assert said == ("top 6", "2 of 4 layers choose, by keys in q8_0")
    assert rows(ask(path, dsa=True, dsa_top_k=99))["sparse attention"][0] == "top 99"
    assert rows(ask(path, no_dsa=True))["sparse attention"] == ("off", "the indexer is left out")


@pytest.mark.parametrize("change", [{"arch": "deepseek2"}, {}])
def test_without_an_indexer_the_flags_do_nothing_and_dsa_is_refused(
    tmp_path: Path, change: dict
) -> None:
    path = toy(tmp_path, indexed=(), **change)
    flags = {"dsa_top_k": 5, "indexer_cache_type_k": "q8_0", "no_dsa": True}
    said = rows(ask(path, **flags))
    for flag in ("--dsa-top-k", "--indexer-cache-type-k", "--no-dsa"):
        assert said[flag] == ("no effect", said[flag][1])
    with pytest.raises(UsageError, match="--dsa: the file has no sparse indexer"):
        ask(path, dsa=True)


def test_with_no_dsa_the_other_flags_do_nothing() -> None:
    given = {"dsa_top_k": 5, "no_dsa": True}
    params = to_params(given, {"dsa_top_k": "-dsatk", "no_dsa": "--no-dsa"})
    (note,) = check("glm-dsa", params)
    assert (note.flag, note.verdict, note.message) == ("-dsatk", "no effect", "attention is dense")


def test_dsa_and_no_dsa_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dsa: --no-dsa excludes it"):
        ask(toy(tmp_path), dsa=True, no_dsa=True)


def test_only_asked_for_findings_come() -> None:
    assert check("glm-dsa", to_params({}, {})) == ()
    assert check("glm-dsa", to_params({"dsa": True}, {"dsa": "-dsa"})) == ()


def test_top_k_words() -> None:
    assert to_params({"dsa_top_k": rows_kept("-1")}).context.dsa_top_k is None
    assert to_params({"dsa_top_k": rows_kept("7")}).context.dsa_top_k == 7
    for word in ("0", "-2", "many"):
        with pytest.raises(UsageError, match="is not"):
            rows_kept(word)


def test_sparse_attention_needs_latent_rows(tmp_path: Path) -> None:
    hp = ask(toy(tmp_path)).hparams
    with pytest.raises(UsageError, match="-mla 0 keeps no latent rows"):
        settle_indexer(hp, ContextParams(mla=0))
    assert settle_indexer(hp, ContextParams(mla=0, no_dsa=True)).sparse is None
