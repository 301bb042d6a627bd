"""Products of weights in GGUF bytes: the kernels' arithmetic on the CPU (kit/simt.h).

Weakest link: simt.h's mma, which sums in float64.
"""

import numpy as np
import pytest
from kit import raw_cases as cases
from kit.simt import why_not
from kit.simt_device import SimtDevice

from mlacli.backends import cuda_raw
from mlacli.parallel import cuda_sizes

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
FEW = 1e-9  # x keeps 16 bits of its mantissa, everything else 24
MANY = 1e-6  # float16 inputs: 4.5e-8 each


@pytest.fixture
def ops():
    return cases.RawOps(SimtDevice())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", cases.RARE)
def test_every_type(ops, rng, name) -> None:
    assert cases.dense(ops, rng, name, 1, 512, 37) < FEW


def test_a_block_of_two_ranks_and_the_residual(ops, rng) -> None:
    assert cases.dense(ops, rng, "IQ2_XXS", 1, 352, 40, skip=96, add=True) < FEW


def test_rows_in_several_passes(ops, rng) -> None:
    assert cases.dense(ops, rng, "Q3_K", 1, 2560, 21) < FEW


@pytest.mark.parametrize(("rows", "share"), [(300, 1), (40, 2), (16, 4)])
def test_warps_that_share_rows(rng, monkeypatch, rows, share) -> None:
    """In several rounds, with spans that come out uneven and row tiles past the end."""
    monkeypatch.setattr(cuda_raw, "TUNED", (4, 1))
    ops, geometry, shares = cases.RawOps(SimtDevice(n_sm=1)), cuda_raw.geometry, set()

    def noted(*args, **more):
        how = geometry(*args, **more)
        shares.add(how.share)
        return how

    monkeypatch.setattr(cuda_raw, "geometry", noted)
    assert cases.dense(ops, rng, "IQ2_S", 1, 1280, rows) < FEW
    assert shares == {share}
    case = cases.Experts(("IQ2_S", "IQ2_S", "IQ2_S"), 1, 3, 5, d=512, f=768, first=1)
    assert cases.experts(ops, rng, case) < FEW


def test_several_tokens(ops, rng) -> None:
    assert cases.dense(ops, rng, "IQ1_S", 5, 256, 33) < FEW


def test_types_that_have_tiles_elsewhere(ops, rng) -> None:
    assert cases.dense(ops, rng, "Q5_1", 1, 352, 20) < FEW


def test_heads(ops, rng) -> None:
    assert cases.heads(ops, rng, "IQ2_S", 1, 3, 256, 40) < FEW


@pytest.mark.parametrize(
    "case",
    [
        cases.Experts(("IQ2_XS", "IQ2_XS", "IQ3_S"), f=256),
        cases.Experts(("IQ3_XXS", "", "Q2_K"), first=1, here=4, add=True),
        cases.Experts(("IQ1_M", "IQ1_M", "Q5_0"), n=1, f=96),
        cases.Experts(("Q2_K", "Q4_K", "Q2_K"), n=1, f=160, skip=32),
    ],
    ids=["plain", "merged, of a rank", "down of another kind", "of two types"],
)
def test_experts(ops, rng, case) -> None:
    assert cases.experts(ops, rng, case) < FEW


def test_warps_left_without_work(rng) -> None:
    """A row tile's warps are shared out for all chosen experts, of which only some are here."""
    ops = cases.RawOps(SimtDevice(n_sm=132))
    for here in (1, 5):
        case = cases.Experts(("Q3_K", "Q3_K", "Q3_K"), 1, 3, 7, d=256, f=768, first=1, here=here)
        assert cases.experts(ops, rng, case) < FEW


class Ordered(SimtDevice):
    """Notes launches, and where what follows waits for all before it to have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def follow(self, other) -> None:
        assert other is self
        self.order.append("follow")

    def launch(self, name: str, *args, **how) -> None:
        self.order.append(name)
        super().launch(name, *args, **how)


def test_products_wait_for_the_tiles_that_they_read(rng) -> None:
    """gemm_split.cu reads weights before the kernel that ran last has ended."""
    device = Ordered()
    ops = cases.RawOps(device)
    assert cases.dense(ops, rng, "Q2_K", 9, 256, 40) < MANY
    case = cases.Experts(("IQ1_S", "IQ1_S", "Q3_K"), n=9, f=256)
    assert cases.experts(ops, rng, case) < MANY
    after = [b for a, b in zip(device.order, device.order[1:], strict=False) if a == "unpack_tiles"]
    assert after == ["follow", "unpack_tiles", "follow", "follow"], device.order


def test_many_tokens_in_parts(ops, rng, monkeypatch) -> None:
    monkeypatch.setattr(cuda_sizes, "_UNPACKED", 1)
    assert cases.dense(ops, rng, "IQ3_S", 9, 512, 300) < MANY
    assert cases.dense(ops, rng, "Q2_K", 9, 160, 40, skip=64, add=True) < MANY


def test_many_tokens_of_experts(ops, rng, monkeypatch) -> None:
    monkeypatch.setattr(cuda_sizes, "_UNPACKED", 1 << 20)  # some of them at a time
    case = cases.Experts(("IQ2_XXS", "IQ2_XXS", "IQ4_NL"), n=12, f=96, first=2, here=3)
    assert cases.experts(ops, rng, case) < MANY
    assert cases.experts(ops, rng, cases.Experts(("IQ1_S", "", "Q3_K"), n=9, f=256)) < MANY
