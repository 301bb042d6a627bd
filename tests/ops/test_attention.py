"""Every attention form against softmax in float64, the bound of -amb and the rounding of -gap."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse

from mlacli.attention_forms import (
    AttentionForm,
    attention_form,
    cache_parts,
    forms_up_to,
    heads_at_once,
)
from mlacli.backends.numpy_ops import NumpyOps
from mlacli.backends.numpy_weights import NumpyWeight
from mlacli.latent_cache import LatentCache
from mlacli.loading.quant_types import F32
from mlacli.loading.weights import from_float32
from mlacli.ops import LayerCache
from mlacli.parallel.comm import SoloComm
from mlacli.params import ContextParams

FORMS = [(mla, fa) for mla in range(4) for fa in (True, False)]
SCALE = 0.3


def weight(values: np.ndarray, name: str) -> NumpyWeight:
    return NumpyWeight(name, values.shape, F32, from_float32(values.astype(np.float32), F32))


class Case:
    """n new tokens behind a history, n_kv in all; 7 heads of odd sizes."""

    H, r, k, p, v = 7, 16, 8, 4, 6
    cache_width = r + p

    def __init__(self, n: int, n_kv: int, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        self.n, self.n_kv = n, n_kv
        self.c, self.k_pe = draw(n_kv, self.r) * 2, draw(n_kv, self.p) * 2
        self.q_nope, self.q_pe = draw(n, self.H, self.k), draw(n, self.H, self.p)
        self.k_b = weight(draw(self.H, self.r, self.k), "k")
        self.v_b = weight(draw(self.H, self.v, self.r), "v")

    def want(self) -> np.ndarray:
        """[n, h * v] in float64, everything expanded."""
        keys = np.einsum("tr,hrk->thk", self.c.astype(np.float64), self.k_b.float32())
        values = np.einsum("tr,hvr->thv", self.c.astype(np.float64), self.v_b.float32())
        scores = np.einsum("nhk,thk->nht", self.q_nope, keys)
        scores = (scores + np.einsum("nhp,tp->nht", self.q_pe, self.k_pe)) * SCALE
        for i in range(self.n):
            scores[i, :, self.n_kv - self.n + i + 1 :] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        o = np.einsum("nht,thv->nhv", p / p.sum(-1, keepdims=True), values)
        return o.reshape(self.n, -1)

    def stored(self, context: ContextParams) -> tuple[NumpyOps, Any]:
        """Ops and the arguments of their mla_attention; unused rows of the cache are NaN."""
        ops = NumpyOps(SoloComm(), context, 1 << 30)
        cache = LatentCache(ops, [0], self.n_kv + 50, cache_parts(self, context))
        past = self.n_kv - self.n
        for start, stop in ((0, past), (past, self.n_kv)):
            step = ops.step([0] * (stop - start), start, [1.0, 0.5], [])
            if step.n:
                new = self.c[start:stop], self.k_pe[start:stop]
                ops.store_kv(cache.rows[0], *new, self.k_b, self.v_b, step)
        return ops, (self.q_nope, self.q_pe, cache.rows[0], self.k_b, self.v_b, step, SCALE)

    def run(self, context: ContextParams) -> np.ndarray:
        """[n, h * v] by the ops."""
        ops, args = self.stored(context)
        return ops.mla_attention(*args)


def exact(mla: int, fa: bool, amb: int = 256, cache_type: str = "f32") -> ContextParams:
    return ContextParams(
        mla=mla, flash_attn=fa, attention_max_batch=amb, graph_attn_precision="f32",
        cache_type_k=cache_type, cache_type_v=cache_type,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n", "n_kv"), [(1, 1), (1, 300), (5, 5), (7, 520), (127, 127), (128, 128), (140, 700)]
)
@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_attention_is_softmax_over_what_a_token_may_see(n, n_kv, mla, fa) -> None:
    case, context = Case(n, n_kv), exact(mla, fa)
    ops, args = case.stored(context)
    got, want = ops.mla_attention(*args), case.want()
    assert np.abs(want).max() > 0.5, "a flat softmax would hide mistakes"
    assert nmse(got, want) < 1e-10
    assert ops.forms == {attention_form(context, n)}


def test_the_table_of_forms() -> None:
    """B 3.8: (-mla, -fa) -> decode, prefill of 127 and of 128 tokens."""
    heads, absorbed, expanded = "per-head", "absorbed", "expanded"
    table = {
        (0, True): [(heads, True)] * 3,
        (0, False): [(heads, False)] * 3,
        (1, True): [(absorbed, True)] * 3,
        (1, False): [(absorbed, False)] * 3,
        (2, True): [(absorbed, False), (absorbed, False), (expanded, True)],
        (2, False): [(absorbed, False)] * 3,
        (3, True): [(absorbed, True), (absorbed, True), (expanded, True)],
        (3, False): [(absorbed, False)] * 3,
    }
    for (mla, fa), forms in table.items():
        got = [attention_form(exact(mla, fa), n) for n in (1, 127, 128)]
        assert got == [AttentionForm(*form) for form in forms], (mla, fa)
        assert set(forms_up_to(exact(mla, fa), 128)) == set(got)


@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_what_the_cache_holds(mla: int, fa: bool) -> None:
    parts = cache_parts(Case(1, 1), exact(mla, fa))
    names = {0: ["keys", "values"], 1: ["rows"] if fa else ["rows", "columns"]}
    assert [part.name for part in parts] == names.get(mla, ["rows"])


@pytest.mark.parametrize("form", [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("n", "n_kv"), [(100, 700), (127, 2100)])
def test_heads_in_groups_give_the_same(form: tuple[int, bool], n: int, n_kv: int) -> None:
    """A head takes 0.27 or 1.02 MiB: 3 + 3 + 1 heads at once or one by one, against all 7."""
    case = Case(n, n_kv)
    whole = case.run(exact(*form, amb=0))
    grouped = case.run(exact(*form, amb=1))
    assert nmse(grouped, whole) < 1e-13
    assert nmse(grouped, case.want()) < 1e-10


@pytest.mark.parametrize(
    ("amb", "h", "n", "n_kv", "at_once"),
    [
        (0, 128, 512, 163840, 128),  # no bound
        (256, 128, 512, 163840, 1),  # one head alone exceeds it
        (256, 128, 512, 131072, 1),  # exactly one
        (256, 128, 512, 131071, 1),
        (256, 128, 512, 65536, 2),
        (256, 13, 512, 32768, 4),  # a prime count: 4 + 4 + 4 + 1
        (256, 13, 1, 163840, 13),
        (128, 20, 511, 9999, 6),
    ],
)
def test_heads_at_once(amb: int, h: int, n: int, n_kv: int, at_once: int) -> None:
    context = ContextParams(attention_max_batch=amb)
    assert heads_at_once(context, h, n, n_kv) == at_once


@pytest.mark.parametrize("mla", [0, 1, 2])
def test_amb_bounds_what_is_held(mla: int) -> None:
    """-amb 4 holds two heads of seven; block-wise scratch doesn't grow with the cache."""

    def peak(context: ContextParams, n_kv: int) -> int:
        ops, args = Case(100, n_kv).stored(context)
        tracemalloc.start()
        ops.mla_attention(*args)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    matrix = 4 * 100 * 4000  # bytes of one head
    assert 7 * matrix < peak(exact(mla, False, 0), 4000) < 9 * matrix
    assert 2 * matrix < peak(exact(mla, False, 4), 4000) < 4 * matrix
    blockwise = exact(3 if mla == 2 else mla, True)
    assert peak(blockwise, 4000) < peak(blockwise, 2000) + matrix // 100
    if mla == 2:  # -fa on: short ubatches hold matrices all the same
        assert 2 * matrix < peak(exact(2, True, 4), 4000) < 4 * matrix


