"""Sparse attention in plain NumPy: choosing cache rows by index score, attending to those chosen.

NumpyOps' methods of the same names call these; the definitions are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlacli.backends.numpy_weights import Floats
from mlacli.parallel.memory import INDEX_BLOCK

if TYPE_CHECKING:
    from mlacli.backends.numpy_ops import LatentRows
    from mlacli.ops import Step

Ints = NDArray[np.int64]


def select(q: Floats, weights: Floats, keys: LatentRows, step: Step, top_k: int) -> Ints:
    """The `top_k` best rows of each token, ascending [n, top_k].

    Block by block: the best so far and the next block compete. Candidates stand in order of their
    rows and the sort is stable, so ties go to the lower row.
    """
    weights = weights / np.float32(np.sqrt(q.shape[1] * q.shape[2]))
    best: Floats = np.empty((step.n, 0), np.float32)
    rows: Ints = np.empty((step.n, 0), np.int64)
    for start in range(0, step.n_kv, INDEX_BLOCK):
        block = np.arange(start, min(start + INDEX_BLOCK, step.n_kv))
        scores = index_scores(q, weights, keys.read(start, int(block[-1]) + 1))
        scores[step.pos[:, None] < block] = -np.inf
        best = np.concatenate([best, scores], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(block, scores.shape)], axis=1)
        kept = np.sort(np.argsort(-best, axis=1, kind="stable")[:, :top_k], axis=1)
        best = np.take_along_axis(best, kept, axis=1)
        rows = np.take_along_axis(rows, kept, axis=1)
    return rows


def index_scores(q: Floats, weights: Floats, keys: Floats) -> Floats:
    """sum_I weights[:, I] * max(0, q[:, I] . keys) [n, t]."""
    total = np.zeros((len(q), len(keys)), np.float32)
    for head in range(q.shape[1]):
        total += weights[:, head, None] * np.maximum(q[:, head] @ keys.T, 0)
    return total


def attend(
    q: Floats, rows: LatentRows, chosen: Ints, r: int, step: Step, scale: float,
    rounded: Callable[[Floats], Floats],
) -> Floats:  # fmt: skip
    """softmax(q . row) row[:r] over each token's chosen rows up to its own: [n, h, r].

    `rounded` is -gap's rounding of query, cached row and probabilities.
    """
    out = np.empty((*q.shape[:2], r), np.float32)
    for i, pos in enumerate(step.pos):
        keys = rounded(rows.take(chosen[i][chosen[i] <= pos]))  # [t, r + p]
        scores = rounded(q[i]) @ keys.T * np.float32(scale)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[i] = rounded(p) @ keys[:, :r] / p.sum(axis=-1, keepdims=True)
    return out
