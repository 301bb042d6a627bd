"""Products of few tokens on a GPU: every tiled type and real sizes, against float64."""

import numpy as np
import pytest
from kit import few_tokens as few
from kit.tiled import TILED, qtype_of

from mlacli.backends.cuda_geometry import STREAM, Geometry, StreamGeometry
from mlacli.models.parts import Routing

BAR = 1e-9  # x keeps 16 bits of its mantissa, everything else 24
V2L, V3 = Routing(6, False), Routing(8, True, 8, 4, True, 2.5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("name", TILED)
def test_every_type(ops, rng, name, n) -> None:
    n_in = {256: 1024, 32: 992, 1: 1000}[qtype_of(name).block]
    assert few.products(ops, rng, n, n_in, [(name, 205)], normed=n != 3, add=n == 3) < BAR


@pytest.mark.parametrize("name", ["Q4_K", "IQ1_S"])
@pytest.mark.parametrize("scale", [1e5, 1.0, 1e-6])
def test_any_size_of_x(ops, rng, name, scale) -> None:
    assert few.products(ops, rng, 1, 2048, [(name, 64)], scale=scale) < BAR


@pytest.mark.parametrize("n", [1, 2])
def test_several_weights_of_one_x(ops, rng, n) -> None:
    segments = [("Q4_K", 3072), ("Q8_0", 576), ("Q5_1", 40)]
    assert few.products(ops, rng, n, 2048, segments, normed=True) < BAR


@pytest.mark.parametrize(
    "case",
    [
        (1, 2048, ("Q6_K", 12000), Geometry(8, 4, 1, 1)),  # a CTA has many row tiles
        (1, 10944, ("Q8_0", 512), None),  # x doesn't fit shared memory
        (1, 768, ("Q4_K", 5120), None),
        (1, 7168, ("Q4_K", 1536), None),
        (1, 5120, ("IQ4_XS", 300), None),
        (5, 1536, ("Q5_K", 1000), None),
        (1, 2048, ("IQ1_S", 8000), None),  # as int8 from here on
        (1, 2048, ("IQ1_M", 8000), None),
        (1, 2048, ("IQ2_XXS", 8000), None),
        (1, 2048, ("IQ2_S", 8000), Geometry(8, 4, 1, 1, 2)),
        (1, 7168, ("IQ1_S", 5000), None),
    ],
    ids=str,
)
def test_shapes_of_models(ops, rng, case) -> None:
    n, n_in, segment, how = case
    assert few.products(ops, rng, n, n_in, [segment], normed=n == 1, geometry=how) < BAR


@pytest.mark.parametrize(
    "case",
    [("Q6_K", 2048, 102400), ("Q5_1", 1024, 30005), ("IQ1_M", 2048, 30000), ("IQ2_S", 2048, 30000)],
    ids=str,
)
def test_a_large_weight(ops, rng, case) -> None:
    name, n_in, rows = case
    if ops.capability < 90:
        pytest.skip("needs bulk copies")
    for how in (STREAM, StreamGeometry(4, 3, 2)):
        assert few.product_stream(ops, rng, n_in, name, rows, True, how) < BAR


@pytest.mark.parametrize(
    "case",
    [
        (7168, [("Q4_K", 1536), ("Q4_K", 576)], True, False),
        (8192, [("Q4_K", 7168)], False, True),
        (9216, [("Q6_K", 7168)], False, False),
        (7168, [("Q6_K", 9000)], True, False),
    ],
    ids=str,
)
def test_wide_weights_by_pieces(ops, rng, case) -> None:
    n_in, segments, normed, add = case
    assert few.products(ops, rng, 1, n_in, segments, normed, add) < BAR


def test_a_wide_gated_product_by_pieces(ops, rng) -> None:
    assert few.gated(ops, rng, 1, 7168, 4000, "Q4_K", "Q4_K") < BAR


def test_another_ranks_columns(ops, rng) -> None:
    assert few.products(ops, rng, 1, 1376, [("Q6_K", 300)], skip=160) < BAR


@pytest.mark.parametrize("n", [1, 5])
def test_gated_product(ops, rng, n) -> None:
    assert few.gated(ops, rng, n, 2048, 1000, "Q4_K", "Q5_K") < BAR


EXPERTS = {
    "V2-Lite": few.Experts(
        ("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q5_K", "Q6_K"), d=512, f=352, fs=768, n_used=6
    ),
    "tokens": few.Experts(
        ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q5_K", "Q8_0"), n=5, d=512, f=320, fs=512, skip=160,
        n_used=4, first=2, held=4, padded=True, add=True, after_up=False,
    ),
    "merged": few.Experts(("Q4_K", "", "Q5_0"), None, d=512, f=96),
    "up mid-tile": few.Experts(("Q4_K", "", "F16"), None, d=512, f=90),
}  # fmt: skip


WIDE = {
    "up": few.Experts(
        ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q6_K"), d=7168, f=256, fs=256, n_experts=9,
        first=2, held=5, n_used=8,
    ),
    "down": few.Experts(
        ("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q4_K"), d=2304, f=1024, fs=1024, n_experts=9,
        first=2, held=5, n_used=8, add=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_wide_experts_by_pieces(ops, rng, case) -> None:
    assert max(few.experts(ops, rng, case)) < BAR


@pytest.mark.parametrize("case", EXPERTS.values(), ids=EXPERTS)
def test_experts(ops, rng, case) -> None:
    assert max(few.experts(ops, rng, case)) < BAR


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    "size, routing, bias, imposed",
    [
        ((64, 2048), V2L, False, False),
        ((256, 7168), V3, True, False),
        ((160, 5120), Routing(6, False, 8, 3, False, 16.0), False, False),
        ((64, 2048), Routing(4, True, 1, 1, True, 1.8), True, True),
    ],
    ids=["V2-Lite", "V3", "V2", "imposed"],
)
def test_route(ops, rng, n, size, routing, bias, imposed) -> None:
    n_experts, d = size
    error = few.route(ops, rng, n, d, n_experts, routing, bias=bias, padded=n > 1, imposed=imposed)
    assert error < BAR


def test_experts_of_few_bits(ops, rng) -> None:
    types = ("IQ1_S", "IQ2_XXS", "IQ1_M")
    case = few.Experts(types, types, d=512, f=768, fs=768, n_experts=9, first=2, held=5, n_used=8)
    assert max(few.experts(ops, rng, case, Geometry(2, 4, 1, 1))) < BAR


def test_twice_the_same_bits(ops) -> None:
    def once() -> float:
        return few.products(ops, np.random.default_rng(3), 1, 2048, [("Q4_K", 3000)], normed=True)

    assert once() == once()
