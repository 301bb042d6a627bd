"""The lightning indexer's kernels and their host code, run on the CPU (kit/simt.h)."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy", reason="needs CuPy to read kernels")

from kit.launcher import Launcher
from kit.simt import why_not
from kit.simt_device import SimtDevice
from kit.sparse_cases import SparseCase, device_step, host_step

from mlacli.backends import cuda_sparse
from mlacli.parallel import cuda_sizes

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def ops() -> Launcher:
    return Launcher(SimtDevice())


@pytest.mark.parametrize("n", [1, 3])
def test_few_tokens(ops: Any, n: int) -> None:
    SparseCase(n, n, 300, heads=8, width=64, p=16, top_k=40, padded=1).check(ops)


def test_many_tokens(ops: Any) -> None:
    SparseCase(4, 18, 90, heads=8, width=32, p=16, top_k=64).check(ops)


@pytest.mark.parametrize("cache_type", ["f32", "q8_0"])
def test_plain_products(ops: Any, cache_type: str) -> None:
    SparseCase(5, 2, 150, cache_type, heads=5, width=36, p=16, top_k=40).check(ops)


def test_ties(ops: Any) -> None:
    SparseCase(6, 1, 300, heads=8, width=32, p=16, top_k=40, levels=3).check(ops)


def test_a_step_that_is_not_sparse_stores_keys_alone(ops: Any) -> None:
    case = SparseCase(7, 2, 30, heads=8, width=32, p=16)
    rows, step = case.rows_on(ops), device_step(ops, case.step)
    key, norm, bias = map(ops.put, (case.key, case.norm, case.bias))
    assert cuda_sparse.index(ops, rows, key, norm, bias, 1e-6, step) is None
    case.store()
    assert np.array_equal(ops.get(rows.values)[:30], case.numpy.read(0, 30).astype(np.float16))
    assert np.isnan(ops.get(rows.values)[30:]).all()


def test_made_up_scores(ops: Any) -> None:
    """Signs, zeros of both signs, infinities and tiny numbers, as NumPy's stable sort has them."""
    rng = np.random.default_rng(1)
    values = np.array([-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 3.0, 3.0000002, np.inf], np.float32)
    scores = np.full((2, 1004), np.nan, np.float32)
    scores[:, :1000] = values[rng.integers(0, len(values), (2, 1000))]
    step = device_step(ops, host_step(np.array([999, 998]), 8))
    for top_k in (1, 3, 200, 998, 1000):
        chosen = ops.new((2, top_k), "i4")
        ops.run(
            "dsa_select", (1, 2), 1024, chosen, ops.put(scores), step.pos, top_k, 1004, CLUSTER=1
        )
        for t, row in enumerate(ops.get(chosen)):
            want = np.sort(np.argsort(-scores[t, : 1000 - t], kind="stable")[:top_k])
            assert np.array_equal(row, np.append(want, [-1] * (top_k - len(want))))


def test_rows_of_a_token_are_bounded_by_memory() -> None:
    assert cuda_sizes.tokens_at_once(512, 4096) == 512
    assert cuda_sizes.tokens_at_once(512, 131072) == 128
    assert cuda_sizes.tokens_at_once(512, 1 << 25) == 1


@pytest.mark.parametrize(
    ("n", "top_k"), [(300, 7), (300, 250), (5000, 40), (5000, 2048), (60000, 2048), (140000, 2048)]
)
def test_random_scores(ops: Any, n: int, top_k: int) -> None:
    """By warps', lanes' and single values' bounds, in one batch and several; too many for the
    bitmap; with a few far outliers, all in one step but those."""
    rng = np.random.default_rng(n)
    scores = rng.standard_normal((2, n)).astype(np.float32)
    scores[1, rng.integers(0, n, 3)] *= 1e30
    step = device_step(ops, host_step(np.array([n - 1, n - 2]), 8))
    chosen = ops.new((2, top_k), "i4")
    ops.run("dsa_select", (1, 2), 1024, chosen, ops.put(scores), step.pos, top_k, n, CLUSTER=1)
    for t, row in enumerate(ops.get(chosen)):
        want = np.argsort(-scores[t, : n - t], kind="stable")[:top_k]
        assert np.array_equal(row, np.sort(want))
