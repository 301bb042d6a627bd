"""Lockstep: one rank runs at a time, all meet, an error or an interrupt frees everybody."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mlacli.errors import RankError
from mlacli.parallel.lockstep import Lockstep
from mlacli.parallel.ranks import RankGroup


def in_lockstep(n: int, work: Callable[[Lockstep, int], Any], times: int = 1) -> list[Any]:
    lockstep = Lockstep(n)
    group = RankGroup(n, lockstep)

    def one_rank(rank: int) -> Any:
        with lockstep.running():
            return work(lockstep, rank)

    try:
        return [group.run(one_rank) for _ in range(times)][-1]
    finally:
        group.close()


def test_all_get_what_the_last_one_made_of_all_in_rank_order() -> None:
    def work(lockstep: Lockstep, rank: int) -> list[Any]:
        return [lockstep.meet(rank, (rank, i), list) for i in range(50)]

    for found in in_lockstep(4, work, times=3):
        assert found == [[(rank, i) for rank in range(4)] for i in range(50)]


def test_one_runs_at_a_time() -> None:
    inside: list[int] = []

    def work(lockstep: Lockstep, rank: int) -> int:
        most = 0
        for _ in range(20):
            inside.append(rank)
            time.sleep(1e-4)
            most = max(most, len(inside))
            inside.remove(rank)
            lockstep.meet(rank, None, len)
        return most

    assert in_lockstep(3, work) == [1, 1, 1]


def test_an_error_of_a_rank_or_of_the_meeting_ends_all_and_the_next_call_works() -> None:
    lockstep = Lockstep(3)
    group = RankGroup(3, lockstep)

    def failing(where: str) -> Callable[[int], Any]:
        def together(brought: Any) -> None:
            if where == "meeting":
                raise ValueError("boom")

        def one_rank(rank: int) -> None:
            with lockstep.running():
                lockstep.meet(rank, rank, len)
                if where == "rank" and rank == 1:
                    raise ValueError("boom")
                lockstep.meet(rank, rank, together)
                lockstep.meet(rank, rank, len)

        return one_rank

    for where in ("rank", "meeting", "nowhere"):
        if where == "nowhere":
            group.run(failing(where))
            continue
        with pytest.raises(RankError, match="boom"):
            group.run(failing(where))
    group.close()


def test_a_group_prepares_each_thread_for_its_rank() -> None:
    entered: dict[int, str] = {}

    def enter(rank: int) -> None:
        entered[rank] = threading.current_thread().name

    group = RankGroup(2, Lockstep(2), enter)
    names = group.run(lambda rank: threading.current_thread().name)
    group.close()
    assert [entered[0], entered[1]] == names
    assert RankGroup(1, None, enter).run(lambda rank: entered[rank]) != names
