"""The arena's addresses, in one block and apart, over memory that only pretends to be a GPU's."""

from typing import Any

import pytest

from mlacli.errors import MemoryBudgetError

pytest.importorskip("cupy", reason="needs CuPy (pip install 'mlacli[cuda13]')")

from mlacli.backends import cuda_arena


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation made."""
    made: list[tuple[int, int]] = []

    class Memory:
        def __init__(self, nbytes: int) -> None:
            self.ptr = 1 << 40 | len(made) << 20
            made.append((self.ptr, nbytes))

    class Stream:
        ptr = 0

        def __init__(self, non_blocking: bool) -> None:
            assert non_blocking  # waits for no work of others, as they don't for it

        def synchronize(self) -> None:
            """Everything is done."""

    monkeypatch.setattr(cuda_arena.cp.cuda, "Memory", Memory)
    monkeypatch.setattr(cuda_arena.cp.cuda, "Stream", Stream)
    monkeypatch.setattr(cuda_arena.cp.cuda.runtime, "memsetAsync", lambda *_: None)
    return made


def taken(arena: Any) -> list[int]:
    """Addresses of two arrays that stay, and of two rounds over a rewound part."""
    stay = [arena.take((3,), "f4"), arena.take((5, 7), "u1")]
    mark = arena.mark()
    rounds = []
    for _ in range(2):
        arena.rewind(mark)
        rounds += [arena.take((100,), "f2"), arena.take((64,), "f4")]
    return [array.ptr for array in stay + rounds]


def test_one_block(memory: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLACLI_DEBUG", raising=False)
    arena = cuda_arena.Arena("cuda0", 1024)
    base = memory[0][0]
    assert [ptr - base for ptr in taken(arena)] == [0, 256, 512, 768, 512, 768]
    assert memory == [(base, 1024)] and arena.peak == 1024
    with pytest.raises(MemoryBudgetError, match="cuda0"):
        arena.take((1,), "u1")


def test_apart_under_debug(memory: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLACLI_DEBUG", "1")
    arena = cuda_arena.Arena("cuda0", 1024)
    a, b, c, d, again, once_more = taken(arena)
    assert len({a, b, c, d}) == 4 and (again, once_more) == (c, d)
    assert [nbytes for _, nbytes in memory[1:]] == [12, 35, 200, 256]
    with pytest.raises(MemoryBudgetError, match="cuda0"):  # the plan's size holds here too
        arena.take((1,), "u1")
