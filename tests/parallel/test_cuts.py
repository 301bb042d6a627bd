"""Largest remainder and contiguous cuts, by their definitions."""

import itertools
import random

import pytest

from mlacli.parallel.cuts import cut, largest_remainder


@pytest.mark.parametrize(
    ("n", "shares", "counts"),
    [
        (16, [1, 1], [8, 8]),
        (16, [3, 1], [12, 4]),
        (5, [1, 1], [3, 2]),  # a tie goes to the lower rank
        (20, [1, 1, 1], [7, 7, 6]),
        (20, [0, 1, 1], [0, 10, 10]),
        (20, [1, 0], [20, 0]),
        (3, [1] * 5, [1, 1, 1, 0, 0]),
        (10, [0.55, 0.25, 0.2], [6, 2, 2]),  # remainders .5 .5 0: again the lower rank
        (0, [1, 1], [0, 0]),
        (7, [80, 80, 24], [3, 3, 1]),
    ],
)
def test_largest_remainder(n, shares, counts):
    assert largest_remainder(n, shares) == counts


def test_counts_are_fair():
    """Each count is its exact quota rounded down or up, counts add up, no share means no unit."""
    rng = random.Random(0)
    for _ in range(2000):
        n = rng.randrange(500)
        shares = [rng.choice((0, rng.random(), rng.randrange(1, 100))) for _ in range(9)]
        if not sum(shares):
            continue
        counts = largest_remainder(n, shares)
        assert sum(counts) == n
        for count, share in zip(counts, shares, strict=True):
            quota = n * share / sum(shares)
            assert -1e-9 < count - int(quota - 1e-9) <= 1 + 1e-9
            assert share > 0 or count == 0


@pytest.mark.parametrize("unit", [1, 4, 32])
@pytest.mark.parametrize("n", [0, 1, 31, 1408, 1536, 129280])
def test_ranges_are_contiguous_on_edges(n, unit):
    """Ranges follow one another from 0 to n; inner edges are multiples of the unit."""
    for shares in ([1], [1, 1, 1], [3, 0, 1, 0, 2], [1] * 7):
        ranges = cut(n, shares, unit)
        assert len(ranges) == len(shares) and ranges[0][0] == 0 and ranges[-1][1] == n
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop == start and (stop % unit == 0 or stop == n)
        for (start, stop), share in zip(ranges, shares, strict=True):
            assert start <= stop and (share or start == stop)


def test_zero_width_ranks():
    """44 units of 32 over 64 ranks: the last twenty get nothing, nobody more than one unit."""
    widths = [b - a for a, b in cut(1408, [1] * 64, 32)]
    assert widths == [32] * 44 + [0] * 20
