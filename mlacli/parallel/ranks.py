"""RankGroup: one worker thread per rank; the first error wins and frees the others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from mlacli.errors import MlacliError, RankError
from mlacli.parallel.comm import Aborted

T = TypeVar("T")


class Meeting(Protocol):
    """Where ranks wait for each other: an Exchange or a Lockstep."""

    def abort(self) -> None:
        """Free every waiting rank."""
        ...

    def reset(self) -> None:
        """Ready again after an abort, when no rank is inside a call any more."""
        ...


class _Call:
    """One function on all ranks: who is still at it and what came of it.

    The workers alone count, so an interrupt of the caller can't make it wait for the wrong number.
    """

    def __init__(self, fn: Callable[[int], Any], n_ranks: int) -> None:
        self.fn, self.results = fn, [None] * n_ranks
        self.first: tuple[int, BaseException] | None = None
        self.cancelled = False
        self.finished: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.left = n_ranks
        self._done = [False] * n_ranks
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Until all ranks are done; in pieces, for a signal just before a wait does not end it."""
        while True:
            try:
                return self.finished.get(timeout=0.2)
            except queue.Empty:
                pass

    def work(self, rank: int, exchange: Meeting) -> None:
        """This rank's share; a call that comes twice (see `RankGroup._stop`) is done once."""
        if self._done[rank]:
            return
        error: BaseException | None = None
        try:
            if self.cancelled:
                raise Aborted
            self.results[rank] = self.fn(rank)
        except BaseException as e:
            error = e
            if not isinstance(e, Aborted):
                exchange.abort()
        with self._lock:
            if self.first is None and error is not None and not isinstance(error, Aborted):
                self.first = rank, error
            self._done[rank] = True
            self.left -= 1
        if not self.left:
            self.finished.put(None)


class RankGroup:
    """Runs a function of the rank number on all ranks at once. A lone rank runs in the caller."""

    def __init__(
        self, n_ranks: int, exchange: Meeting | None = None,
        enter: Callable[[int], None] = lambda rank: None,
    ) -> None:  # fmt: skip
        """`enter` prepares a thread for the work of a rank, before each call."""
        assert n_ranks == 1 or exchange is not None
        self.n_ranks, self.exchange, self._enter = n_ranks, exchange, enter
        self._calls: list[queue.SimpleQueue[_Call | None]] = []
        self._threads: list[threading.Thread] = []
        self._call: _Call | None = None
        for rank in range(n_ranks if n_ranks > 1 else 0):
            self._calls.append(queue.SimpleQueue())
            thread = threading.Thread(
                target=self._work, args=(rank,), name=f"rank{rank}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def run(self, fn: Callable[[int], T]) -> list[T]:
        """[fn(0), fn(1), ...]; RankError with the first cause when a rank fails.

        An interrupt of the caller stops all ranks at their next exchange before it goes on.
        """

        def entered(rank: int) -> T:
            self._enter(rank)
            return fn(rank)

        if self.n_ranks == 1:
            return [entered(0)]
        assert self._calls, "the group is closed"
        call = self._call = _Call(entered, self.n_ranks)
        try:
            for calls in self._calls:
                calls.put(call)
            call.wait()
        except BaseException:
            self._stop(call)
            raise
        finally:
            self._call = None
        assert self.exchange is not None
        if call.first is not None:
            self.exchange.reset()
            rank, error = call.first
            raise (error if isinstance(error, MlacliError) else RankError(rank, error)) from error
        results: list[Any] = call.results
        return results

    def check(self) -> None:
        """Aborted in a rank whose call has been interrupted, or has failed on another rank.

        For those that work long without meeting the others.
        """
        if self._call is not None and (self._call.cancelled or self._call.first is not None):
            raise Aborted

    def close(self) -> None:
        """End the threads, also of a call that was interrupted twice."""
        if self.exchange is not None:
            self.exchange.abort()
        for calls in self._calls:
            calls.put(None)
        for thread in self._threads:
            thread.join()
        self._calls, self._threads = [], []

    def _work(self, rank: int) -> None:
        assert self.exchange is not None
        while (call := self._calls[rank].get()) is not None:
            call.work(rank, self.exchange)
            del call  # while it waits, a thread keeps nothing of its engine alive

    def _stop(self, call: _Call) -> None:
        """Ends `call` on every rank, wherever the interrupt came: it may not have reached all."""
        assert self.exchange is not None
        call.cancelled = True
        self.exchange.abort()
        for calls in self._calls:
            calls.put(call)
        while call.left:
            time.sleep(0.001)
        self.exchange.reset()


def first_result(results: Sequence[T | None]) -> T:
    """The result of the first rank that has one: rank 0's under graph, the last stage's else."""
    return next(result for result in results if result is not None)
