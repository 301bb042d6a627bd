"""Whole models in every attention form: logits, caches and scratch as planned, forms as predicted.

Weakest link: tests/kit/reference.py, which the golden logits of transformers hold in place.
"""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import reference
from kit.compare import nmse, row_nmse, same_top1
from kit.toy_gguf import Toy, write_toy

import mlacli
from mlacli.attention_forms import SPARSE, attention_form
from mlacli.errors import UsageError

MODELS = Path(__file__).parents[1] / "golden" / "models"
GLM = MODELS / "glm47flash.gguf"
FORMS = [(mla, fa) for mla in range(4) for fa in (True, False)]
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "graph_attn_precision": "f32"}
STAGES: dict[str, dict[str, Any]] = {
    "none": {},
    "layer": {"device": "cpu,cpu", "split_mode": "layer"},
}


def form_flags(mla: int, fa: bool) -> dict[str, Any]:
    return {"mla_use": mla, "flash_attn": fa}


@pytest.fixture(scope="module")
def long() -> tuple[list[int], np.ndarray]:
    """280 tokens, which take two cache blocks, and their float64 logits."""
    tokens = np.random.default_rng(1).integers(0, 300, 280).tolist()
    return tokens, reference.forward(reference.load(GLM), tokens)


@pytest.mark.parametrize(
    ("name", "split"),
    [("v2lite", "none"), ("v3", "layer"), ("mistral4", "layer"), ("real_rows", "none")],
)
@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_prefill_and_decode_are_those_of_transformers(name, split, mla, fa) -> None:
    data = np.load(MODELS / f"{name}.npz")
    tokens, want = data["tokens"].tolist(), data["logits"]
    flags = {**EXACT, **form_flags(mla, fa), **STAGES[split]}
    with mlacli.load(MODELS / f"{name}.gguf", **flags) as engine:
        prefilled = engine.prefill(tokens[:30], all_rows=True)
        decoded = np.stack([engine.decode(token) for token in tokens[30:]])
    got = np.concatenate([prefilled, decoded])
    assert nmse(got, want) <= 1e-6
    assert same_top1(got, want)


