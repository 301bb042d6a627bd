"""The ops of sparse attention and of mistral4's queries against their formulas in float64."""

import math

import numpy as np
import pytest
from kit.compare import nmse

from mlacli.backends.numpy_ops import LatentRows, NumpyOps
from mlacli.backends.numpy_weights import NumpyWeight
from mlacli.loading.quant_types import F32
from mlacli.models.parts import Temperature
from mlacli.parallel.comm import SoloComm
from mlacli.parallel.memory import INDEX_BLOCK
from mlacli.params import ContextParams


def ops(gap: str = "f32") -> NumpyOps:
    return NumpyOps(SoloComm(), ContextParams(graph_attn_precision=gap), 1 << 30)


def weight(values: np.ndarray, name: str = "w") -> NumpyWeight:
    raw = np.ascontiguousarray(values, np.float32)
    return NumpyWeight(name, values.shape, F32, raw.view(np.uint8))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def keys_of(values: np.ndarray, spare: int = 5) -> LatentRows:
    """The rows, and poisoned ones behind them."""
    rows = LatentRows(len(values) + spare, values.shape[1], "f32")
    rows.poison()
    rows.write(np.arange(len(values)), values.astype(np.float32))
    return rows


def test_layer_norm(rng) -> None:
    x = (rng.normal(size=(3, 16)) + 4).astype(np.float32)
    w, b = rng.normal(size=16), rng.normal(size=16)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 0.1)
    got = ops().layer_norm(x, weight(w), weight(b, "b"), 0.1)
    assert nmse(got, want * w + b) < 1e-11


def test_rope_first_turns_the_first_columns(rng) -> None:
    o, x = ops(), rng.normal(size=(4, 3, 12)).astype(np.float32)
    step = o.step([0] * 4, 1000, [1.0, 0.1, 0.01, 0.001], [])
    y = o.rope_first(x, step)
    assert np.array_equal(y[..., :8], o.rope(x[..., :8], step))
    assert np.array_equal(y[..., 8:], x[..., 8:])


