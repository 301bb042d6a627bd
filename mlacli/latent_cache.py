"""LatentCache: one rank's latent rows and index keys; every rank with heads keeps its own copy.

Row j of a layer belongs to position j, so rewinding is only a smaller count (kept by the engine).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlacli.ops import Act, Ops, Step


class LatentCache:
    """Rows [n_ctx, r + p] per layer held by this rank: c_kv (normed), then k_pe (rotated).

    `index_rows` hold the index keys of layers that choose rows (`add_index`).
    """

    def __init__(
        self, ops: Ops, layers: Iterable[int], n_ctx: int, width: int, cache_type: str
    ) -> None:
        self.n_ctx = n_ctx
        self.rows: dict[int, Any] = {il: ops.new_rows(n_ctx, width, cache_type) for il in layers}
        self.index_rows: dict[int, Any] = {}

    def add_index(self, ops: Ops, full: Sequence[bool], width: int, cache_type: str) -> None:
        """Index keys [n_ctx, width] for those of this rank's layers that are `full`."""
        for il in self.rows:
            if full[il]:
                self.index_rows[il] = ops.new_rows(self.n_ctx, width, cache_type)

    def store(self, ops: Ops, layer: int, c_kv: Act, k_pe: Act, step: Step) -> None:
        """Write one row per token of `step` at its position."""
        assert step.n_kv <= self.n_ctx, "the engine checks the context before a step"
        ops.store(self.rows[layer], c_kv, k_pe, step)

    def store_index(self, ops: Ops, layer: int, keys: Act, step: Step) -> None:
        """Write one index key per token of `step` at its position."""
        ops.store_index(self.index_rows[layer], keys, step)

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for held in (self.rows, self.index_rows) for rows in held.values())
