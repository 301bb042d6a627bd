"""Full-width models, one dense and two routed layers, on random cache rows, against NumPy.

Default precision: float16 cache and -gap f16, which NumPy rounds alike. Choices of experts and rows
are NumPy's; its own may differ where NumPy's scores are closer than the error (kit/imposed.py).
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.full_width import VOCAB, cut, fill, opened
from kit.imposed import Judge, of_numpy

from mlacli.backends.cuda_steps import FEW

# As in test_cuda_models.py: float16 inputs of prefill's products; -gap f16 in decode, where a value
# next to two float16 values may be rounded to the other one.
ACTIVATIONS, DECODE_HALF = 2e-5, 2e-6
SMALL, BIG = ("v2lite", "glm47flash"), ("mistral4", "v3", "glm5")
DEPTHS = (0, 1023, 1024, 16384)
SLOW_NUMPY = {("v2lite", 512, 16384), ("glm47flash", 512, 16384), ("glm47flash", 512, 1023)} | {
    (name, 512, depth) for name in BIG for depth in DEPTHS[1:]
}  # what takes NumPy more than about three seconds on 16 cores


@pytest.fixture(scope="module", params=SMALL + BIG)
def engines(request: Any) -> Iterator[tuple[str, Any, Any]]:
    preset, start = cut(request.param), time.perf_counter()
    with (
        opened(preset, "cpu", ctx_size=17408) as cpu,
        opened(preset, "cuda0", ctx_size=17408) as gpu,
    ):
        print(f"\n{request.param}: opened in {time.perf_counter() - start:.1f} s")
        yield request.param, cpu, gpu


def check(engines: Any, n: int, depth: int) -> None:
    name, cpu, gpu = engines
    tokens = np.random.default_rng(n + depth).integers(0, VOCAB, n).tolist()
    fill((cpu, gpu), depth, seed=depth)
    start = time.perf_counter()
    with of_numpy() as choices:
        want = cpu.prefill(tokens, all_rows=True)
    seconds = time.perf_counter() - start
    judge, bar = Judge(choices), DECODE_HALF if n <= FEW else ACTIVATIONS
    with judge.imposing(gpu):
        got = gpu.prefill(tokens, all_rows=True)
    gpu.rewind(depth)
    alone = gpu.prefill(tokens, all_rows=True)  # captured
    error = nmse(got, want)
    print(f"{name} {n} on {depth}: {error:.1e} (alone {nmse(alone, want):.1e}), ", end="")
    print(f"{judge.check(bar)}; NumPy {seconds:.1f} s")
    assert error <= bar
    if not judge.n_other:
        assert nmse(alone, got) <= bar


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("n", [1, 33])
def test_few_tokens(engines: Any, n: int, depth: int) -> None:
    check(engines, n, depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_whole_ubatch(engines: Any, depth: int) -> None:
    if (engines[0], 512, depth) in SLOW_NUMPY:
        pytest.skip("NumPy takes long: test_a_whole_ubatch_at_any_depth")
    check(engines, 512, depth)


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_whole_ubatch_at_any_depth(engines: Any, depth: int) -> None:
    check(engines, 512, depth)