def test_temper(rng) -> None:
    o, q = ops(), rng.normal(size=(6, 10)).astype(np.float32)
    step = o.step([0] * 6, 97, [1.0], [])
    got = o.temper(q, Temperature(0.1, 50), step)
    for i, pos in enumerate(range(97, 103)):
        factor = 1 + 0.1 * math.log(1 + pos // 50)
        np.testing.assert_allclose(got[i], q[i] * factor, rtol=1e-6)


@pytest.mark.parametrize("n_kv", [40, INDEX_BLOCK, INDEX_BLOCK + 1, 2 * INDEX_BLOCK + 900])
@pytest.mark.parametrize("n", [1, 9])
def test_the_best_rows_are_chosen_in_order(rng, n: int, n_kv: int) -> None:
    heads, width, top_k = 4, 8, 12
    o, rows = ops(), rng.normal(size=(n_kv, width))
    q, w = rng.normal(size=(n, heads, width)), rng.normal(size=(n, heads))
    step = o.step([0] * n, n_kv - n, [1.0], [])
    got = o.dsa_select(
        q.astype(np.float32), w.astype(np.float32), keys_of(rows), step, top_k
    )  # fmt: skip
    score = np.einsum("nh,nht->nt", w, np.maximum(np.einsum("nhi,ti->nht", q, rows), 0))
    assert got.shape == (n, top_k)
    for i, pos in enumerate(range(n_kv - n, n_kv)):
        best = np.argsort(-score[i, : pos + 1], kind="stable")[:top_k]
        assert got[i].tolist() == sorted(best.tolist())


@pytest.mark.parametrize("n_kv", [30, INDEX_BLOCK + 500])
def test_ties_go_to_the_lower_row(n_kv: int) -> None:
    # Every row scores the same but two, one in the last block: these, then the lowest rows.
    o, rows = ops(), np.ones((n_kv, 4))
    rows[[20, n_kv - 2]] *= 2
    q, w = np.ones((1, 3, 4), np.float32), np.ones((1, 3), np.float32)
    step = o.step([0], n_kv - 1, [1.0], [])
    assert o.dsa_select(q, w, keys_of(rows), step, 6).tolist() == [[0, 1, 2, 3, 20, n_kv - 2]]
    # Nothing seen by any head scores 0 (or -0), all alike.
    assert o.dsa_select(-q, w, keys_of(rows), step, 4).tolist() == [[0, 1, 2, 3]]
    mixed = np.where(np.arange(3) % 2, -w, w)
    assert o.dsa_select(-q, mixed, keys_of(rows), step, 4).tolist() == [[0, 1, 2, 3]]


def test_rows_beyond_a_token_come_last(rng) -> None:
    # The first tokens of a ubatch see fewer rows than top_k: all of theirs are among the chosen.
    o, n = ops(), 10
    rows, q = rng.normal(size=(n, 4)), rng.normal(size=(n, 2, 4)).astype(np.float32)
    step = o.step([0] * n, 0, [1.0], [])
    got = o.dsa_select(q, q[:, :, 0], keys_of(rows), step, 6)
    for pos in range(6):
        assert got[pos].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_imposed_choice_is_returned_in_order() -> None:
    imposed = np.array([[5, 1, 3]])
    got = ops().dsa_select(None, None, None, None, 3, imposed)
    assert got.tolist() == [[1, 3, 5]]


def case(rng, n: int, n_kv: int):
    h, r, k, p, v = 3, 16, 8, 4, 6
    rows = rng.normal(size=(n_kv, r + p)) * 2
    q_nope, q_pe = (rng.normal(size=(n, h, x)).astype(np.float32) for x in (k, p))
    k_b, v_b = weight(rng.normal(size=(h, r, k)), "k"), weight(rng.normal(size=(h, v, r)), "v")
    chosen = np.stack([np.sort(rng.choice(n_kv, 7, replace=False)) for _ in range(n)])
    chosen[:, 0] = 0  # visible to all
    return rows, q_nope, q_pe, k_b, v_b, chosen


@pytest.mark.parametrize(("n", "n_kv"), [(1, 30), (9, 30), (30, 30)])
def test_attention_sees_chosen_rows_up_to_the_token(rng, n: int, n_kv: int) -> None:
    rows, q_nope, q_pe, k_b, v_b, chosen = case(rng, n, n_kv)
    o = ops()
    step = o.step([0] * n, n_kv - n, [1.0, 0.5], [])
    got = o.sparse_attention(q_nope, q_pe, keys_of(rows), k_b, v_b, chosen, step, 0.3)
    rows = rows.astype(np.float32).astype(np.float64)
    q = np.concatenate([np.einsum("nhk,hrk->nhr", q_nope, k_b.float32()), q_pe], -1)
    scores = np.einsum("nhw,tw->nht", q, rows) * 0.3
    for i in range(n):
        allowed = [t for t in chosen[i] if t <= n_kv - n + i]
        scores[i][:, np.setdiff1d(np.arange(n_kv), allowed)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    latent = (p / p.sum(-1, keepdims=True)) @ rows[:, :16]
    want = np.einsum("nhr,hvr->nhv", latent, v_b.float32()).reshape(n, -1)
    assert nmse(got, want) < 1e-10


def test_all_rows_chosen_is_dense_attention(rng) -> None:
    rows, q_nope, q_pe, k_b, v_b, _ = case(rng, 5, 30)
    for gap in ("f32", "f16"):
        o = ops(gap)
        step = o.step([0] * 5, 25, [1.0, 0.5], [])
        everything = np.tile(np.arange(30), (5, 1))
        sparse = o.sparse_attention(q_nope, q_pe, keys_of(rows), k_b, v_b, everything, step, 0.3)
        dense = o.mla_attention(q_nope, q_pe, keys_of(rows), k_b, v_b, step, 0.3)
        assert nmse(sparse, dense) < 1e-10
    exact = ops("f32").sparse_attention(
        q_nope, q_pe, keys_of(rows), k_b, v_b, everything, step, 0.3
    )
    assert nmse(sparse, exact) > 1e-9, "-gap f16 rounds here too"
