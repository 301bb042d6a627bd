"""Prefill's products run on the CPU in their mma.sync form (kit/simt.h) against NumPy.

Weakest link: kit/tiled.py's rounding, which test_tiles.py holds against the unpacking.
"""

import numpy as np
import pytest
from kit import gemm_cases as cases
from kit.launcher import Launcher
from kit.raw_cases import RARE
from kit.simt import why_not
from kit.simt_device import SimtDevice
from kit.tiled import qtype_of

from mlacli.backends.cuda_weights import CudaWeight
from mlacli.loading.tiles import tiled_shape

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def ops():
    return Launcher(SimtDevice())


def held(reports, rounded: float = 1e-10, exact: float = 1e-6) -> None:
    for case, near, far, where in reports:
        assert near <= rounded and far <= exact, f"{case}: {near:.2g}, {far:.2g}, {where}"


@pytest.mark.parametrize(
    ("types", "rows", "cols", "n", "skip"),
    [
        (("Q4_K",), (300,), 256, 33, 0),
        (("Q6_K", "Q8_0"), (40, 272), 256, 9, 0),
        (("Q5_K",), (16,), 160, 33, 32),
        (("F16", "Q5_1", "BF16"), (8, 40, 16), 72, 9, 0),
    ],
)
def test_dense(ops, types, rows, cols, n, skip) -> None:
    held(cases.dense(ops, types, rows, cols, n, skip, 1))


@pytest.mark.parametrize("name", RARE)
def test_types_of_few_bits(ops, name) -> None:
    held(cases.dense(ops, (name,), (40,), 288, 9, 32, 4))


def test_heads(ops) -> None:
    held(cases.per_head(ops, "Q8_0", 3, 24, 64, 9, 2))


def test_gated(ops) -> None:
    held(cases.swiglu(ops, ("Q4_K", "Q6_K"), 136, 256, 40, 3), rounded=1e-8)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_forms_that_share_columns(ops, monkeypatch, parts) -> None:
    """Alone, as clusters need a GPU: one CTA has all columns."""
    form = cases.gemm.Form(32, 32, parts, 1, cluster=1)
    monkeypatch.setattr(cases.gemm, "_form", lambda *_: form)
    held(cases.dense(ops, ("Q6_K", "Q8_0"), (140, 22), 256, 41, 0, 8))
    held(cases.swiglu(ops, ("Q4_K", "Q6_K"), 70, 256, 40, 9), rounded=1e-8)


@pytest.mark.parametrize(("held_experts", "merged"), [(None, False), ((1, 2), True)])
@pytest.mark.parametrize("n", [100, 40, 27])  # tiles of 128, 64 and 32 slots
def test_experts(ops, held_experts, merged, n) -> None:
    types = ("Q4_0", "Q4_0" if merged else "IQ4_NL", "Q8_0")
    held(cases.routed(ops, types, n, 2, 4, 64, 32, 4, held_experts, merged), rounded=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_sorting(ops, seed) -> None:
    cases.sorting(ops, 300, 6, 20, 3, 11, seed)
    cases.sorting(ops, 7, 1, 64, 0, 64, seed)
    cases.sorting(ops, 100, 2, 20, 3, 11, seed, tile=32)
    cases.sorting(ops, 300, 2, 20, 3, 11, seed, tile=64)


def test_rows(ops) -> None:
    for d in (77, 1028, 8200):
        held(cases.rows(ops, 3, d, 5), rounded=1e-12)


def test_scores(ops) -> None:
    held(cases.scores(ops, 19, 70, 132, 6), rounded=1e-12)


@pytest.mark.parametrize("n", [9, 64, 100, 257, 512, 2048])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "F16"])
@pytest.mark.parametrize(("rows", "cols"), [((3072, 576), 2048), ((515,), 256), ((2048,), 11008)])
def test_forms_fit_the_device(n, name, rows, cols) -> None:
    """Clusters wait for their CTAs: all must have room at once, on the device and in an SM."""
    gemm, device = cases.gemm, SimtDevice(132, 90)
    weights = [weight_of(name, (r, cols)) for r in rows]
    steps = cols // 64
    form = gemm._form(Launcher(device), weights, n, rows, steps, steps)
    items = sum(-(-r // (128 * form.parts)) for r in rows) * -(-n // form.tokens)
    stages = gemm._stages(Launcher(device), weights, form)
    if form.cluster:
        assert form.cluster <= steps and form.most == form.tokens
        assert items * form.cluster <= 132 * form.ctas
    else:
        assert form.most == 128
    shared = 1024 + stages * (gemm._stage_bytes(weights, form) + 16)
    assert form.ctas * (shared + 1024 + 512) <= 228 << 10, "as an SM of Hopper has"
    device.capability = 80
    assert not gemm._form(Launcher(device), weights, n, rows, steps, steps).cluster


def weight_of(name: str, shape: tuple[int, int]) -> CudaWeight:
    """Its sizes alone."""
    q = qtype_of(name)
    return CudaWeight("w", shape, q, None, tiled_shape(shape, q, 0), 0, 0)


def test_a_changed_weight_is_seen(ops) -> None:
    """The bars would catch one wrong weight row of many."""
    rng = np.random.default_rng(7)
    w = cases.Weight(ops, "Q8_0", (64, 64), rng)
    x = rng.standard_normal((9, 64), np.float32)
    y = ops.put(np.zeros((9, 64), np.float32))
    cases.gemm.products(ops, [(w.held, y)], cases.put16(ops, x))
    w.rounded[5] *= 1.001
    got, want = ops.get(y), cases.rounded16(x) @ w.rounded.T
    assert cases.nmse(got, want) > 1e-10
