"""LayerWatch: a rank's ops that also show the residual stream after every layer.

Comparing two runs layer by layer needs no word in the model files: a layer's second
`reduce_add_norm` is its end (two reductions a layer, in every architecture).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlacli.ops import Act, Ops, Weight

Watcher = Callable[[int, Any], None]  # (layer, residual [n, d] on the host)


class LayerWatch:
    """`ops` for one forward pass that begins at layer `first`; everything else is handed on."""

    def __init__(self, ops: Ops, first: int, see: Watcher) -> None:
        self._ops, self._first, self._see = ops, first, see
        self._n_reductions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def reduce_add_norm(
        self, partial: Act | None, residual: Act, norm: Weight | None, eps: float
    ) -> tuple[Act, Act]:
        residual, x = self._ops.reduce_add_norm(partial, residual, norm, eps)
        self._n_reductions += 1
        if self._n_reductions % 2 == 0:
            self._see(self._first + self._n_reductions // 2 - 1, self._ops.host(residual))
        return residual, x
