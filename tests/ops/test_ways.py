"""What is known of the way of sums between GPUs before weights load; no GPU needed."""

from pathlib import Path
from typing import Any

import pytest
from kit.golden_files import FILES

from mlacli import devices, prepare
from mlacli.backends import cuda_peer, cuda_together, cuda_ways
from mlacli.devices import Device
from mlacli.errors import BackendError, UnsupportedFeature
from mlacli.flags import LOADED, library_values, to_params
from mlacli.parallel import cuda_sizes
from mlacli.parallel.cuda_sizes import Sums

GOOD = {"p2p": "", "nccl": "", "host": ""}


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By way, what a host of GPUs has against it; a test changes it."""
    found = dict(GOOD)

    def gpu(name: str) -> Device:
        return Device(name, "cuda", 1 << 36, 1 << 36)

    monkeypatch.setattr(devices, "_device", gpu)
    monkeypatch.setattr(cuda_ways, "obstacle", lambda way, devices: found[way])
    return found


def scratch(**flags: Any) -> list[tuple[int, int]]:
    """(planned scratch, what of it the sums take for themselves) by rank."""
    flags = {"device": "cuda0,cuda1", "split_mode": "graph"} | flags
    prepared = prepare.prepare(FILES["v3"], to_params(library_values(LOADED, flags)))
    prepared.gguf.close()
    return [(rank.scratch, rank.sums) for rank in prepared.plan.ranks]


def test_the_way_that_was_asked_for_is_refused_before_loading(obstacles: dict[str, str]) -> None:
    obstacles["p2p"] = "cuda0 can't reach the memory of cuda1"
    obstacles["nccl"] = "NCCL is not installed"
    with pytest.raises(BackendError, match="--comm p2p is not possible: cuda0 can't reach"):
        scratch(comm="p2p")
    with pytest.raises(BackendError, match="--comm nccl is not possible: NCCL is not installed"):
        scratch(comm="nccl")
    assert scratch(comm="host") == scratch(comm="auto")
    for flags in ({"split_mode": "layer"}, {"device": "cuda0,cuda0"}):  # nothing between GPUs
        assert {sums for _, sums in scratch(comm="p2p", **flags)} == {0}


def test_the_plan_counts_the_way_that_will_be_taken(obstacles: dict[str, str]) -> None:
    by_way = {way: scratch(comm=way) for way in GOOD}
    assert scratch(comm="auto") == by_way["p2p"]
    obstacles["p2p"] = "cuda0 can't reach the memory of cuda1"
    assert scratch(comm="auto") == by_way["nccl"]
    assert by_way["nccl"][0][1] >= cuda_sizes.NCCL_BYTES > by_way["p2p"][0][1]
    assert by_way["p2p"][0][1] > by_way["host"][0][1] > 0
    beside = {way: {whole - sums for whole, sums in found} for way, found in by_way.items()}
    assert beside["p2p"] == beside["nccl"] == beside["host"]


def test_gpus_that_are_not_there_may_need_nccl() -> None:
    planned = [Device(f"gpu{i}", "planned", 1 << 36, 1 << 36) for i in range(2)]
    assert cuda_ways.way_of_sums("auto", planned) == "nccl"
    assert cuda_ways.way_of_sums("p2p", planned) == "p2p"


@pytest.mark.parametrize("names, match", [
    ("cuda0," * 9 + "cuda1", "10 ranks on 2 GPUs"), ("cuda0," * 64 + "cuda0", "65 ranks on one"),
])  # fmt: skip
def test_too_many_ranks_are_refused_before_loading(
    obstacles: dict[str, str], names: str, match: str
) -> None:
    with pytest.raises(UnsupportedFeature, match=match):
        scratch(device=names)


def test_an_idle_gpu_is_not_asked(obstacles: dict[str, str]) -> None:
    obstacles["p2p"] = "cuda0 can't reach the memory of cuda1"
    assert [sums for _, sums in scratch(comm="p2p", tensor_split="1,0")] == [0]


@pytest.mark.parametrize("ranks", [[[0], [1]], [[0, 2, 4], [1, 3]]])
@pytest.mark.parametrize("way", ["p2p", "host"])
def test_what_own_kernels_take_is_what_the_plan_counts(ranks: list[list[int]], way: str) -> None:
    from kit.simt_peers import PeerRig

    rig, n_ubatch, d = PeerRig(ranks), 64, 512
    memory: Any = rig
    peers = cuda_peer.PeerWay(rig.group, n_ubatch * d, memory, through_host=way == "host")
    for own, nbytes in zip(ranks, peers.nbytes, strict=True):
        sums = Sums(rig.group.n_ranks, len(ranks), len(own), way)
        planned = len(own) * sums.outside(n_ubatch, d)
        assert nbytes <= planned <= nbytes + 256 * len(own)


def test_limits_are_those_of_the_kernels() -> None:
    assert cuda_ways.MOST_ON_ONE == cuda_together._MOST_RANKS
    assert cuda_sizes.MAIL_FLOATS == cuda_peer.ROOM


@pytest.mark.parametrize("flags, why", [
    (("-dev", "cpu,cpu"), "between GPUs"), (("--vram", "8G,8G", "-sm", "layer"), "under -sm graph"),
])  # fmt: skip
def test_where_it_says_nothing_the_flag_has_no_effect(
    flags: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlacli.cli import run

    words = ("-sm", "graph") if "-sm" not in flags else ()
    assert run(["plan", "-m", str(Path(FILES["v3"])), "--comm", "p2p", *flags, *words]) == 0
    out, err = capsys.readouterr()
    assert "--comm" in out + err and why in out + err