@pytest.mark.parametrize("ubatch", [1, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_any_ubatch_size_gives_the_same_logits(long, mla, fa, ubatch) -> None:
    """Both sides of 128, and remainders that run in another form than the rest."""
    tokens, want = long
    n = 40 if ubatch == 1 else 280
    split = STAGES["layer" if ubatch in (31, 129) else "none"]
    with mlacli.load(GLM, ubatch_size=ubatch, **EXACT, **form_flags(mla, fa), **split) as engine:
        got = engine.logits(tokens[:n])
        engine.rewind(n - 1)
        again = engine.decode(tokens[n - 1])
        context = engine.params.context
        lengths = {min(ubatch, n - start) for start in range(0, n, ubatch)}
        assert engine.forms["prefill"] == {attention_form(context, m) for m in lengths}
        assert engine.forms["decode"] == {attention_form(context, 1)}
    assert nmse(got, want[:n]) <= 1e-6
    assert nmse(again, want[n - 1]) <= 1e-6


def test_the_forms_that_ran_in_words() -> None:
    """-mla 2 prefills expanded, its remainder of 72 tokens and decoding hold whole matrices."""
    with mlacli.load(GLM, mla_use=2, ubatch_size=128) as engine:
        assert engine.attention_forms == {"prefill": "", "decode": ""}
        engine.prefill([1] * 200)
        engine.decode(1)
        assert engine.attention_forms == {
            "prefill": "absorbed whole-matrix + expanded block-wise",
            "decode": "absorbed whole-matrix",
        }


@pytest.mark.parametrize("mla", [1, 2, 3])
def test_graph_mode_takes_block_wise_forms_only(mla: int) -> None:
    split = {"device": "cpu,cpu,cpu", "split_mode": "graph"}
    with mlacli.load(GLM, mla_use=mla, **split) as engine:
        engine.prefill([1] * 128)
        engine.decode(1)
        long_form = "absorbed" if mla == 1 else "expanded"
        assert engine.attention_forms == {
            "prefill": f"{long_form} block-wise", "decode": "absorbed block-wise"
        }  # fmt: skip
        assert all(c.nbytes == r.cache for c, r in caches(engine))


@pytest.mark.parametrize("flags", [{"mla_use": 0}, {"flash_attn": False}])
def test_graph_mode_refuses_the_others(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="-sm graph needs"):
        mlacli.load(GLM, device="cpu,cpu", split_mode="graph", **flags)


@pytest.mark.parametrize(("mla", "fa"), FORMS[2:])
def test_sparse_layers_attend_absorbed_in_every_form(mla: int, fa: bool) -> None:
    """Beyond top_k rows, chosen rows replace the form; before, dense layers' form runs."""
    data = np.load(MODELS / "glm_dsa.npz")
    tokens, want = data["tokens"].tolist(), data["logits"]
    flags = {**EXACT, "indexer_cache_type_k": "f32", **form_flags(mla, fa)}
    with mlacli.load(MODELS / "glm_dsa.gguf", **flags) as engine:
        top_k = engine.prepared.hparams.sparse.top_k
        first = engine.prefill(tokens[:top_k], all_rows=True)
        dense = {attention_form(engine.params.context, top_k)}
        assert engine.forms["prefill"] == dense
        rest = engine.prefill(tokens[top_k:], all_rows=True)
        assert engine.forms["prefill"] == dense | {SPARSE}
    assert nmse(np.concatenate([first, rest]), want) <= 1e-6


def caches(engine: mlacli.Engine) -> list[tuple[Any, Any]]:
    return list(zip(engine._caches, engine.prepared.plan.ranks, strict=True))


@pytest.mark.parametrize("split", STAGES)
@pytest.mark.parametrize(("k_type", "v_type"), [("f32", "f16"), ("bf16", "f32"), ("q8_0", "bf16")])
@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_caches_take_the_planned_bytes(mla, fa, k_type, v_type, split) -> None:
    types = {"cache_type_k": k_type, "cache_type_v": v_type}
    with mlacli.load(GLM, ctx_size=256, **types, **form_flags(mla, fa), **STAGES[split]) as engine:
        assert all(c.nbytes == r.cache > 0 for c, r in caches(engine))


@pytest.mark.parametrize(("k_type", "v_type"), [("f16", "q8_0"), ("bf16", "f16"), ("q8_0", "bf16")])
@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_cache_types_stay_close(mla: int, fa: bool, k_type: str, v_type: str) -> None:
    data = np.load(MODELS / "v3.npz")
    tokens, want = data["tokens"].tolist(), data["logits"]
    flags = {"cache_type_k": k_type, "cache_type_v": v_type, "graph_attn_precision": "f32"}
    own_v = mla == 0 or (mla == 1 and not fa)
    if own_v and not fa and v_type == "q8_0":
        with pytest.raises(UsageError, match="q8_0 needs -fa on"):
            mlacli.load(MODELS / "v3.gguf", **flags, **form_flags(mla, fa))
        return
    with mlacli.load(MODELS / "v3.gguf", **flags, **form_flags(mla, fa)) as engine:
        got = engine.logits(tokens)
    bars = {"f16": 1e-6, "bf16": 1e-3, "q8_0": 1e-2}
    bar = max(bars[k_type], bars[v_type] if own_v else 0)
    assert 1e-10 < np.median(row_nmse(got, want)) <= bar


@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_gap_acts_block_wise_only(mla: int, fa: bool) -> None:
    tokens = np.random.default_rng(2).integers(0, 300, 140).tolist()

    def logits(gap: str, n: int) -> np.ndarray:
        flags = {**EXACT, "graph_attn_precision": gap, **form_flags(mla, fa)}
        with mlacli.load(GLM, **flags) as engine:
            return engine.logits(tokens[:n])

    for n in (40, 140):
        same = np.array_equal(logits("f16", n), logits("f32", n))
        assert same is (not fa or (mla == 2 and n < 128)), n


WIDE = Toy(
    layers=1, dense=1, heads=8, r=64, k=32, p=16, v=32, F=32, vocab=64, n_ctx=1024
)  # attention outweighs everything else


@pytest.mark.parametrize("ubatch", [32, 256])
@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_scratch_is_what_was_planned(tmp_path: Path, mla: int, fa: bool, ubatch: int) -> None:
    """The traced peak of a ubatch before a full cache: at most the plan, at least 2 / 5 of it.

    The plan also covers what this ubatch doesn't need: under -mla 2 a shorter one's matrix, per
    head the rounding of keys in -gap f16.
    """
    path = write_toy(tmp_path / "wide.gguf", WIDE)
    n_ctx = 1024
    with mlacli.load(path, ctx_size=n_ctx, ubatch_size=ubatch, **form_flags(mla, fa)) as engine:
        engine.prefill([1] * n_ctx)  # fills caches of unpacked weights too
        engine.rewind(n_ctx - ubatch)
        tracemalloc.start()
        engine.prefill([2] * ubatch)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        planned = engine.prepared.plan.ranks[0].scratch
    assert 0.4 * planned <= peak <= planned
