"""How ranks talk: Comm, and its forms for one rank, for tensor parallelism and for a pipeline.

Sums run in rank order, so every rank sees the same bits from run to run. A rank without a partial
passes None and gets the sum of the others.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

Array = Any
_GONE = object()


class Aborted(Exception):
    """Another rank failed; this one stops. Never shown: the first failure is."""


class Comm(Protocol):
    """What a rank may ask of the others."""

    rank: int
    n_ranks: int
    n_reductions: int

    def all_reduce(self, partial: Array | None) -> Array: ...

    def all_gather(self, columns: Array | None) -> Array: ...

    def send(self, array: Array) -> None: ...

    def receive(self) -> Array: ...


class SoloComm:
    """One rank: sums and gathers are what it has."""

    rank, n_ranks = 0, 1

    def __init__(self) -> None:
        self.n_reductions = 0

    def all_reduce(self, partial: Array | None) -> Array:
        assert partial is not None, "a lone rank holds every tensor"
        self.n_reductions += 1
        return partial

    def all_gather(self, columns: Array | None) -> Array:
        assert columns is not None
        return columns

    def send(self, array: Array) -> None:
        raise AssertionError("a lone rank is the first and last stage")

    def receive(self) -> Array:
        raise AssertionError("a lone rank is the first and last stage")


class Exchange:
    """The meeting point of ThreadComms. Two sets of slots, used in turn, save a second barrier:

    a rank can't write a set again before all have passed the barrier of the other set.
    """

    def __init__(self, n_ranks: int, join: Callable[[list[Array]], Array]) -> None:
        self.n_ranks, self.join = n_ranks, join
        self.slots: list[list[Array | None]] = [[None] * n_ranks for _ in range(2)]
        self.barrier = threading.Barrier(n_ranks)
        self.pipes: list[queue.Queue[Array]] = [queue.Queue() for _ in range(n_ranks)]
        self.generation = 0

    def abort(self) -> None:
        """Free every waiting rank; later calls raise Aborted until reset."""
        self.barrier.abort()
        for pipe in self.pipes:
            pipe.put(_GONE)

    def reset(self) -> None:
        """Ready again after an abort, when no rank is inside a call any more."""
        self.barrier.reset()
        self.generation += 1
        for pipe in self.pipes:
            while not pipe.empty():
                pipe.get_nowait()


class ThreadComm:
    """Tensor-parallel ranks in threads of one process."""

    def __init__(
        self, exchange: Exchange, rank: int, typed: Callable[[Array], Array] | None = None
    ) -> None:
        self.exchange, self.rank, self.n_ranks = exchange, rank, exchange.n_ranks
        self.typed = typed  # rounds a partial to -grt's type
        self.n_reductions = 0
        self._turn, self._generation = 0, 0

    def all_reduce(self, partial: Array | None) -> Array:
        self.n_reductions += 1
        if partial is not None and self.typed is not None:
            partial = self.typed(partial)
        partials = self._exchange(partial)
        assert partials, "some rank holds a part of every product"
        total = partials[0]
        for other in partials[1:]:
            total = total + other
        return total

    def all_gather(self, columns: Array | None) -> Array:
        return self.exchange.join(self._exchange(columns))

    def _exchange(self, mine: Array | None) -> list[Array]:
        """What all ranks gave, in rank order, without the Nones."""
        if self._generation != self.exchange.generation:  # after an abort all start afresh
            self._turn, self._generation = 0, self.exchange.generation
        slots = self.exchange.slots[self._turn]
        self._turn ^= 1
        slots[self.rank] = mine
        try:
            self.exchange.barrier.wait()
        except threading.BrokenBarrierError:
            raise Aborted from None
        return [x for x in slots if x is not None]

    def send(self, array: Array) -> None:
        raise AssertionError("tensor-parallel ranks hold all layers")

    def receive(self) -> Array:
        raise AssertionError("tensor-parallel ranks hold all layers")


class PipeComm(SoloComm):
    """Pipeline stages in threads: each sums alone and hands the residual stream on."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        super().__init__()
        self.exchange, self.rank = exchange, rank

    def send(self, array: Array) -> None:
        self.exchange.pipes[self.rank + 1].put(array)

    def receive(self) -> Array:
        array = self.exchange.pipes[self.rank].get()
        if array is _GONE:
            raise Aborted
        return array
