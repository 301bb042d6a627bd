"""How results are judged: NMSE of logits, and who is first where the reference is sure."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def nmse(got: Array, want: Array) -> float:
    """Squared error over squared reference, all elements."""
    want = want.astype(np.float64)
    assert np.isfinite(got).all(), "not finite"
    return float(((got - want) ** 2).sum() / (want**2).sum())


def row_nmse(got: Array, want: Array) -> Array:
    """NMSE of each row: one flipped expert spoils a row, not the median over rows."""
    want = want.astype(np.float64)
    return np.asarray(((got - want) ** 2).sum(-1) / (want**2).sum(-1))


def same_top1(got: Array, want: Array, gap: float = 1e-3) -> bool:
    """The same likeliest token in every row whose reference gap exceeds `gap`."""
    best = np.sort(want, axis=-1)
    sure = best[:, -1] - best[:, -2] > gap
    assert sure.any(), "no row of the reference is sure of its first"
    return bool((got.argmax(-1) == want.argmax(-1))[sure].all())
