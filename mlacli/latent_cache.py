"""LatentCache: one rank's latent rows, layer by layer; every rank with heads keeps its own copy.

Row j of a layer belongs to position j, so rewinding is only a smaller count (kept by the engine).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlacli.ops import Act, Ops, Step


class LatentCache:
    """Rows [n_ctx, r + p] per layer held by this rank: c_kv (normed), then k_pe (rotated)."""

    def __init__(
        self, ops: Ops, layers: Iterable[int], n_ctx: int, width: int, cache_type: str
    ) -> None:
        self.n_ctx = n_ctx
        self.rows: dict[int, Any] = {il: ops.new_rows(n_ctx, width, cache_type) for il in layers}

    def store(self, ops: Ops, layer: int, c_kv: Act, k_pe: Act, step: Step) -> None:
        """Write one row per token of `step` at its position."""
        assert step.n_kv <= self.n_ctx, "the engine checks the context before a step"
        ops.store(self.rows[layer], c_kv, k_pe, step)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())
