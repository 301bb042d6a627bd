"""How fast this host will decode, from two measured rates: unpacking a type and a large product."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Any

import numpy as np

from mlacli.loading.quant_types import QType
from mlacli.loading.weights import to_float32
from mlacli.parallel.memory import active_elements
from mlacli.parallel.plan import RankPlan, ShardPlan


def predict_tps(plan: ShardPlan, hp: Any) -> float:
    """Tokens a second: active weights over the product rate, uncached ones unpacked each time.

    Ranks share the host's memory, so their times add up.
    """
    seconds = 0.0
    for rank in plan.ranks:
        share = _cached_share(rank, plan)
        for shard in plan.of_rank(rank.rank):
            n = active_elements(shard, hp)
            seconds += n * (_product_seconds() + (1 - share) * _unpack_seconds(shard.qtype))
    return 1 / max(seconds, 1e-9)


def _cached_share(rank: RankPlan, plan: ShardPlan) -> float:
    wanted = sum(4 * math.prod(s.shape) for s in plan.of_rank(rank.rank) if s.qtype.name != "F32")
    return min(1.0, rank.dequant / wanted) if wanted else 1.0


@cache
def _product_seconds() -> float:
    """Seconds per element of a float32 matrix-vector product larger than the caches."""
    w, x = np.ones((4096, 2048), np.float32), np.ones(2048, np.float32)
    return _best(lambda: w @ x) / w.size


@cache
def _unpack_seconds(qtype: QType) -> float:
    """Seconds per element of unpacking `qtype`."""
    if qtype.name == "F32":
        return 0.0
    n = 1 << 18
    raw = np.zeros((64, qtype.row_bytes(n // 64)), np.uint8)
    return _best(lambda: to_float32(raw, qtype)) / n


def _best(work: Any) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
