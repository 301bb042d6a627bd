"""Every cache row starts as NaN bits: nothing may read a row before it is written.

Without -dev tests run on the CPU, on machines with GPUs too.
"""

from typing import Any

import pytest

from mlacli import devices
from mlacli.backends import numpy_ops


@pytest.fixture(autouse=True)
def poisoned_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numpy_ops.LatentRows.__init__

    def poisoned(self: numpy_ops.LatentRows, *sizes: Any) -> None:
        plain(self, *sizes)
        self.poison()

    monkeypatch.setattr(numpy_ops.LatentRows, "__init__", poisoned)


@pytest.fixture(autouse=True)
def no_default_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda: 0)