@pytest.mark.parametrize(
    ("mla", "fa", "cache_type"),
    [
        (*form, cache_type)
        for form in FORMS
        for cache_type in ("f16", "bf16", "q8_0")
        if cache_type != "q8_0" or form not in ((0, False), (1, False))  # refused: quantised V
    ],
)
def test_cache_types_round_and_no_more(mla: int, fa: bool, cache_type: str) -> None:
    case = Case(3, 300)
    got = case.run(exact(mla, fa, cache_type=cache_type))
    bar = {"f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-3}[cache_type]
    assert 1e-9 < nmse(got, case.want()) < bar


@pytest.mark.parametrize(("mla", "fa"), FORMS)
def test_stale_rows_behind_n_kv_never_leak(mla: int, fa: bool) -> None:
    """The cache starts as NaN; after a rewind it also holds large values of forgotten tokens."""
    case, context = Case(5, 60), exact(mla, fa)
    ops = NumpyOps(SoloComm(), context, 1 << 30)
    cache = LatentCache(ops, [0], 256, cache_parts(case, context))

    def store(c: np.ndarray, k_pe: np.ndarray, start: int) -> Any:
        step = ops.step([0] * len(c), start, [1.0, 0.5], [])
        ops.store_kv(cache.rows[0], c, k_pe, case.k_b, case.v_b, step)
        return step

    store(np.full((40, 16), 1e4, np.float32), np.full((40, 4), 1e4, np.float32), 60)
    store(case.c[:55], case.k_pe[:55], 0)
    step = store(case.c[55:], case.k_pe[55:], 55)
    args = case.q_nope, case.q_pe, cache.rows[0], case.k_b, case.v_b, step, SCALE
    assert nmse(ops.mla_attention(*args), case.want()) < 1e-10


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def test_gap_f16_rounds_query_row_and_probabilities_only() -> None:
    case = Case(1, 200)
    ops = {
        gap: NumpyOps(SoloComm(), ContextParams(graph_attn_precision=gap), 1 << 30)
        for gap in ("f16", "f32")
    }
    rows = ops["f32"].new_rows(200, 20, "f32")
    rows.write(np.arange(200), np.concatenate([case.c, case.k_pe], -1))
    kv = LayerCache(rows=rows)
    q_lat = ops["f32"].heads_up(case.q_nope, case.k_b)
    step = ops["f32"].step([0], 199, [1.0, 0.5], [])
    keys = half(np.concatenate([case.c, case.k_pe], -1))
    scores = half(np.concatenate([q_lat, case.q_pe], -1))[0] @ keys.T * SCALE
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = half(p) @ keys[:, :16] / p.sum(-1, keepdims=True)
    args = q_lat, case.q_pe, kv, 16, step, SCALE
    assert nmse(ops["f16"].attend_absorbed(*args, True)[0], want) < 1e-10
    assert nmse(ops["f32"].attend_absorbed(*args, True)[0], want) > 1e-9
    whole = (ops[gap].attend_absorbed(*args, False) for gap in ("f16", "f32"))
    assert np.array_equal(*whole)  # a whole matrix rounds nothing


def test_gap_f16_rounds_keys_and_values_per_head() -> None:
    case = Case(1, 200)
    context = ContextParams(mla=0, cache_type_k="f32", cache_type_v="f32")
    keys = half(np.einsum("tr,hrk->htk", case.c, case.k_b.float32()))
    values = half(np.einsum("tr,hvr->htv", case.c, case.v_b.float32()))
    scores = np.einsum("hk,htk->ht", half(case.q_nope[0]), keys)
    scores = (scores + half(case.q_pe[0]) @ half(case.k_pe).T) * SCALE
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("ht,htv->hv", half(p), values) / p.sum(-1, keepdims=True)
    assert nmse(case.run(context), want.reshape(1, -1)) < 1e-8
    assert nmse(case.run(exact(0, True)), want.reshape(1, -1)) > 1e-8
