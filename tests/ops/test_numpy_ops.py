"""Each NumPy op against its formula in float64; attention is in test_attention.py."""

import math

import numpy as np
import pytest
from kit.compare import nmse

from mlacli.backends.numpy_ops import LatentRows, NumpyOps, reduce_typed
from mlacli.backends.numpy_weights import DequantCache, NumpyWeight
from mlacli.loading.quant_types import BF16, F16, F32, Q8_0
from mlacli.loading.weights import from_float32, to_float32
from mlacli.models.parts import Routing
from mlacli.ops import LayerWeights
from mlacli.parallel.comm import SoloComm
from mlacli.params import ContextParams


def ops() -> NumpyOps:
    return NumpyOps(SoloComm(), ContextParams(), 1 << 30)


def weight(values: np.ndarray, qtype=F32, name: str = "w", first: int = 0) -> NumpyWeight:
    raw = from_float32(np.ascontiguousarray(values, np.float32), qtype)
    return NumpyWeight(name, values.shape, qtype, raw, first=first)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("qtype", [F32, F16, BF16, Q8_0])
def test_matmul_is_x_times_w_transposed(rng, qtype) -> None:
    x, w = rng.normal(size=(5, 64)).astype(np.float32), weight(rng.normal(size=(9, 64)), qtype)
    want = x.astype(np.float64) @ to_float32(w.raw, qtype).astype(np.float64).T
    assert nmse(ops().matmul(x, w), want) < 1e-12


@pytest.mark.parametrize("qtype", [F32, Q8_0])
@pytest.mark.parametrize("n", [1, 40])
def test_no_bit_depends_on_what_is_cached(rng, qtype, n: int) -> None:
    w = weight(rng.normal(size=(3, 2111, 256)), qtype, "experts")  # three chunks a product
    whole = weight(rng.normal(size=(2111, 256)), qtype, "whole")
    x = rng.normal(size=(n, 256)).astype(np.float32)
    ample, small = DequantCache(1 << 30), DequantCache(1000)
    for e, dense in ((None, whole.float32()), (0, w.float32(0)), (2, w.float32(2))):
        held = whole if e is None else w
        y = small.product(x, held, e)
        assert nmse(y, x.astype(np.float64) @ dense.T.astype(np.float64)) < 1e-12
        assert np.array_equal(ample.product(x, held, e), y)
        assert np.array_equal(ample.product(x, held, e), y)  # from the cache
    assert small.used == 0 and (ample.used > 0) == (qtype is Q8_0)


def test_heads_up_multiplies_head_by_head(rng) -> None:
    x = rng.normal(size=(3, 4, 8)).astype(np.float32)
    w = weight(rng.normal(size=(4, 6, 8)))
    want = np.einsum("nha,hba->nhb", x, w.float32())
    assert nmse(ops().heads_up(x, w), want) < 1e-12


def test_rms_norm(rng) -> None:
    x, w = rng.normal(size=(3, 16)).astype(np.float32), weight(rng.normal(size=16))
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * w.float32()
    assert nmse(ops().rms_norm(x, w, 1e-6), want) < 1e-12


def test_rope_turns_interleaved_pairs_and_keeps_lengths(rng) -> None:
    o, x = ops(), rng.normal(size=(4, 3, 8)).astype(np.float32)
    step = o.step([0] * 4, 1000, [1.0, 0.1, 0.01, 0.001], [])
    y = o.rope(x, step)
    for i, pos in enumerate(range(1000, 1004)):
        for pair, theta in enumerate([1.0, 0.1, 0.01, 0.001]):
            want = (x[i, :, 2 * pair] + 1j * x[i, :, 2 * pair + 1]) * np.exp(1j * pos * theta)
            np.testing.assert_allclose(y[i, :, 2 * pair], want.real, atol=1e-5)
            np.testing.assert_allclose(y[i, :, 2 * pair + 1], want.imag, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1), rtol=1e-5)


