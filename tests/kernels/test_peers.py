"""Sums and gathers between GPUs, on the CPU: the protocol's model, then the kernels themselves.

The model walks through all interleavings; the kernels run on kit/simt.h with drawn ones.
"""

from typing import Any

import numpy as np
import pytest
from kit.peer_model import Protocol, wrong_outcome
from kit.simt import why_not
from kit.simt_peers import PeerRig

from mlacli.backends.cuda_peer import PeerWay
from mlacli.backends.numpy_ops import reduce_typed

needs_shim = pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")
SHARED = {
    "two": [[0], [1]],
    "three": [[0], [1], [2]],
    "interleaved": [[0, 2], [1, 3]],
    "uneven": [[1, 2], [0]],
}

# ---------------------------------------------------------------- the protocol's model


@pytest.mark.parametrize("sizes", [(1, 2, 1, 2), (2, 1, 1, 2), (2, 2, 1, 1)], ids=str)
def test_two_gpus_never_mistake_a_message(sizes: tuple[int, ...]) -> None:
    assert wrong_outcome(Protocol(2), sizes) == ""


@pytest.mark.parametrize("silent", [(None, 0, 0, None), (1, None, 1, 0), (0, 1, 0, 1)], ids=str)
def test_a_gpu_without_a_partial_holds_the_others_back(silent: tuple[int | None, ...]) -> None:
    assert wrong_outcome(Protocol(2), (1, 2, 2, 1), silent) == ""


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 2)], ids=str)
def test_three_gpus_never_mistake_a_message(sizes: tuple[int, ...]) -> None:
    assert wrong_outcome(Protocol(3), sizes) == ""
    assert wrong_outcome(Protocol(3), sizes, (0, None, 2)) == ""


@pytest.mark.parametrize("sending", [(0, 1), (1,)], ids=str)
@pytest.mark.parametrize("silent", [(None,) * 4, (0, 1, None, 0), (1, None, 0, None)], ids=str)
def test_products_that_send_come_in_no_order_to_be_mistaken(
    sending: tuple[int, ...], silent: tuple[int | None, ...]
) -> None:
    protocol = Protocol(2, sending=sending)
    for sizes in ((1, 2, 1, 2), (2, 1, 1, 2), (2, 2, 1, 1)):
        assert wrong_outcome(protocol, sizes, silent) == ""


@pytest.mark.parametrize("silent", [(None,) * 3, (0, None, 2)], ids=str)
def test_three_products_that_send_come_in_no_order_to_be_mistaken(
    silent: tuple[int | None, ...],
) -> None:
    assert wrong_outcome(Protocol(3, sending=(0, 1, 2)), (1, 1, 1), silent) == ""
    assert wrong_outcome(Protocol(3, sending=(0, 2)), (1, 2, 1), silent) == ""


def test_the_model_finds_what_the_protocol_is_for() -> None:
    assert "step" in wrong_outcome(Protocol(2, sending=(0, 1), waits=False), (1, 1, 1))
    assert "step" in wrong_outcome(Protocol(2, inboxes=1, sending=(0, 1)), (1, 1, 1))
    assert "step" in wrong_outcome(Protocol(2, inboxes=1), (1, 1, 1))
    assert "step" in wrong_outcome(Protocol(2, nods=False), (1, 1, 1, 1), (None, 0, 0, None))
    assert "step" in wrong_outcome(Protocol(2, numbers=False), (2, 1, 2))


# ---------------------------------------------------------------- the kernels


class Case:
    """A rig with a way on it, and what NumPy says each stream should hold."""

    def __init__(
        self, ranks: list[list[int]], reduce_type: str = "f32", limit_ms: int = 1000
    ) -> None:
        self.rig = PeerRig(ranks, reduce_type, limit_ms)
        self.way = PeerWay(self.rig.group, 1 << 12, self.rig)
        self.way.push_block = self.way.pull_block = 32
        self.rng = np.random.default_rng(7)
        self.reduce_type = reduce_type
        self.streams: dict[int, Any] = {}
        self.want: dict[int, np.ndarray] = {}
        for rank in range(self.rig.group.n_ranks):
            first = self.rng.standard_normal(1 << 12).astype(np.float32)
            self.streams[rank], self.want[rank] = self.rig.put(first), first

    def reduce(
        self, n: int, held: tuple[bool, ...], rounded: bool = False, sending: tuple[int, ...] = ()
    ) -> None:
        """One more sum; every GPU's product writes its partials just before, or sends them."""
        group = self.rig.group
        parts = self.rng.standard_normal((group.n_ranks, n)).astype(np.float32)
        for g, gpu in enumerate(group.gpus):
            streams = [self.streams[rank][:n] for rank in gpu.ranks]
            mail = self.way.mail(gpu.ranks[0], n) if g in sending else None
            if mail is not None and held[gpu.ranks[0]]:
                self.rig.send(g, mail, self.rig.put(parts[gpu.ranks[0]]))
                self.way.reduce_add(g, streams, held, n, rounded, sent=True)
                continue
            for rank in gpu.ranks:
                self.rig.copy(g, self.way.slot(rank)[:n], self.rig.put(parts[rank]))
            self.way.reduce_add(g, streams, held, n, rounded)
        typed = [
            typed_as(parts[r], self.reduce_type if rounded else "f32") for r in range(len(held))
        ]
        total = None
        for part, holds in zip(typed, held, strict=True):
            if holds:
                total = part if total is None else total + part
        for want in self.want.values():
            want[:n] += total

    def check(self) -> None:
        assert self.way.failed() is None
        for rank, stream in self.streams.items():
            np.testing.assert_array_equal(self.rig.get(stream), self.want[rank])


