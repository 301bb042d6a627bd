"""Lockstep: threads of which one runs at a time, and which wait for each other at meetings.

For ranks whose work is only to launch kernels: several may be captured into one graph, which no two
threads may build at once, and Python runs one thread at a time anyhow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mlacli.parallel.comm import Aborted

T = TypeVar("T")


class Lockstep:
    """The meeting point of `n_ranks` threads, for a RankGroup."""

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self._turn = threading.Condition()  # who holds it runs
        self._brought: list[Any] = [None] * n_ranks
        self._n_here = self._n_meetings = 0
        self._result: Any = None
        self._broken = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a rank runs alone but for the time that it waits in `meet`."""
        with self._turn:
            yield

    def meet(self, rank: int, brought: Any, together: Callable[[Sequence[Any]], T]) -> T:
        """`together` of what all ranks brought, in rank order, computed by the last to come."""
        if self._broken:
            raise Aborted
        self._brought[rank] = brought
        self._n_here += 1
        meeting = self._n_meetings
        if self._n_here == self.n_ranks:
            self._result = together(self._brought)
            self._brought, self._n_here = [None] * self.n_ranks, 0
            self._n_meetings += 1
            self._turn.notify_all()
        else:
            self._turn.wait_for(lambda: self._n_meetings > meeting or self._broken)
            if self._n_meetings == meeting:
                raise Aborted
        result: T = self._result
        return result

    def abort(self) -> None:
        """Free every waiting rank; later meetings raise Aborted until reset."""
        with self._turn:
            self._broken = True
            self._turn.notify_all()

    def reset(self) -> None:
        """Ready again after an abort, when no rank is inside a call any more."""
        with self._turn:
            self._brought, self._n_here, self._result = [None] * self.n_ranks, 0, None
            self._broken = False
