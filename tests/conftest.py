"""Every cache row starts as NaN bits: nothing may read a row before it is written.

Without -dev tests run on the CPU, on machines with GPUs too; Ctrl-C works, in the background too.
"""

import signal
from typing import Any

import pytest

from mlacli import devices
from mlacli.backends import numpy_ops

# A shell has commands that end in & ignore it, and what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
