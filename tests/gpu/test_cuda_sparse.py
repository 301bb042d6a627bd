"""The lightning indexer's kernels on a GPU: keys stored, rows chosen, against NumPy."""

from typing import Any

import numpy as np
import pytest
from kit.sparse_cases import SparseCase, device_step, host_step

from mlacli.backends import cuda_sparse


@pytest.mark.parametrize("n_kv", [2049, 16384, 131072])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_decode(ops: Any, n: int, n_kv: int) -> None:
    print(SparseCase(n, n, n_kv, padded=n // 3).check(ops))


@pytest.mark.parametrize("n_kv", [512, 2049, 16384])
def test_prefill(ops: Any, n_kv: int) -> None:
    print(SparseCase(n_kv, 512, n_kv, padded=0, compared=64).check(ops))


def test_prefill_in_several_blocks(ops: Any) -> None:
    assert cuda_sparse.tokens_at_once(200, 131072 + 7) < 200
    print(SparseCase(9, 200, 131072, compared=5).check(ops))


@pytest.mark.parametrize("cache_type", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("n", [1, 40])
def test_other_key_types(ops: Any, cache_type: str, n: int) -> None:
    print(SparseCase(5, n, 5000, cache_type, padded=3, compared=9).check(ops))


@pytest.mark.parametrize(("heads", "width", "p"), [(64, 128, 64), (8, 64, 32), (5, 36, 16)])
@pytest.mark.parametrize("n", [1, 33])
def test_other_sizes(ops: Any, heads: int, width: int, p: int, n: int) -> None:
    case = SparseCase(6, n, 3001, heads=heads, width=width, p=p, top_k=100, compared=9)
    print(case.check(ops))


@pytest.mark.parametrize("n_kv", [3000, 140000, 400000])
def test_ties_go_to_the_lower_row(ops: Any, n_kv: int) -> None:
    print(SparseCase(7, 1, n_kv, levels=3).check(ops))


def test_select_of_made_up_scores(ops: Any) -> None:
    """Signs, zeros of both signs and infinity, in order as NumPy's stable sort has them."""
    rng = np.random.default_rng(1)
    values = np.array([-np.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 3.0, 3.0000002, np.inf], np.float32)
    for n_kv, top_k in ((70000, 2048), (9000, 2048), (2100, 2048), (500, 3)):
        scores = np.full((2, n_kv + 4), np.nan, np.float32)
        scores[:, :n_kv] = values[rng.integers(0, len(values), (2, n_kv))]
        step = device_step(ops, host_step(np.array([n_kv - 1, n_kv - 2]), 8))
        for cluster in (1, 2, 4, 8) if ops.capability >= 90 else (1,):
            chosen = ops.new((2, top_k), "i4")
            ops.run("dsa_select", (cluster, 2), 1024, chosen, ops.put(scores), step.pos, top_k,
                    n_kv + 4, CLUSTER=cluster)  # fmt: skip
            for t, row in enumerate(ops.get(chosen)):
                want = np.argsort(-scores[t, : n_kv - t], kind="stable")[:top_k]
                assert np.array_equal(row, np.sort(want)), (n_kv, top_k, cluster, t)


def test_an_imposed_choice_is_returned_in_order(ops: Any) -> None:
    got = cuda_sparse.select(ops, None, None, None, 3, np.array([[5, 1, 3]]))  # type: ignore[arg-type]
    assert ops.get(got).tolist() == [[1, 3, 5]]


def test_a_replayed_graph_follows_the_position(ops: Any) -> None:
    """One captured step serves all positions, and runs twice to the same bits."""
    case = SparseCase(8, 1, 20000)
    rows, step = case.rows_on(ops), device_step(ops, case.step)
    key, norm, bias, q, w = map(ops.put, (case.key, case.norm, case.bias, case.q, case.w))
    out: list[Any] = []

    def launches() -> None:
        mark = ops.device.mark()
        queries = cuda_sparse.index(ops, rows, key, norm, bias, 1e-6, step, q, w)
        out.append(cuda_sparse.select(ops, queries, rows, step, case.top_k))
        ops.device.rewind(mark)

    launches()
    replay = ops.device.capture(launches)
    for pos in (19999, 3000, 2048, 19999):
        ops.device.copy_in(step.pos, np.array([pos], np.int32))
        replay()
        first = ops.get(out[-1])
        replay()
        assert np.array_equal(ops.get(out[-1]), first)
        assert first[0, -1] <= pos and np.all(np.diff(first[0]) > 0)
    _, want = case.want(ops.get(rows.values).astype(np.float32))
    assert len(np.setdiff1d(first[0], want[0])) < 3
