"""Expanded prefill on Hopper against float64, with and without the kernels' roundings."""

from dataclasses import replace

import numpy as np
import pytest
from kit.launcher import Launcher
from kit.prefill_cases import (
    GLM_FLASH,
    MISTRAL,
    TOY,
    V2_LITE,
    Attention,
    Case,
    compare,
    few,
    inputs,
    run,
)

from mlacli.models.parts import Temperature

V2_CASE = Case(few(V2_LITE, 3), 200, 1000, n_padded=5)
CASES = {
    "toy sizes": Case(TOY, 130, 40, n_padded=3),
    "first tokens, one head": Case(few(V2_LITE, 1), 128, 0),
    "sharp": replace(V2_CASE, sharp=6.0),
    "five heads, a quarter padded": Case(few(V2_LITE, 5), 512, 3000, n_padded=128),
    "bf16 cache": replace(V2_CASE, cache="bf16"),
    "f32 cache": replace(V2_CASE, cache="f32"),
    "q8_0 cache": replace(V2_CASE, cache="q8_0"),
    "quantised weights": replace(V2_CASE, weights=("Q8_0", "Q4_0")),
    "weights in tiles": replace(V2_CASE, weights=("Q8_0", "Q5_1"), tiled=True),
    "GLM-4.7-Flash": Case(few(GLM_FLASH, 5), 200, 700, n_padded=8),
    "Mistral-4, tempered": Case(few(MISTRAL, 3), 130, 300, temperature=Temperature(0.2, 64)),
    "two chunks": Case(few(V2_LITE, 3), 512, 9000, n_padded=30),
    "three chunks, shared items": Case(few(GLM_FLASH, 3), 512, 17000),
    "all heads of a ubatch": Case(V2_LITE, 2048, 2048),
    "32k rows": Case(few(V2_LITE, 2), 2048, 30720),
}


@pytest.fixture(autouse=True)
def needs_hopper(launcher: Launcher) -> None:
    if launcher.capability != 90:
        pytest.skip("expanded prefill is for compute capability 9.0")


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_float64(ops: Launcher, name: str) -> None:
    case = CASES[name]
    x = inputs(case)
    exact, rounded, worst = compare(case, x, run(ops, case, x), n_tokens=40)
    assert exact <= 1e-6, worst
    # Where a product lies next to two float16 values, another order of sums takes the other one;
    # the result is rounded too. Weights in tiles are rounded after scaling.
    assert rounded <= (5e-7 if case.tiled else 1e-7), worst


def test_one_percent_of_a_key_weight_shows(ops: Launcher) -> None:
    case = CASES["sharp"]
    x = inputs(case)
    got = run(ops, case, x)
    x.k_b.values = x.k_b.values * np.float32(1.01)
    assert compare(case, x, got, n_tokens=40)[0] > 1e-5


def test_a_captured_step_serves_other_depths_bit_for_bit(ops: Launcher) -> None:
    """The graph of one n_kv, replayed with the positions and rows of another."""
    deep, flat = Case(few(V2_LITE, 3), 256, 3000), Case(few(V2_LITE, 3), 256, 100, n_padded=50)
    flat = replace(flat, n_free=deep.n_kv + deep.n_free - flat.n_kv)
    x, y = inputs(deep), inputs(flat, seed=1)
    y.k_b, y.v_b = x.k_b, x.v_b
    attention = Attention(ops, deep, x)
    o = attention()
    once, outs = ops.get(o), []
    replay = ops.device.capture(lambda: outs.append(attention()))
    replay()
    assert np.array_equal(once, ops.get(outs[0]))
    attention.refill(y)
    replay()
    exact, _, worst = compare(flat, y, attention.result(outs[0]), n_tokens=40)
    assert exact <= 1e-6, worst
