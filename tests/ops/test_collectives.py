"""Which way sums take between GPUs, and what is said about it; no GPU needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from mlacli.backends import cuda_collectives
from mlacli.backends.cuda_collectives import Collectives, GpuPlace
from mlacli.errors import BackendError, RankError, UnsupportedFeature


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host whose `obstacles` and `troubles` of each way a test sets; notes what was closed."""
    found = SimpleNamespace(obstacles={}, troubles={}, closed=[], failed=None)

    def opened(self: Collectives, how: str) -> Any:
        if how in found.troubles and found.troubles[how].startswith("!"):
            raise BackendError(found.troubles[how][1:])
        return SimpleNamespace(
            how=how, close=lambda: found.closed.append(how), failed=lambda: found.failed
        )

    monkeypatch.setattr(
        cuda_collectives, "obstacle", lambda how, devices: found.obstacles.get(how, "")
    )
    monkeypatch.setattr(Collectives, "_opened", opened)
    monkeypatch.setattr(Collectives, "_trouble", lambda self, way: found.troubles.get(way.how, ""))
    return found


def collectives(how: str = "auto", ranks: Any = ((0,), (1,))) -> Collectives:
    places = [GpuPlace(SimpleNamespace(name=f"cuda{i}"), list(own)) for i, own in enumerate(ranks)]
    return Collectives(places, how, "f32", 4096)


def test_peer_memory_comes_first_then_nccl_then_host_memory(host: Any) -> None:
    comm = collectives()
    assert (comm.how, comm.why) == ("p2p", "the GPUs reach each other's memory")
    host.obstacles["p2p"] = "cuda0 can't reach the memory of cuda1"
    comm = collectives()
    assert (comm.how, comm.why) == ("nccl", "cuda0 can't reach the memory of cuda1")
    host.obstacles["nccl"] = "NCCL is not installed"
    comm = collectives()
    assert comm.how == "host"
    assert comm.why == "cuda0 can't reach the memory of cuda1, and NCCL is not installed"


def test_a_way_that_adds_up_wrong_or_does_not_start_is_left(host: Any) -> None:
    host.troubles = {"p2p": "wrong values on cuda1", "nccl": "!NCCL does not start: unhandled"}
    comm = collectives()
    assert comm.how == "host" and host.closed == ["p2p"]
    assert "sums by p2p fail: wrong values on cuda1" in comm.why
    assert "NCCL does not start" in comm.why


@pytest.mark.parametrize("how", ["p2p", "nccl", "host"])
def test_what_was_asked_for_is_taken_or_refused(host: Any, how: str) -> None:
    comm = collectives(how)
    assert (comm.how, comm.why) == (how, "asked for")
    host.obstacles[how] = "it rains"
    with pytest.raises(BackendError, match=f"--comm {how} is not possible: it rains"):
        collectives(how)


def test_too_many_ranks_are_refused(host: Any) -> None:
    with pytest.raises(UnsupportedFeature, match="10 ranks on 2 GPUs"):
        collectives(ranks=(range(9), (9,)))


def test_a_gpu_waited_for_in_vain_is_an_error_of_its_first_rank(host: Any) -> None:
    comm = collectives(ranks=((0, 2), (1, 3)))
    comm.check()
    host.failed = 1
    with pytest.raises(RankError, match=r"rank 1 failed: .*no message from cuda1 within 5 s"):
        comm.check()
