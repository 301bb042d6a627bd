"""The residual stream of every rank of the NumPy backend, as its layers leave it."""

import pytest

from mlacli.backends.numpy_ops import NumpyOps


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[bytes]]:
    """By rank: its residual stream behind every sum over ranks that is added to it from now on."""
    seen: dict[int, list[bytes]] = {}
    plain = NumpyOps.reduce_add_norm

    def watched(self, partial, residual, norm, eps):
        residual, x = plain(self, partial, residual, norm, eps)
        seen.setdefault(self.comm.rank, []).append(residual.tobytes())
        return residual, x

    monkeypatch.setattr(NumpyOps, "reduce_add_norm", watched)
    return seen