def test_silu_mul_survives_large_inputs() -> None:
    gate = np.array([[-1e5, -20.0, 0.0, 3.0, 1e5]], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        got = ops().silu_mul(gate, np.ones_like(gate))
    want = [0.0, -20 / (1 + math.exp(20)), 0.0, 3 / (1 + math.exp(-3)), 1e5]
    np.testing.assert_allclose(got[0], want, atol=1e-7)


@pytest.mark.parametrize(("cache_type", "bar"), [("f32", 0), ("f16", 1e-6), ("bf16", 1e-5),
                                                 ("q8_0", 1e-4)])  # fmt: skip
def test_cache_rows_keep_what_their_type_holds(rng, cache_type: str, bar: float) -> None:
    values = rng.normal(size=(4, 40)).astype(np.float32)  # 40 is no multiple of a q8_0 block
    rows = LatentRows(8, 40, cache_type)
    rows.poison()
    rows.write(np.arange(2, 6), values)
    assert nmse(rows.read(2, 6), values) <= bar
    assert rows.nbytes == 8 * {"f32": 160, "f16": 80, "bf16": 80, "q8_0": 68}[cache_type]


@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16"])
def test_transposed_rows_hold_the_same_values_token_by_token_in_memory(rng, cache_type) -> None:
    values = rng.normal(size=(4, 40)).astype(np.float32)
    plain, turned = LatentRows(8, 40, cache_type), LatentRows(8, 40, cache_type, True)
    for rows in (plain, turned):
        rows.poison()
        rows.write(np.arange(2, 6), values)
    assert np.array_equal(turned.read(2, 6), plain.read(2, 6))
    assert np.isnan(turned.read(0, 2)).all() and np.isnan(turned.read(6, 8)).all()
    assert turned.nbytes == plain.nbytes
    memory = turned._rows.ravel(order="K").reshape(40, 8)  # value by value: [r, n_ctx]
    assert np.array_equal(memory[:, 2:6], plain._rows[2:6].T)


def test_route_weighs_by_unbiased_scores_and_breaks_ties_low(rng) -> None:
    gate = weight(np.zeros((6, 4)))
    chosen = ops().route(np.ones((1, 4), np.float32), gate, None, Routing(3, True))
    assert chosen.ids.tolist() == [[0, 1, 2]]
    bias = weight(np.array([0, 0, 0, 0, 9.0, 5.0]), name="b")
    chosen = ops().route(
        np.ones((1, 4), np.float32), gate, bias, Routing(2, True, renormalise=True, scale=2.5)
    )
    assert chosen.ids.tolist() == [[4, 5]]
    np.testing.assert_allclose(chosen.weights, [[1.25, 1.25]])


def test_groups_count_their_maximum_or_their_best_two() -> None:
    # Group 0 has the single best expert, group 1 the best pair.
    logits = np.array([[3.0, -4, -4, -4, 2.5, 2.4, -4, -4]], np.float32)
    gate = weight(np.eye(8))
    softmax = ops().route(logits, gate, None, Routing(1, False, 2, 1))
    sigmoid = ops().route(logits, gate, None, Routing(1, True, 2, 1))
    assert softmax.ids.tolist() == [[0]]
    assert sigmoid.ids.tolist() == [[4]]


def test_renormalising_tiny_scores_gives_finite_weights() -> None:
    gate = weight(np.full((4, 1), -200.0))
    chosen = ops().route(np.ones((1, 1), np.float32), gate, None,
                         Routing(2, True, renormalise=True))  # fmt: skip
    assert np.isfinite(chosen.weights).all()


def test_experts_are_summed_with_their_weights(rng) -> None:
    n, d, f, n_experts = 6, 8, 5, 4
    gate, up = (rng.normal(size=(n_experts, f, d)) for _ in range(2))
    down = rng.normal(size=(n_experts, d, f))
    x = rng.normal(size=(n, d)).astype(np.float32)
    o = ops()
    chosen = o.route(x, weight(rng.normal(size=(n_experts, d)), name="g"), None, Routing(2, False))
    want = np.zeros((n, d))
    for i in range(n):
        for e, share in zip(chosen.ids[i], chosen.weights[i], strict=True):
            act = gate[e] @ x[i]
            want[i] += share * (down[e] @ (act / (1 + np.exp(-act)) * (up[e] @ x[i])))
    parts = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}
    whole = LayerWeights({k: weight(v, name=k) for k, v in parts.items()})
    assert nmse(o.moe_down(o.moe_up(x, chosen, whole), chosen, whole), want) < 1e-10
    # Two ranks that hold experts 0..2 and 3 add up to the same.
    total = 0
    for start, stop in ((0, 3), (3, 4)):
        held = LayerWeights(
            {k: weight(v[start:stop], name=k, first=start) for k, v in parts.items()}
        )
        rank = ops()
        total = total + rank.moe_down(rank.moe_up(x, chosen, held), chosen, held)
    assert nmse(total, want) < 1e-10


def test_the_expert_cache_drops_the_least_recently_used() -> None:
    w = weight(np.ones((3, 4, 64)), Q8_0, "e")
    size = 4 * 64 * 4
    cache = DequantCache(2 * size)
    first = cache.expert(w, 0)
    cache.expert(w, 1)
    assert cache.expert(w, 0) is first
    cache.expert(w, 2)  # drops 1
    assert cache.expert(w, 0) is first
    assert cache.used == 2 * size
    whole = weight(np.ones((4, 64)), Q8_0, "whole")
    assert cache.whole(whole) is cache.whole(whole)  # makes room among experts
    assert cache.used <= cache.budget


def test_reduce_types_round_from_33_tokens(rng) -> None:
    x = rng.normal(size=(33, 64)).astype(np.float32)
    assert reduce_typed("f32") is None
    for name, bar in (("f16", 1e-6), ("bf16", 1e-4), ("q8_0", 1e-3)):
        typed = reduce_typed(name)
        assert typed is not None
        assert typed(x[:32]) is not None and np.array_equal(typed(x[:32]), x[:32])
        assert 0 < nmse(typed(x), x) < bar
