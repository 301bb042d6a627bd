"""Every cache row starts as NaN bits: nothing may read a row before it is written."""

import pytest

from mlacli.backends import numpy_ops


@pytest.fixture(autouse=True)
def poisoned_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numpy_ops.LatentRows.__init__

    def poisoned(self: numpy_ops.LatentRows, n_ctx: int, width: int, cache_type: str) -> None:
        plain(self, n_ctx, width, cache_type)
        self.poison()

    monkeypatch.setattr(numpy_ops.LatentRows, "__init__", poisoned)
