"""BLAS threads are the process's, engines come and go: the last one open sets them.

The number from before the first engine comes back when the last one closes.
"""

from __future__ import annotations

import threading
from typing import Any


class BlasThreads:
    """One engine's threads per rank, from now until `release`."""

    _lock = threading.Lock()
    _open: list[BlasThreads] = []  # noqa: RUF012 - shared on purpose: it mirrors the process
    _original: Any = None

    def __init__(self, threads: int) -> None:
        self.threads = threads
        with self._lock:
            before = self.apply()
            if not self._open:
                BlasThreads._original = before
            self._open.append(self)

    def apply(self) -> Any:
        """Set the process's threads to this engine's; what was set before can be restored."""
        from threadpoolctl import threadpool_limits

        return threadpool_limits(self.threads, user_api="blas")

    def release(self) -> None:
        with self._lock:
            self._open.remove(self)
            if self._open:
                self._open[-1].apply()
            else:
                self._original.restore_original_limits()
