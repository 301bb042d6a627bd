"""Dividing whole units over shares: largest remainder, lower rank first on ties."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Range = tuple[int, int]

COLUMN_EDGE = 32  # column cuts of every quant type fall on multiples of this


def largest_remainder(n: int, shares: Sequence[float]) -> list[int]:
    """`n` units dealt out in proportion to `shares`; the counts add up to n."""
    total = sum(shares)
    wanted = [n * share / total for share in shares]
    counts = [int(x) for x in wanted]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - wanted[i], i))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


def cut(n: int, shares: Sequence[float], unit: int = 1) -> list[Range]:
    """[0, n) as one contiguous range per share, on edges of `unit`; the last may be ragged."""
    edges, at = [0], 0
    for count in largest_remainder(-(-n // unit), shares):
        at += count * unit
        edges.append(min(at, n))
    return list(itertools.pairwise(edges))
