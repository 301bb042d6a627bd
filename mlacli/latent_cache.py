"""LatentCache: what one rank keeps of past tokens; every rank with heads has its own.

Row j of a layer belongs to position j, so rewinding is only a smaller count (kept by the engine).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlacli.attention_forms import CachePart
from mlacli.ops import Act, LayerCache, Ops, Step, Weight


class LatentCache:
    """The planned `parts` for each layer held by this rank."""

    def __init__(
        self, ops: Ops, layers: Iterable[int], n_ctx: int, parts: Iterable[CachePart]
    ) -> None:
        def new(part: CachePart) -> Any:
            return ops.new_rows(n_ctx, part.width, part.cache_type, part.transposed)

        self.n_ctx, parts = n_ctx, tuple(parts)
        self.rows = {il: LayerCache(**{part.name: new(part) for part in parts}) for il in layers}

    def store(
        self, ops: Ops, layer: int, c_kv: Act, k_pe: Act, k_b: Weight, v_b: Weight, step: Step
    ) -> None:
        """Write the tokens of `step` at their positions; k_b and v_b expand them under -mla 0."""
        assert step.n_kv <= self.n_ctx, "the engine checks the context before a step"
        ops.store_kv(self.rows[layer], c_kv, k_pe, k_b, v_b, step)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.rows.values())
