"""Products of few tokens: the kernels' arithmetic on the CPU (kit/simt.h), against float64.

Weakest link: simt.h's mma, which sums in float64. Small shapes; tests/gpu/test_cuda_matvec.py has
every type and real sizes.
"""

import numpy as np
import pytest
from kit import few_tokens as few
from kit import sent_cases as sent
from kit.launcher import Launcher
from kit.raw_cases import RARE
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends.cuda_geometry import DownGeometry, Geometry, PieceGeometry, StreamGeometry
from mlacli.models.parts import Routing

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

BAR = 1e-9  # x keeps 16 bits of its mantissa, everything else 24


@pytest.fixture(scope="module")
def ops() -> Launcher:
    return Launcher(SimtDevice(n_sm=2, capability=90))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_three_weights_of_one_normed_x(ops, rng) -> None:
    segments = [("Q4_0", 37), ("Q8_0", 21), ("Q5_1", 16)]
    assert few.products(ops, rng, 1, 320, segments, normed=True, geometry=Geometry(2, 2)) < BAR


@pytest.mark.parametrize("name", RARE)
def test_types_of_few_bits(ops, rng, name) -> None:
    """By one token, several, the ring and whole row tiles."""
    assert few.products(ops, rng, 1, 288, [(name, 37)], skip=96, geometry=Geometry(2, 1)) < BAR
    assert few.products(ops, rng, 3, 256, [(name, 20)], add=True) < BAR
    how = Geometry(2, 1, 1, 1, 2)
    assert few.products(ops, rng, 1, 768, [(name, 40)], normed=True, geometry=how) < BAR
    assert few.product_stream(ops, rng, 512, name, 100, False, StreamGeometry(2, 1, 2)) < BAR


def test_another_ranks_columns_and_the_residual(ops, rng) -> None:
    how = Geometry(2, 1, 1, 1)  # several batches, two row tiles, the last of them past the end
    assert few.products(ops, rng, 1, 160, [("Q6_K", 37)], add=True, skip=32, geometry=how) < BAR


@pytest.mark.parametrize(
    "name, n_in, skip", [("Q4_K", 2048, 0), ("Q6_K", 400, 96), ("Q5_1", 352, 0), ("BF16", 200, 0)]
)
def test_weights_through_the_ring(ops, rng, name, n_in, skip) -> None:
    how = Geometry(4 if n_in == 2048 else 2, 4 if n_in == 2048 else 2, 1, 1, 2)
    segments, normed = [(name, 50)], skip == 0
    assert few.products(ops, rng, 1, n_in, segments, normed, skip=skip, geometry=how) < BAR


@pytest.mark.parametrize("name, n_in, normed", [("Q6_K", 512, True), ("Q5_1", 320, False)])
def test_a_large_weight_row_tile_by_row_tile(ops, rng, name, n_in, normed) -> None:
    assert few.product_stream(ops, rng, n_in, name, 150, normed, StreamGeometry(2, 1, 2)) < BAR


@pytest.mark.parametrize("add", [False, True])
def test_wide_weights_by_pieces(ops, rng, add) -> None:
    segments = [("Q4_K", 70)] if add else [("Q4_K", 37), ("Q4_K", 50)]
    how = PieceGeometry(2, 2, 3, 4)
    assert few.products(ops, rng, 1, 512, segments, not add, add, geometry=how) < BAR


def test_a_wide_gated_product_by_pieces(ops, rng) -> None:
    assert few.gated(ops, rng, 1, 320, 70, "Q5_1", "Q8_0", geometry=PieceGeometry(1, 5, 3, 1)) < BAR


@pytest.mark.parametrize(
    "case, up, down",
    [
        (few.Experts(("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q5_K", "Q8_0"), d=512, f=64, fs=128),
         PieceGeometry(2, 2, 3, 4), PieceGeometry(1, 5, 4, 1)),
        (few.Experts(("Q4_0", "", "Q6_K"), None, f=256, first=1, held=5, add=True, after_up=False),
         PieceGeometry(2, 2, 3, 2), PieceGeometry(2, 3, 2, 4)),
    ],
    ids=["shared", "a part, merged"],
)  # fmt: skip
def test_wide_experts_by_pieces(ops, rng, case, up, down) -> None:
    assert max(few.experts(ops, rng, case, up, down)) < BAR


def test_experts_through_the_ring(ops, rng) -> None:
    case = few.Experts(("Q4_K", "", "Q5_0"), None, f=40, first=1, held=5)
    assert max(few.experts(ops, rng, case, Geometry(2, 1, 1, 1, 3), DownGeometry(2, 0, 2))) < BAR


def test_several_tokens(ops, rng) -> None:
    assert few.products(ops, rng, 3, 320, [("MXFP4", 37)], True, geometry=Geometry(2, 2)) < BAR


def test_gated_product(ops, rng) -> None:
    assert few.gated(ops, rng, 1, 256, 37, "Q4_K", "IQ4_XS", geometry=Geometry(2, 1, 1, 1)) < BAR


def test_experts_with_a_shared_one(ops, rng) -> None:
    case = few.Experts(("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q5_K", "Q8_0"))
    assert max(few.experts(ops, rng, case, Geometry(2, 2, 1, 1), DownGeometry(1, 2, 2))) < BAR


def test_merged_experts_of_a_part_of_the_ranks(ops, rng) -> None:
    case = few.Experts(
        ("Q4_0", "", "Q6_K"), None, n=2, f=40, first=1, held=5, skip=32, add=True, padded=True
    )
    assert max(few.experts(ops, rng, case, Geometry(2, 2), DownGeometry(2, 0, 2))) < BAR


@pytest.mark.parametrize(
    "routing", [Routing(4, False), Routing(3, True, 4, 2, True, 2.5)], ids=["softmax", "groups"]
)
def test_route(ops, rng, routing) -> None:
    padded = routing.sigmoid
    assert few.route(ops, rng, 1 + padded, 64, 32, routing, bias=padded, padded=padded) < BAR


@pytest.mark.parametrize("case, how", [
    ((2, 0, 4), Geometry(2, 2, 1, 2)), ((3, 1, 7), Geometry(2, 2, 1, 1, 2)), ((2, 1, 0), None),
])  # fmt: skip
def test_a_product_sends_what_it_would_store(ops, rng, case, how) -> None:
    sent.product(ops, rng, case, "Q6_K", 150, 400, 32, how)


@pytest.mark.parametrize("case, after_up, shared", [
    ((2, 1, 3), False, None), ((4, 2, 4), True, "Q8_0"),
])  # fmt: skip
def test_experts_send_what_they_would_store(ops, rng, case, after_up, shared) -> None:
    how = DownGeometry(2, 0 if shared is None else 2, 2)
    sent.experts(ops, rng, case, ("Q4_K", shared), after_up=after_up, geometry=how)


def test_an_error_in_a_weight_is_seen(ops, rng, monkeypatch) -> None:
    """The bar holds the kernels to something: one per mille on x breaks it."""
    inputs = few.inputs

    def bent(*args):
        x, values, norm = inputs(*args)
        return x, values * 1.001, norm

    monkeypatch.setattr(few, "inputs", bent)
    assert few.products(ops, rng, 3, 320, [("MXFP4", 37)], True, geometry=Geometry(2, 2)) > BAR
