"""The library: load(), generation, limits, and clean ends."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

import mlacli
from mlacli.errors import ContextFull, MlacliError, UsageError

V3 = Path(__file__).parent / "golden" / "models" / "v3.gguf"


@pytest.fixture
def engine():
    with mlacli.load(V3, ctx_size=256) as engine:
        yield engine


def test_unknown_parameters_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="split_mod") as caught:
        mlacli.load(V3, split_mod="graph")
    assert "split_mode" in caught.value.hint


def test_values_are_those_of_the_command_line() -> None:
    with mlacli.load(V3, device="cpu,cpu", split_mode="graph", tensor_split="3,1") as engine:
        assert [round(r.asked, 2) for r in engine.prepared.plan.ranks] == [0.75, 0.25]
        assert [r.heads for r in engine.prepared.plan.ranks] == [(0, 6), (6, 8)]


def test_greedy_ids_are_the_same_on_any_number_of_ranks() -> None:
    runs = []
    for flags in ({}, {"device": "cpu,cpu", "split_mode": "graph"}, {"device": "cpu,cpu,cpu"}):
        with mlacli.load(V3, temp=0, cache_type_k="f32", graph_attn_precision="f32",
                         **flags) as engine:  # fmt: skip
            runs.append(list(engine.generate_ids([1, 2, 3], 20)))
    assert len(runs[0]) == 20
    assert runs[0] == runs[1] == runs[2]


def test_a_seed_repeats_a_run_and_another_seed_does_not(engine) -> None:
    def run(seed: int) -> list[int]:
        from mlacli.params import SamplingParams
        from mlacli.sampling import Sampler

        return list(engine.generate_ids([5, 6], 12, Sampler(SamplingParams(seed=seed))))

    assert run(1) == run(1) != run(2)


def test_a_full_context_ends_generation(engine) -> None:
    prompt = list(range(250))
    ids = list(engine.generate_ids(prompt, -1))
    assert engine.context_full
    assert len(ids) == 256 - 250 + 1  # the last one is chosen but has no room to be cached
    assert engine.n_kv == 256


def test_n_predict_ends_generation(engine) -> None:
    assert len(list(engine.generate_ids([1], 5))) == 5
    assert list(engine.generate_ids([1], 0)) == []
    assert not engine.context_full


def test_a_prompt_longer_than_the_context_is_refused(engine) -> None:
    with pytest.raises(ContextFull, match="257"):
        engine.prefill([1] * 257)
    assert engine.n_kv == 0


@pytest.mark.parametrize("ids", [[], [300], [-1]])
def test_bad_ids_are_refused(engine, ids: list[int]) -> None:
    with pytest.raises(UsageError):
        engine.prefill(ids)


def test_rewind_forgets(engine) -> None:
    first = engine.prefill([1, 2, 3])
    engine.decode(4)
    engine.rewind(0)
    assert np.array_equal(engine.prefill([1, 2, 3]), first)
    with pytest.raises(UsageError, match="rewind"):
        engine.rewind(4)


def test_text_needs_a_tokenizer(engine) -> None:
    assert engine.tokenizer is None
    with pytest.raises(UsageError, match="tokenizer"):
        next(engine.generate("hello", 1))


def test_closing_ends_the_rank_threads() -> None:
    before = threading.active_count()
    with mlacli.load(V3, device="cpu,cpu,cpu", split_mode="graph") as engine:
        engine.prefill([1])
        assert threading.active_count() == before + 3
    assert threading.active_count() == before


def test_timings_count_tokens(engine) -> None:
    list(engine.generate_ids([1, 2, 3], 4))
    t = engine.timings
    assert (t.n_prompt, t.n_decoded) == (3, 3)
    assert 0 < t.prompt_s <= t.ttft_s and t.decode_s > 0 and t.load_s > 0


def test_a_tiny_budget_of_float32_copies_gives_the_same_logits() -> None:
    # The cache of unpacked weights may hold nothing, some or all of them.
    from mlacli.backends.numpy_ops import NumpyOps

    plain, results = NumpyOps.__init__, []
    for budget in (0, 20_000, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NumpyOps, "__init__", lambda s, c, x, _, b=budget: plain(s, c, x, b))
            with mlacli.load(V3) as engine:
                results.append(engine.logits(list(range(40))))
                cache = engine._ranks.ops[0].cache
                assert cache.used <= budget
                assert (cache.used > 0) == (budget > 0)
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[2])


def test_errors_before_load_are_ours(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "x.gguf", tmp_path / "none.gguf", tmp_path):
        with pytest.raises(MlacliError):
            mlacli.load(path)


def test_logits_come_ubatch_by_ubatch() -> None:
    ids = [i * 7 % 200 for i in range(90)]
    with mlacli.load(V3, ctx_size=256, ubatch_size=32, batch_size=64) as engine:
        whole = engine.logits(ids)
        engine.rewind(0)
        parts = list(engine.stream_logits(ids, 40))
        assert [len(p) for p in parts] == [0, 24, 26]
        assert engine.n_kv == 90
    assert np.array_equal(np.concatenate(parts), whole[40:])


@pytest.mark.parametrize("mode", ["none", "layer", "graph"])
def test_the_residual_is_shown_after_every_layer(mode) -> None:
    ids = [3, 1, 4, 1, 5]
    with mlacli.load(V3, ctx_size=256, device="cpu,cpu", split_mode=mode) as engine:
        plain = engine.logits(ids)
        seen: dict[int, np.ndarray] = {}
        engine.watch = lambda layer, residual: seen.update({layer: residual.copy()})
        assert np.array_equal(engine.logits(ids), plain), "watching changes nothing"
        hp, last = engine.prepared.hparams, engine._weights[-1]
        assert sorted(seen) == list(range(hp.n_layer))
        ops = engine._ops(0 if mode != "layer" else 1)
        x = ops.rms_norm(seen[hp.n_layer - 1], last.output_norm, hp.eps)
        if mode != "graph":  # there a rank has a part of the vocabulary
            assert np.array_equal(ops.matmul(x, last.output), plain)
        assert not np.array_equal(seen[0], seen[1])


def test_a_closed_engine_says_so() -> None:
    for flags in ({}, {"device": "cpu,cpu", "split_mode": "graph"}):
        with mlacli.load(V3, **flags) as engine:
            pass
        engine.close()
        for call in (lambda e: e.logits([1]), lambda e: e.decode(1), lambda e: e.tokenizer):
            with pytest.raises(UsageError, match="closed"):
                call(engine)


def test_a_generation_that_lost_its_cache_says_so(engine) -> None:
    for other in (lambda: list(engine.generate_ids([3, 4], 2)), lambda: engine.logits([5, 6, 7])):
        first = engine.generate_ids([1, 2], 9)
        next(first)
        other()
        with pytest.raises(UsageError, match="another call used the engine"):
            next(first)


def test_sampling_words_add_to_those_of_load() -> None:
    with mlacli.load(temp=0, ctx_size=256) as engine:
        greedy = "".join(engine.generate("Once upon a time", 12))
        assert "".join(engine.generate("Once upon a time", 12, top_k=40)) == greedy
        assert len(list(engine.generate("Once", 400, temp=1, seed=1, ignore_eos=True))) > 200


def blas_threads() -> set[int]:
    from threadpoolctl import threadpool_info

    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_threads_are_those_of_the_last_open_engine_and_come_back() -> None:
    before = blas_threads()
    first, second = mlacli.load(V3, threads=1), mlacli.load(V3, threads=2)
    assert blas_threads() == {2}
    second.close()
    assert blas_threads() == {1}
    first.close()
    assert blas_threads() == before


def test_an_engine_that_is_dropped_lets_go_of_its_threads() -> None:
    before = threading.active_count()
    for _ in range(3):
        mlacli.load(V3, device="cpu,cpu", split_mode="graph").prefill([1, 2])
    gc.collect()
    assert threading.active_count() == before
