"""LatentCache: what one rank keeps of past tokens; every rank with heads has its own.

Row j of a layer belongs to position j, so rewinding is only a smaller count (kept by the engine).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlacli.attention_forms import CachePart
from mlacli.ops import LayerCache, Ops


class LatentCache:
    """The planned `parts` for each layer held by this rank.

    `index_rows` hold the index keys of layers that choose rows (`add_index`).
    """

    def __init__(
        self, ops: Ops, layers: Iterable[int], n_ctx: int, parts: Iterable[CachePart]
    ) -> None:
        def new(part: CachePart) -> Any:
            return ops.new_rows(n_ctx, part.width, part.cache_type, part.transposed)

        self.n_ctx, parts = n_ctx, tuple(parts)
        self.rows = {il: LayerCache(**{part.name: new(part) for part in parts}) for il in layers}
        self.index_rows: dict[int, Any] = {}

    def add_index(self, ops: Ops, full: Sequence[bool], width: int, cache_type: str) -> None:
        """Index keys [n_ctx, width] for those of this rank's layers that are `full`."""
        for il in self.rows:
            if full[il]:
                self.index_rows[il] = ops.new_index_rows(self.n_ctx, width, cache_type)

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in (*self.rows.values(), *self.index_rows.values()))
