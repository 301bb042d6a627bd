"""What two sweeps say about each other: ratios by depth, and where one overtakes the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True)
class Point:
    """Speeds at one depth, tokens a second; None where the row failed."""

    n_kv: int
    speed_pp: float | None
    speed_tg: float | None


@dataclass(frozen=True, slots=True)
class Overtaking:
    """From this depth on `ahead` is faster than `behind`, until the next one says otherwise."""

    n_kv: int
    ahead: str
    behind: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """`mode` against `base`: speed ratios (above 1: `mode` is faster) by depth."""

    mode: str
    base: str
    n_kv: tuple[int, ...]
    pp: tuple[float | None, ...]
    tg: tuple[float | None, ...]

    @property
    def name(self) -> str:
        return f"{self.mode}/{self.base}"

    def overtakings(self, ratios: Sequence[float | None]) -> list[Overtaking]:
        """Each depth at which the faster of the two is another one than at the depth before."""
        found, leader = [], ""
        for n_kv, ratio in zip(self.n_kv, ratios, strict=True):
            if ratio is None or ratio == 1:
                continue
            ahead, behind = (self.mode, self.base) if ratio > 1 else (self.base, self.mode)
            if leader and ahead != leader:
                found.append(Overtaking(n_kv, ahead, behind))
            leader = ahead
        return found


def compare(series: Mapping[str, Iterable[Point]]) -> list[Comparison]:
    """Every pair of modes, at the depths that both have."""
    by_depth = {mode: {p.n_kv: p for p in points} for mode, points in series.items()}
    out = []
    for base, mode in combinations(by_depth, 2):
        a, b = by_depth[base], by_depth[mode]
        depths = sorted(a.keys() & b.keys())
        pp = tuple(_ratio(b[n].speed_pp, a[n].speed_pp) for n in depths)
        tg = tuple(_ratio(b[n].speed_tg, a[n].speed_tg) for n in depths)
        out.append(Comparison(mode, base, tuple(depths), pp, tg))
    return out


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
