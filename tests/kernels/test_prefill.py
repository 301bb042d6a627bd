"""Expanded prefill's kernels run on the CPU, through the host code that launches them on a GPU.

Weakest link: kit/warpgroup_sim.h, which knows no missing fence or wait and reads shared memory as
warpgroup.cuh says that hardware does; tests/gpu/test_cuda_prefill.py has the hardware.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kit.prefill_cases import (
    GLM_FLASH,
    MISTRAL,
    TOY,
    V2_LITE,
    Case,
    Weight,
    compare,
    few,
    inputs,
    run,
)
from kit.prefill_sim import SimulatedOps

from mlacli import expanded_sizes
from mlacli.backends import cuda_prefill
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_prefill import Sizes, attend_expanded, takes
from mlacli.expanded_sizes import scratch_bytes, step_kind
from mlacli.models.parts import Temperature
from mlacli.ops import Step

CUDA = [Path(os.environ.get(f"CUDA_{x}", "/usr/local/cuda")) / "include" for x in ("PATH", "HOME")]
SMALL = Sizes(2, 32, 16, 8, 16)
QUICK = {
    "quantised weights in tiles, padded": Case(
        replace(SMALL, r=64, k=32, v=32), 129, 40, n_padded=3, weights=("Q8_0", "Q5_1"), tiled=True
    ),
}
SLOW = {
    "q8_0 cache": Case(replace(SMALL, h=1), 128, 90, cache="q8_0"),
    "V2-Lite": Case(few(V2_LITE, 1), 128, 170, sharp=6.0),
    "GLM-4.7-Flash": Case(few(GLM_FLASH, 1), 140, 100, n_padded=20),
    "Mistral-4, tempered": Case(
        few(MISTRAL, 3), 130, 200, n_padded=3, temperature=Temperature(0.3, 64)
    ),
    "raw weights": Case(TOY, 128, 0, weights=("F16", "F16")),
    "f32 cache": Case(TOY, 128, 60, cache="f32"),
    "bf16 cache": Case(TOY, 128, 60, cache="bf16"),
}


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], SimulatedOps]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the kernels with")
    cuda = next((f for f in CUDA if (f / "crt" / "host_defines.h").exists()), None)
    if cuda is None:
        pytest.skip("no CUDA toolkit: simt.h needs its headers")
    folder = tmp_path_factory.mktemp("prefill")
    return lambda n_sm: SimulatedOps(folder, str(cuda), n_sm)


def check(ops: SimulatedOps, case: Case) -> None:
    x = inputs(case)
    exact, rounded, worst = compare(case, x, run(ops, case, x))
    assert exact <= 1e-6, worst
    assert rounded <= (5e-7 if case.tiled else 1e-7), worst  # the result is rounded too


@pytest.mark.parametrize("name", QUICK)
def test_attention_is_that_of_float64(simulated: Callable[..., SimulatedOps], name: str) -> None:
    check(simulated(4), QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_real_sizes_and_types(simulated: Callable[..., SimulatedOps], name: str) -> None:
    check(simulated(4), SLOW[name])


def test_chunks_and_shared_items_are_merged(
    simulated: Callable[..., SimulatedOps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks, and two CTAs for the rows of an item; some tokens see the first chunk only."""
    monkeypatch.setattr(expanded_sizes, "CHUNK", 256)
    monkeypatch.setattr(expanded_sizes, "LEAST_CHUNK", 128)
    monkeypatch.setattr(cuda_prefill, "_splits", lambda *_: 2)
    ops = simulated(1)  # one CTA expands all in turn
    check(ops, Case(replace(SMALL, h=1), 300, 250, n_padded=10, sharp=6.0))
    names = ["mla_prefill_inputs", *["mla_expand", "mla_prefill"] * 3, "mla_prefill_merge"]
    assert ops.launched == names


def test_one_percent_of_a_key_weight_shows(simulated: Callable[..., SimulatedOps]) -> None:
    case = Case(replace(SMALL, h=1), 128, 0, sharp=6.0)
    x = inputs(case)
    got = run(simulated(4), case, x)
    x.k_b = Weight(x.k_b.name, x.k_b.raw, x.k_b.values * np.float32(1.01))
    assert compare(case, x, got)[0] > 1e-5


