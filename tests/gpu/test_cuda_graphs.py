"""Captured steps of toy models: what replays must not depend on, and several steps a launch."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.golden_files import FILES, golden

import mlacli
from mlacli.params import SamplingParams
from mlacli.sampling import Sampler

NAMES = ("v2lite", "v3", "real_rows", "glm_dsa")
GREEDY = SamplingParams(seed=1, temp=0.0)
DRAWN = SamplingParams(seed=7, temp=0.8, top_k=40, top_p=0.95, min_p=0.05)


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: Any) -> Iterator[tuple[Any, list[int]]]:
    tokens, _ = golden(request.param)
    with mlacli.load(FILES[request.param], device="cuda0") as engine:
        yield engine, tokens


def decoded(engine: Any, tokens: list[int]) -> np.ndarray:
    engine.rewind(0)
    return np.stack([engine.decode(token) for token in tokens])


def test_the_same_tokens_give_the_same_bits_run_after_run(loaded: Any) -> None:
    engine, tokens = loaded
    runs = [(engine.logits(tokens), decoded(engine, tokens)) for _ in range(3)]
    for prefilled, singly in runs[1:]:
        assert np.array_equal(prefilled, runs[0][0])
        assert np.array_equal(singly, runs[0][1])


def test_replays_after_unrelated_allocations_and_frees(loaded: Any) -> None:
    import cupy as cp

    engine, tokens = loaded
    want = engine.logits(tokens), decoded(engine, tokens)
    held = []
    for i in range(8):
        held.append(cp.full((1 + i) << 20, cp.nan, cp.float32))
        if i % 3 == 2:
            held.clear()
            cp.get_default_memory_pool().free_all_blocks()
    cp.cuda.Device().synchronize()
    assert np.array_equal(engine.logits(tokens), want[0])
    assert np.array_equal(decoded(engine, tokens), want[1])


def test_capture_allocates_nothing(loaded: Any) -> None:
    """New graphs, of decode, prefill and several steps, while every allocation raises."""
    import cupy as cp

    def refuse(nbytes: int) -> Any:
        raise AssertionError(f"{nbytes} bytes asked for")

    engine, tokens = loaded
    engine.logits(tokens)
    (stage,) = engine._ranks.steps(()).stages
    kept, stage.graphs = stage.graphs, {}
    cp.cuda.set_allocator(refuse)
    try:
        with pytest.raises(AssertionError, match="asked for"):
            cp.empty(1)
        got = engine.logits(tokens), decoded(engine, tokens)
        assert len(engine.decode_ahead(3, 4, Sampler(GREEDY))) == 4
        assert len(stage.graphs) >= 3
    finally:
        cp.cuda.set_allocator(cp.get_default_memory_pool().malloc)
        stage.graphs = kept
    assert np.array_equal(engine.logits(tokens), got[0])
    assert np.array_equal(decoded(engine, tokens), got[1])


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_eight_steps_in_one_launch_are_eight_launches(loaded: Any, params: SamplingParams) -> None:
    engine, tokens = loaded

    def begun() -> Any:
        engine.rewind(0)
        engine.prefill(tokens[:20])
        return Sampler(params)

    def on_the_host(token: int, n: int) -> Iterator[int]:
        for _ in range(n):
            token = sampler.next(engine.decode(token), engine.n_kv)
            yield token

    def ahead(n_at_once: int) -> list[int]:
        found = [tokens[20]]
        while len(found) < 17:
            found += engine.decode_ahead(found[-1], n_at_once, sampler)
        return found[1:]

    sampler = begun()
    want = list(on_the_host(tokens[20], 16))
    begun()
    assert ahead(1) == want
    begun()
    assert ahead(8) == want
    assert len(set(want)) > 1


def test_logits_after_several_steps_are_those_after_single_ones(loaded: Any) -> None:
    """Cache rows that eight steps in one launch left serve as those of single steps."""
    engine, tokens = loaded
    engine.rewind(0)
    drawn = engine.decode_ahead(tokens[0], 8, Sampler(GREEDY))
    after = engine.decode(drawn[-1])
    assert np.array_equal(decoded(engine, [tokens[0], *drawn])[-1], after)


@pytest.mark.parametrize("n", [3, 9, 13, 23, 39])
def test_a_prompt_of_odd_length_is_its_tokens_one_by_one(loaded: Any, n: int) -> None:
    """Padded to a bucket; rows after it hold NaN."""
    engine, tokens = loaded
    fill_cache(engine, np.nan)
    want = decoded(engine, tokens[:n])
    fill_cache(engine, np.nan)
    got = engine.logits(tokens[:n])
    assert np.isfinite(got).all()
    error = nmse(got, want)
    print(f"n {n}: {error:.1e}")
    assert error <= 2e-5  # float16 activations, see test_cuda_models.py
    after = engine.decode(tokens[n % 40])
    assert np.isfinite(after).all()


def fill_cache(engine: Any, value: float) -> None:
    engine.rewind(0)
    device = engine._ops(0).device
    cache = engine._caches[0]
    held = [layer.rows.values for layer in cache.rows.values()]
    held += [rows.values for rows in cache.index_rows.values()]
    for rows in held:
        device.copy_in(rows, np.full(rows.shape, value, rows.dtype))
    device.synchronize()


_RUN = """
import sys, hashlib, mlacli
from kit.golden_files import FILES, golden
for name in sys.argv[1:]:
    tokens, _ = golden(name)
    with mlacli.load(FILES[name], device="cuda0") as engine:
        prefilled, n = engine.logits(tokens), engine.rewind(0)
        parts = [prefilled, *(engine.decode(token) for token in tokens)]
    print(name, hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
"""


def test_without_programmatic_launches_the_bits_are_the_same() -> None:
    said = []
    for pdl in ("1", "0"):
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"MLACLI_PDL": pdl, "PYTHONPATH": path}
        command = [sys.executable, "-c", _RUN, *NAMES]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert len(said[0]) == len(NAMES) and said[0] == said[1]
