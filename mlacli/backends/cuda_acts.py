"""Act: an activation in the forms its consumers ask for, each made at most once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import Mail
from mlacli.backends.cuda_weights import CudaWeight


@dataclass(slots=True, eq=False)
class Act:
    """Values of `shape`; at least one of the forms below is there.

    A norm that nobody has taken yet can be folded into the product that reads it, a product that
    nobody has run yet can add into the residual stream.
    """

    shape: tuple[int, ...]
    f32: Array | None = None
    f16: Array | None = None  # a sixteenth of the values: see kernels/README.md on overflow
    normed: tuple[Array, CudaWeight, float] | None = None  # (x, weight, eps): not taken yet
    # A pending product: stored in, or added to, the array that it is given, else in a new one.
    run: Callable[[Array | None, bool], Array] | None = None
    # The same, sent as a rank's partial; None where its kernels can't.
    send: Callable[[Mail], None] | None = None

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Expert ids (int32, -1 in padded tokens) and weights [n, n_used] on the device."""

    ids: Array
    weights: Array
