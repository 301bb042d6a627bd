"""Prefill's products on the GPU (wgmma on compute capability 9.0) against NumPy.

Widths are forced so that small cases reach every one; sizes are odd on purpose.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from kit import gemm_cases as cases
from kit.simt_device import Launcher
from kit.tiled import TILED

from mlacli.backends import cuda_gemm as gemm

NS, WIDTHS = (9, 33, 64, 100, 513), (32, 64, 96, 128)


@pytest.fixture(scope="module")
def device():
    from mlacli.backends.cuda_device import CudaDevice

    return CudaDevice("cuda0", 1 << 30)


@pytest.fixture
def ops(device):
    mark = device.mark()
    yield Launcher(device)
    device.rewind(mark)


def held(reports: Iterator[cases.Report], rounded: float, exact: float = 1e-6) -> None:
    for case, near, far, where in reports:
        # a float16 result may be rounded the other way after sums in another order
        bar = max(rounded, 1e-8) if "half" in case else rounded
        assert near <= bar and far <= exact, f"{case}: {near:.2g}, {far:.2g}, {where}"


@pytest.mark.parametrize("name", TILED)
def test_dense(ops, monkeypatch, name) -> None:
    i = TILED.index(name)
    monkeypatch.setattr(gemm, "_width", lambda *_: WIDTHS[i % 4])
    wide = name in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
    cols, skip = (288, 32) if wide else (200, 0)
    held(cases.dense(ops, (name,), (300,), cols, NS[i % 5], skip, i), 1e-10)


def test_several_weights_with_one_input(ops) -> None:
    held(cases.dense(ops, ("Q4_K", "Q8_0"), (520, 300), 512, 200, 0, 20), 1e-10)
    held(cases.dense(ops, ("Q4_K", "Q8_0", "F16"), (520, 300, 70), 256, 70, 0, 21), 1e-10)


def test_heads(ops) -> None:
    held(cases.per_head(ops, "Q8_0", 5, 72, 192, 70, 22), 1e-10)


@pytest.mark.parametrize("width", WIDTHS)
def test_gated(ops, monkeypatch, width) -> None:
    monkeypatch.setattr(gemm, "_width", lambda *_: width)
    held(cases.swiglu(ops, ("Q4_K", "Q6_K"), 300, 512, 200, 23), 1e-8)


def test_experts(ops) -> None:
    held(cases.routed(ops, ("Q4_K", "Q4_K", "Q5_0"), 513, 6, 16, 512, 352, 24), 1e-8)
    held(cases.routed(ops, ("Q6_K", "Q6_K", "Q8_0"), 100, 3, 9, 256, 96, 25, (2, 5), True), 1e-8)


def test_sorting(ops) -> None:
    for seed in range(3):
        cases.sorting(ops, 300, 6, 20, 3, 11, seed)
        cases.sorting(ops, 2048, 8, 256, 0, 256, seed)


def test_rows_and_scores(ops) -> None:
    held(cases.rows(ops, 33, 2048, 26), 1e-12)
    held(cases.rows(ops, 5, 77, 27), 1e-12)
    held(cases.scores(ops, 100, 70, 2048, 28), 1e-12)


def test_two_runs_give_the_same_bits(ops) -> None:
    rng = np.random.default_rng(29)
    w = cases.Weight(ops, "Q4_K", (512, 512), rng)
    x16 = cases.put16(ops, rng.standard_normal((200, 512), np.float32))
    runs = []
    for _ in range(2):
        y = ops.put(np.zeros((200, 512), np.float32))
        gemm.products(ops, [(w.held, y)], x16)
        runs.append(ops.get(y))
    assert (runs[0] == runs[1]).all()
