"""Prefill's products on the GPU (wgmma on compute capability 9.0) against NumPy.

Forms are forced so that small cases reach every one; sizes are odd on purpose.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kit import gemm_cases as cases
from kit.launcher import Launcher
from kit.tiled import TILED, qtype_of

from mlacli.backends import cuda_gemm as gemm

NS, WIDTHS = (9, 33, 64, 100, 513), (32, 64, 96, 128)
WIDE = [name for name in TILED if qtype_of(name).block == 256]
# What a product's CTAs are, bar, check, arguments
Case = tuple[int | gemm.Form, float, Callable[..., Any], tuple[Any, ...]]
SHARED = [
    gemm.Form(tokens, tokens, parts, 3 - parts, cluster)
    for tokens, parts, cluster in (
        (32, 1, 2), (64, 1, 4), (64, 1, 8), (32, 2, 8), (64, 2, 2), (96, 2, 4), (128, 2, 8)
    )
]  # fmt: skip
CASES: dict[str, Case] = {
    name: (WIDTHS[i % 4], 1e-10, cases.dense,
           ((name,), (300,), 544 if name in WIDE else 456, NS[i % 5],
            32 if name in WIDE else 0, i))
    for i, name in enumerate(TILED)
} | {
    "two weights": (128, 1e-10, cases.dense, (("Q4_K", "Q8_0"), (520, 300), 512, 200, 0, 20)),
    "three weights": (
        64, 1e-10, cases.dense, (("Q4_K", "Q8_0", "F16"), (520, 300, 70), 256, 70, 0, 21)
    ),
    **{
        f"{name} shared {form}": (form, 1e-10, cases.dense, (types, (300, 70), cols, 130, 0, 30))
        for form in SHARED
        for name, types, cols in (
            ("narrow", ("F16", "Q8_0"), 520), ("wide", ("Q4_K", "Q6_K"), 2304)
        )
    },
    **{
        f"gated shared {form}": (form, 1e-8, cases.swiglu, (("Q4_K", "Q6_K"), 300, 2304, 130, 31))
        for form in SHARED
    },
    "heads shared": (SHARED[2], 1e-10, cases.per_head, ("Q8_0", 5, 72, 512, 70, 22)),
    "heads": (64, 1e-10, cases.per_head, ("Q8_0", 5, 72, 192, 70, 22)),
    **{f"gated {width}": (width, 1e-8, cases.swiglu, (("Q4_K", "Q6_K"), 300, 512, 200, 23))
       for width in WIDTHS},
    "experts": (128, 1e-8, cases.routed, (("Q4_K", "Q4_K", "Q5_0"), 513, 6, 16, 512, 352, 24)),
    "merged experts of a rank": (
        128, 1e-8, cases.routed, (("Q6_K", "Q6_K", "Q8_0"), 100, 3, 9, 256, 96, 25, (2, 5), True)
    ),
    "few slots of an expert": (
        128, 1e-8, cases.routed, (("Q4_K", "Q4_K", "Q5_0"), 64, 6, 64, 512, 352, 32)
    ),
    "few slots of a rank": (
        128, 1e-8, cases.routed, (("Q6_K", "Q5_K", "F16"), 33, 3, 9, 256, 96, 33, (2, 7))
    ),
    "some slots of an expert": (
        128, 1e-8, cases.routed, (("Q4_K", "Q4_K", "Q5_0"), 200, 6, 32, 512, 352, 35)
    ),
    "some slots of a rank": (
        128, 1e-8, cases.routed, (("Q6_K", "Q5_K", "F16"), 100, 3, 9, 256, 96, 36, (2, 7))
    ),
    "scores of few": (128, 1e-12, cases.scores, (33, 70, 2052, 34)),
    "rows": (128, 1e-12, cases.rows, (33, 2048, 26)),
    "ragged rows": (128, 1e-12, cases.rows, (5, 77, 27)),
    "scores": (128, 1e-12, cases.scores, (100, 70, 2048, 28)),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled(launcher: Launcher) -> None:
    """All kernels of the cases, at once."""
    device, choose = launcher.device, gemm._form
    mark = device.mark()
    with device.prepared(), np.errstate(all="ignore"):
        for form, _, check, arguments in CASES.values():
            if not possible(device, form):
                continue
            gemm._form = forced(form)
            list(check(launcher, *arguments))
            device.rewind(mark)
    gemm._form = choose


def possible(device: Any, form: int | gemm.Form) -> bool:
    """Clusters are for one compute capability alone."""
    return isinstance(form, int) or device.capability == 90


def forced(form: int | gemm.Form) -> Callable[..., gemm.Form]:
    """A _form() that says so; a number is the tokens of an item of one CTA."""
    return lambda *_: gemm.Form(form) if isinstance(form, int) else form


@pytest.mark.parametrize("name", CASES)
def test_products(ops, monkeypatch, name) -> None:
    form, bar, check, arguments = CASES[name]
    if not possible(ops.device, form):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(gemm, "_form", forced(form))
    for case, near, far, where in check(ops, *arguments):
        # a float16 result may be rounded the other way after sums in another order
        rounded = max(bar, 1e-8) if "half" in case else bar
        assert near <= rounded and far <= 1e-6, f"{case}: {near:.2g}, {far:.2g}, {where}"


def test_sorting(ops) -> None:
    for seed in range(3):
        cases.sorting(ops, 300, 6, 20, 3, 11, seed)
        cases.sorting(ops, 2048, 8, 256, 0, 256, seed)
        cases.sorting(ops, 64, 6, 64, 0, 64, seed, tile=32)
        cases.sorting(ops, 512, 6, 64, 0, 64, seed, tile=64)


@pytest.mark.parametrize("form", [128, *SHARED], ids=str)
def test_two_runs_give_the_same_bits(ops, monkeypatch, form) -> None:
    if not possible(ops.device, form):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(gemm, "_form", forced(form))
    rng = np.random.default_rng(29)
    w = cases.Weight(ops, "Q4_K", (512, 512), rng)
    x16 = cases.put16(ops, rng.standard_normal((200, 512), np.float32))
    runs = []
    for _ in range(2):
        y = ops.put(np.zeros((200, 512), np.float32))
        gemm.products(ops, [(w.held, y)], x16)
        runs.append(ops.get(y))
    assert (runs[0] == runs[1]).all()


@pytest.mark.parametrize("n", [64, 120, 300])  # tiles of 32, 64 and 128 slots
def test_places_among_an_experts_slots_change_nothing(ops, n) -> None:
    first, *others = cases.crowded(ops, n, 35)
    assert np.abs(first).max() > 0
    assert all((first == other).all() for other in others)
