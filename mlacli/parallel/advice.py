"""How fast a plan will decode, from bytes and measured rates: what `devices` advises by.

It is for the order of the modes, not for figures: a layer's launches count as one constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mlacli.parallel.memory import active_elements
from mlacli.parallel.plan import ShardPlan

# One H200, 2026-11-22: V2-Lite takes 1139 us a token, 45 of them for the head, 355 for the bytes of
# its 27 layers at 4.3 TB/s.
LAYER_US = 27.0
HOP_US = 15.0  # from one stage of a pipeline to the next: a launch and a copy of a row


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes a second of a GPU's memory, and microseconds of a sum by floats; an H200's at first."""

    memory: float = 4.3e12
    sums: Mapping[int, float] = field(
        default_factory=lambda: MappingProxyType({2048: 2.2, 7168: 2.4})
    )

    def sum_us(self, n: int) -> float:
        """Between and beyond the measured sizes in a straight line."""
        (n0, t0), (n1, t1) = sorted(self.sums.items())[:: max(1, len(self.sums) - 1)][:2]
        return max(0.0, t0 + (t1 - t0) * (n - n0) / (n1 - n0))


def token_us(plan: ShardPlan, hp: Any, speeds: Speeds, n_kv: int = 0) -> float:
    """Microseconds of one token's forward at a cache of `n_kv` rows."""
    busy: list[float] = []
    for rank in plan.ranks:
        nbytes = 0.0
        for shard in plan.of_rank(rank.rank):
            used = active_elements(shard, hp) / max(1, math.prod(shard.shape))
            nbytes += shard.bytes_on(rank.kind) * used
        busy.append((nbytes + rank.cache * n_kv / max(1, plan.n_ctx)) / speeds.memory * 1e6)
    layers = LAYER_US * hp.n_layer
    if plan.mode != "graph":
        return float(sum(busy) + layers + HOP_US * (len(plan.ranks) - 1))
    n = len(plan.ranks)
    sums = 2 * hp.n_layer * speeds.sum_us(hp.d) + speeds.sum_us(hp.n_vocab // n)
    return float(max(busy) + layers + (sums if n > 1 else 0.0))