def typed_as(x: np.ndarray, name: str) -> np.ndarray:
    typed = reduce_typed(name)
    if typed is None:
        return x
    rows = np.zeros((33, len(x)), np.float32)  # more than 32, from where on types act
    rows[0] = x
    return typed(rows)[0]


def masks(n_ranks: int) -> list[tuple[bool, ...]]:
    """All, and each without some."""
    whole = (True,) * n_ranks
    return [whole, *(tuple(r != out for r in range(n_ranks)) for out in range(n_ranks)), whole]


@needs_shim
@pytest.mark.parametrize("name", SHARED)
def test_pushed_sums_are_numpys(name: str) -> None:
    case = Case(SHARED[name])
    n_ranks = case.rig.group.n_ranks
    for seed in range(4):
        for n, held in zip((4, 1024, 36, 300, 2048, 4), masks(n_ranks) * 2, strict=False):
            case.reduce(n, held)
        case.rig.run(seed)
        case.check()


@needs_shim
@pytest.mark.parametrize("name, sending", [
    ("two", (0, 1)), ("two", (1,)), ("three", (0, 1, 2)), ("three", (0, 2)), ("uneven", (1,)),
])  # fmt: skip
def test_sums_of_what_products_sent_are_numpys(name: str, sending: tuple[int, ...]) -> None:
    """Also beside GPUs whose products don't send, GPUs without a partial, and longer messages."""
    case = Case(SHARED[name])
    case.way.pushed = 3000
    n_ranks = case.rig.group.n_ranks
    for seed in range(4):
        for i, held in enumerate(masks(n_ranks) * 2):
            case.reduce((4, 1024, 36, 300, 2048, 4)[i % 6], held, sending=sending)
            if i % 3 == 2:
                case.reduce((3004, 64)[i % 2], held)
        case.rig.run(seed)
        case.check()


@needs_shim
def test_only_lone_ranks_send_short_messages_themselves() -> None:
    way = Case(SHARED["uneven"]).way
    assert way.mail(0, 7168) is not None and way.mail(0, 1 << 20) is None
    assert way.mail(1, 7168) is None and way.mail(2, 4) is None
    assert not way.lone() and Case(SHARED["three"]).way.lone()
    way.products_send = False
    assert way.mail(0, 7168) is None


@needs_shim
@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("name", SHARED)
def test_pulled_sums_between_pushed_ones_are_numpys(name: str, shots: int) -> None:
    case = Case(SHARED[name])
    case.way.shots, case.way.pushed = shots, 200
    n_ranks = case.rig.group.n_ranks
    for seed in range(3):
        sizes = (2048, 4, 4096, 1028, 36, 300, 2044)
        for n, held in zip(sizes, masks(n_ranks) * 2, strict=False):
            case.reduce(n, held)
        case.rig.run(seed)
        case.check()


@needs_shim
@pytest.mark.parametrize("reduce_type", ["f16", "bf16", "q8_0"])
def test_partials_are_rounded_before_the_sum(reduce_type: str) -> None:
    case = Case(SHARED["uneven"], reduce_type)
    case.way.pushed = 200
    for n in (128, 768):
        for rounded in (True, False):
            case.reduce(n, (True,) * 3, rounded)
    case.rig.run(1)
    case.check()


@needs_shim
def test_ranks_of_one_gpu_need_no_other() -> None:
    case = Case([[0, 1, 2]])
    for n, held in zip((4, 2000, 36, 4096), masks(3), strict=False):
        case.reduce(n, held)
    case.rig.run(0)
    case.check()


@needs_shim
@pytest.mark.parametrize("widths", [(37, 64), (1, 0), (0, 5), (90, 91)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_gathered_columns_are_in_rank_order(
    widths: tuple[int, ...], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in pieces of columns, and between sums."""
    monkeypatch.setattr("mlacli.backends.cuda_peer.ROOM", 64)
    case = Case(SHARED["two"])
    for seed in range(3):
        parts = [case.rng.standard_normal((n, w)).astype(np.float32) for w in widths]
        outs = [case.rig.put(np.zeros((n, sum(widths)), np.float32)) for _ in range(2)]
        case.reduce(36, (True, True))
        for g, gpu in enumerate(case.rig.group.gpus):
            columns = [case.rig.put(parts[r]) if widths[r] else None for r in gpu.ranks]
            case.way.gather(g, columns, widths, outs[g])
        case.reduce(64, (True, False))
        case.rig.run(seed)
        case.check()
        for out in outs:
            np.testing.assert_array_equal(case.rig.get(out), np.concatenate(parts, axis=1))


@needs_shim
@pytest.mark.parametrize("pushed, sending", [(0, ()), (4096, ()), (4096, (0, 1, 2))])
def test_a_dead_gpu_is_noticed_and_nobody_waits_again(
    pushed: int, sending: tuple[int, ...]
) -> None:
    case = Case(SHARED["three"], limit_ms=30)
    case.way.pushed = pushed
    for n in (64, 128, 64):
        case.reduce(n, (True,) * 3, sending=sending)
    case.rig.run(0, gpus={0, 2})
    assert case.way.failed() == 1
    case.way.reset()
    assert case.way.failed() is None
    for rank, stream in case.streams.items():  # what the failed steps left is anybody's guess
        case.rig.write(0, stream.ptr, case.want[rank])
    case.reduce(64, (True,) * 3, sending=sending)
    case.rig.run(0)
    case.check()


@needs_shim
def test_one_inbox_would_not_do() -> None:
    """What the model says is true of the kernels: the test above can fail."""
    case = Case(SHARED["two"])
    case.rig.changed = ("(step & 1)", "0")
    with pytest.raises(AssertionError):
        for seed in range(30):
            for _ in range(6):
                case.reduce(256, (True, True))
            case.rig.run(seed)
            case.check()
