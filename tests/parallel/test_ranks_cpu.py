"""NumPy ranks in threads: reductions counted, residuals equal bit for bit, errors end all."""

import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from kit.residuals import watch

import mlacli
from mlacli.errors import MlacliError, RankError
from mlacli.parallel.comm import Exchange, PipeComm, ThreadComm
from mlacli.parallel.ranks import RankGroup

V3 = Path(__file__).parents[1] / "golden" / "models" / "v3.gguf"
GLM = V3.with_name("glm47flash.gguf")


def join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=-1)


def in_ranks(n: int, work) -> list:
    exchange = Exchange(n, join)
    comms = [ThreadComm(exchange, rank) for rank in range(n)]
    group = RankGroup(n, exchange)
    try:
        return group.run(lambda rank: work(comms[rank]))
    finally:
        group.close()


def test_sums_run_in_rank_order() -> None:
    # In float32 these add up differently in any other order.
    values = [np.float32(1e8), np.float32(3.0), np.float32(-1e8), np.float32(1.5)]
    expected = ((values[0] + values[1]) + values[2]) + values[3]
    sums = in_ranks(4, lambda comm: comm.all_reduce(np.full(3, values[comm.rank])))
    assert [s.tolist() for s in sums] == [[float(expected)] * 3] * 4


def test_a_rank_without_a_partial_gets_the_sum_of_the_others() -> None:
    def work(comm):
        return comm.all_reduce(np.ones(2) if comm.rank == 1 else None)

    assert [s.tolist() for s in in_ranks(3, work)] == [[1.0, 1.0]] * 3


def test_many_reductions_of_mixed_sizes_never_mix() -> None:
    def work(comm):
        sums = []
        for i in range(300):
            if (i + comm.rank) % 7 == 0:
                time.sleep(1e-4)
            size = 1 + i % 5
            sums.append(comm.all_reduce(np.full(size, i + comm.rank)).tolist())
        return sums

    first, *others = in_ranks(3, work)
    assert first == [[3 * i + 3] * (1 + i % 5) for i in range(300)]
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", ["v3", "glm47flash"])
@pytest.mark.parametrize("experts", ["width", "id", "layer"])
def test_two_reductions_a_layer_and_one_residual(name: str, experts: str, monkeypatch) -> None:
    seen = watch(monkeypatch)
    flags = {"device": "cpu,cpu,cpu", "split_mode": "graph", "expert_split": experts}
    with mlacli.load(V3.with_name(f"{name}.gguf"), **flags) as engine:
        engine.prefill(list(range(40)))
        engine.decode(5)
        n_layer = engine.prepared.hparams.n_layer
        counts = [ops.comm.n_reductions for ops in engine._ranks.ops]
    assert counts == [2 * n_layer * 2] * 3
    assert seen[0] == seen[1] == seen[2]


def test_the_same_run_twice_gives_the_same_bits() -> None:
    def run() -> bytes:
        with mlacli.load(GLM, device="cpu,cpu,cpu", split_mode="graph") as engine:
            return engine.logits(list(range(50))).tobytes()

    assert run() == run()


def test_a_rank_without_heads_and_one_without_width_take_part() -> None:
    # 7 ranks share 5 heads and an expert width of 32: most hold no heads or no width.
    flags = {"cache_type_k": "f32", "graph_attn_precision": "f32"}
    with mlacli.load(GLM, **flags) as engine:
        want = engine.logits(list(range(40)))
    with mlacli.load(GLM, **flags, device=",".join(["cpu"] * 7), split_mode="graph") as engine:
        heads = [stop - start for start, stop in (r.heads for r in engine.prepared.plan.ranks)]
        assert sorted(heads) == [0, 0, 1, 1, 1, 1, 1]
        assert [len(cache.rows) > 0 for cache in engine._caches] == [h > 0 for h in heads]
        got = engine.logits(list(range(40)))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_an_error_in_one_rank_ends_all_with_one_message() -> None:
    def work(comm):
        if comm.rank == 1:
            raise ValueError("boom")
        return comm.all_reduce(np.ones(1))

    with pytest.raises(RankError, match="rank 1 failed: ValueError: boom"):
        in_ranks(3, work)


def test_our_own_errors_pass_through_unwrapped() -> None:
    def work(comm):
        if comm.rank == 2:
            raise MlacliError("no more room", "make some")
        return comm.all_reduce(np.ones(1))

    with pytest.raises(MlacliError, match="no more room") as caught:
        in_ranks(3, work)
    assert caught.value.hint == "make some"


def test_a_group_works_again_after_an_error() -> None:
    exchange = Exchange(2, join)
    comms = [ThreadComm(exchange, rank) for rank in range(2)]
    group = RankGroup(2, exchange)

    def failing(rank: int):
        comms[rank].all_reduce(np.ones(1))
        if rank:
            raise ValueError("once")
        comms[rank].all_reduce(np.ones(1))

    with pytest.raises(RankError):
        group.run(failing)
    sums = group.run(lambda rank: comms[rank].all_reduce(np.ones(1)).tolist())
    group.close()
    assert sums == [[2.0], [2.0]]


def test_a_failing_pipeline_stage_frees_the_next() -> None:
    exchange = Exchange(2, join)
    comms = [PipeComm(exchange, rank) for rank in range(2)]
    group = RankGroup(2, exchange)

    def work(rank: int):
        if rank == 0:
            raise ValueError("first stage")
        return comms[1].receive()

    with pytest.raises(RankError, match="rank 0"):
        group.run(work)
    group.close()


def test_an_interrupt_stops_all_ranks() -> None:
    exchange = Exchange(2, join)
    comms = [ThreadComm(exchange, rank) for rank in range(2)]
    group = RankGroup(2, exchange)
    main = threading.main_thread().ident

    def work(rank: int):
        if rank == 0:  # the other waits for it for ever
            time.sleep(0.05)
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.2)
        return comms[rank].all_reduce(np.ones(1))

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        group.run(work)
    group.close()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_rank_that_works_alone_learns_that_the_call_is_over(interrupted: bool) -> None:
    group, main = RankGroup(2, Exchange(2, join)), threading.main_thread().ident

    def work(rank: int):
        if rank:
            if not interrupted:
                raise ValueError("boom")
            signal.pthread_kill(main, signal.SIGINT)
        for _ in range(5000):
            group.check()
            time.sleep(0.001)
        raise AssertionError("nobody told it")

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt if interrupted else RankError):
        group.run(work)
    assert time.perf_counter() - start < 4
    group.check()  # of no call
    assert group.run(lambda rank: rank) == [0, 1]
    group.close()