class Scratch:
    """`cuda_prefill.Launcher` that runs nothing, counts bytes and keeps what was launched."""

    n_sm = 132

    def __init__(self) -> None:
        self.nbytes = 0
        self.launches: list[tuple[Any, ...]] = []

    def new(self, shape: tuple[int, ...], dtype: Any = "f4") -> Array:
        array = Array.dense(0, shape, dtype)
        self.nbytes += -(-array.nbytes // 256) * 256
        return array

    def run(self, *launch: Any, **defines: Any) -> None:
        plain = (x for x in launch if not isinstance(x, Array))
        self.launches.append((*plain, *sorted(defines.items())))


def attended(sizes: Sizes, n: int, n_ctx: int, n_kv: int) -> Scratch:
    """What attention of `n` tokens takes and launches."""
    ops, none = Scratch(), Array.dense(0, (1,), np.float32)
    rows = Array.dense(0, (n_ctx, sizes.r + sizes.p), np.float16)
    kv = SimpleNamespace(cache_type="f16", values=rows, scales=None)
    w: Any = SimpleNamespace(tiles=none, qtype=SimpleNamespace(id=8))
    q = Array.dense(0, (n, sizes.h * (sizes.k + sizes.p)), np.float32)
    step = Step(none, none, none, none, n, n_kv, ())
    attend_expanded(ops, q, kv, w, w, step, sizes, 1.0)
    return ops


@pytest.mark.parametrize("sizes", [V2_LITE, GLM_FLASH, MISTRAL, TOY, few(V2_LITE, 128)])
@pytest.mark.parametrize("n", [128, 300, 2048])
def test_the_plan_pays_for_all_scratch(sizes: Sizes, n: int) -> None:
    n_ctx = 40960
    taken = [attended(sizes, n, n_ctx, n_kv).nbytes for n_kv in range(n, n_ctx + 1, 509)]
    assert max(taken) <= scratch_bytes(sizes, n, n_ctx) < 2 * max(taken) + (1 << 22)


@pytest.mark.parametrize("heads", [1, 5, 20, 32, 128])
@pytest.mark.parametrize("n, n_ctx", [(128, 700), (512, 5000), (512, 40960), (2048, 40960)])
def test_steps_of_a_kind_launch_the_same(n: int, n_ctx: int, heads: int) -> None:
    """A captured step's key knows the model, no rank: it tells apart what fewer heads launch."""
    model, rank = few(GLM_FLASH, 128), few(GLM_FLASH, heads)
    launched: dict[tuple[int, bool], list[tuple[Any, ...]]] = {}
    for n_kv in (*range(n // 2, 4 * n, n // 8), *range(4 * n, n_ctx, 509), n_ctx):
        launches = attended(rank, n, n_ctx, min(n_kv, n_ctx)).launches
        kind = step_kind(model, n, n_ctx, min(n_kv, n_ctx))
        assert launched.setdefault(kind, launches) == launches
    assert len(launched) > 1


def test_a_step_far_down_shares_its_rows_among_more_ctas() -> None:
    """Its 64 items alone would leave half of 132 SMs idle."""
    grids = [
        [one[1] for one in attended(V2_LITE, 512, 16384, n_kv).launches if one[0] == "mla_prefill"]
        for n_kv in (512, 8192)
    ]
    assert grids == [[(64, 1)], [(64, 2)]]


def test_sizes_that_are_not_taken() -> None:
    assert takes(90, V2_LITE) and takes(90, GLM_FLASH) and takes(90, MISTRAL) and takes(90, TOY)
    assert not takes(80, V2_LITE)  # no warpgroup products
    assert not takes(100, V2_LITE)  # others there
    assert not takes(90, replace(V2_LITE, k=100))
    assert not takes(90, replace(V2_LITE, v=264))
    assert not takes(90, replace(V2_LITE, r=640))  # shared memory of the expansion
