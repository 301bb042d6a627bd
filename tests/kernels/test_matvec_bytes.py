"""One token's products with IQ1 and IQ2 as int8 (matvec_bytes.cuh), by kit/simt.h, against float64.

The bar tells them from the products of two bfloat16, which these types fall back on where few row
tiles meet x: those differ from float64 by 1e-11.
"""

import numpy as np
import pytest
from kit import few_tokens as few
from kit.launcher import Launcher
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends.cuda_geometry import DownGeometry, Geometry, PieceGeometry, StreamGeometry

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

BAR = 1e-12  # x has 21 bits and a sign, by the largest value near it
TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")


@pytest.fixture(scope="module")
def ops() -> Launcher:
    return Launcher(SimtDevice(n_sm=2, capability=90))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(8)


@pytest.mark.parametrize("name", TYPES)
def test_dense(ops, rng, name) -> None:
    """Another rank's columns and x from shared memory, x in registers through a ring, a stream."""
    how = Geometry(2, 1, 1, 1)
    assert few.products(ops, rng, 1, 288, [(name, 75)], skip=96, add=True, geometry=how) < BAR
    how = Geometry(2, 2, 1, 1, 2)
    assert few.products(ops, rng, 1, 256, [(name, 75)], normed=True, geometry=how) < BAR
    assert few.product_stream(ops, rng, 512, name, 75, True, StreamGeometry(2, 1, 2)) < BAR


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS"])
def test_x_in_registers(ops, rng, name) -> None:
    how = Geometry(2, 4, 1, 1)
    assert few.products(ops, rng, 1, 416, [(name, 75)], normed=True, geometry=how) < BAR


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS"])
def test_wide_weights_by_pieces(ops, rng, name) -> None:
    how = PieceGeometry(2, 2, 3, 4)
    assert few.products(ops, rng, 1, 512, [(name, 70)], True, geometry=how) < BAR


@pytest.mark.parametrize("gate, up, bar", [("IQ1_S", "IQ2_S", BAR), ("IQ1_M", "Q4_K", 1e-9)])
def test_two_types_of_one_x(ops, rng, gate, up, bar) -> None:
    """Both as bytes; one of them, which then takes x as the other does."""
    assert few.gated(ops, rng, 1, 512, 37, gate, up, geometry=Geometry(2, 1, 1, 1)) < bar


@pytest.mark.parametrize("shared, bar", [("IQ2_XS", 3 * BAR), ("Q4_K", 1e-9)])
def test_experts_by_pieces(ops, rng, shared, bar) -> None:
    case = few.Experts(("IQ1_M", "IQ1_S", "IQ2_XXS"), (shared,) * 3, d=512, f=256, fs=256)
    up, down = PieceGeometry(2, 2, 3, 4), PieceGeometry(2, 4, 4, 4)
    assert max(few.experts(ops, rng, case, up, down)) < bar


def test_experts_through_the_ring(ops, rng) -> None:
    """h by bytes, y not."""
    case = few.Experts(("IQ1_S", "", "IQ1_M"), None, d=512, f=256, first=1, held=5)
    how = Geometry(2, 1, 1, 1, 3), DownGeometry(2, 0, 2)
    of_h, of_y = few.experts(ops, rng, case, *how)
    assert of_h < BAR and of_y < 1e-9


@pytest.mark.parametrize("stages", [0, 2])
def test_experts_with_x_in_registers(ops, rng, stages) -> None:
    case = few.Experts(("IQ2_S", "IQ1_M", "Q4_K"), None, f=80)
    how = Geometry(2, 2, 1, 1, stages), DownGeometry(2, 0, 2)
    of_h, of_y = few.experts(ops, rng, case, *how)
    assert of_h < BAR and of_y < 1e-9


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_any_size_of_x(ops, rng, scale) -> None:
    how = Geometry(2, 1, 1, 1)
    assert few.products(ops, rng, 1, 512, [("IQ1_S", 70)], scale=scale, geometry=how) < BAR


def product(
    ops: Launcher, rng: np.random.Generator, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of x, and float64."""
    w, y = few.weight(ops, rng, "IQ1_M", (70, len(x))), ops.new((1, 70))
    few.few.products(ops, [(w, y)], ops.put(x[None]), geometry=Geometry(2, 2, 1, 1))
    return ops.get(y)[0], w.values @ x.astype(np.float64)


def test_x_of_zeros(ops, rng) -> None:
    assert not product(ops, rng, np.zeros(512, np.float32))[0].any()


def test_one_large_value(ops, rng) -> None:
    """Its neighbours have few bits left; what they add is small as well."""
    x = rng.standard_normal(512).astype(np.float32)
    x[::64] *= 1000
    got, want = product(ops, rng, x)
    assert few.nmse(got, want) < BAR


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_no_number_stays_none(ops, rng, odd) -> None:
    x = rng.standard_normal(512).astype(np.float32)
    x[100] = odd
    assert not np.isfinite(product(ops, rng, x)[0]).any()
