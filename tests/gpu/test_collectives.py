"""Sums and gathers between GPUs, bit for bit those of NumPy in rank order.

Every product is stood in for by a copy into the rank's slot, in the same graph as the sum.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlacli.backends.numpy_ops import reduce_typed
from mlacli.errors import BackendError, RankError

cupy = pytest.importorskip("cupy", reason="needs CuPy (pip install 'mlacli[cuda13]')")

from mlacli.backends.cuda_collectives import Collectives, GpuPlace  # noqa: E402
from mlacli.backends.cuda_device import CudaDevice  # noqa: E402
from mlacli.backends.cuda_devices import device_count, use_device  # noqa: E402

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(device_count() < 2, reason="needs two CUDA GPUs"),
]

MOST = 1 << 21
# (GPU, its ranks). In "four" kernels that wait for each other share a GPU, which serves tests only.
GROUPS = {
    "two": [(0, [0]), (1, [1])],
    "swapped": [(1, [0]), (0, [1])],
    "shared": [(0, [0, 2]), (1, [1])],
    "uneven": [(1, [1, 2]), (0, [0, 3, 4])],
    "four": [(0, [0]), (1, [1]), (0, [2]), (1, [3])],
}
CASES = [(name, way) for name in GROUPS for way in ("p2p", "host", "nccl")]
CASES.remove(("four", "nccl"))  # NCCL takes a GPU once


class Rig:
    """A group of GPUs with residual streams, and what NumPy says these hold."""

    def __init__(self, name: str, way: str, reduce_type: str = "f32", most: int = MOST) -> None:
        self.way, self.reduce_type = way, reduce_type
        self.places = []
        for gpu, ranks in GROUPS[name]:
            use_device(f"cuda{gpu}")
            self.places.append(GpuPlace(CudaDevice(f"cuda{gpu}", 400 << 20), ranks))
        self.comm = Collectives(self.places, way, reduce_type, most)
        self.n_ranks = self.comm.group.n_ranks
        self.rng = np.random.default_rng(5)
        first = self.rng.standard_normal(most).astype(np.float32)
        self.streams = {r: self.put(g, first) for g, p in enumerate(self.places) for r in p.ranks}
        self.want = first.copy()

    def put(self, gpu: int, host: np.ndarray) -> Any:
        device = self.places[gpu].device
        use_device(device.name)
        array = device.take(host.shape, host.dtype)
        device.copy_in(array, host)
        return array

    def graph(self, sums: list[tuple[tuple[int, ...], tuple[bool, ...]]]) -> "Graph":
        return Graph(self, sums)

    def check(self) -> None:
        self.comm.check()
        for g, place in enumerate(self.places):
            use_device(place.device.name)
            for rank in place.ranks:
                got = place.device.get(self.streams[rank])
                wrong = np.flatnonzero(got != self.want)
                if len(wrong) and self.way == "nccl" and self.n_ranks > 2:
                    np.testing.assert_allclose(got, self.want, rtol=1e-4, atol=1e-4)
                    self.want = got  # an order of its own, but the same bits everywhere
                    continue
                at = int(wrong[0]) if len(wrong) else -1
                assert not len(wrong), (
                    f"GPU {g} rank {rank}: {len(wrong)} wrong, [{at}] {got[at]} not {self.want[at]}"
                )

    def synchronize(self) -> None:
        for place in self.places:
            use_device(place.device.name)
            place.device.synchronize()


class Graph:
    """Captured sums, of (shape of the message, ranks that hold a part) each."""

    def __init__(self, rig: Rig, sums: list[tuple[tuple[int, ...], tuple[bool, ...]]]) -> None:
        self.rig, self.sums = rig, sums
        self.parts = [
            rig.rng.standard_normal((rig.n_ranks, int(np.prod(shape)))).astype(np.float32)
            for shape, _ in sums
        ]
        self.replays = []
        for g, place in enumerate(rig.places):
            mine = [[rig.put(g, part[r]) for r in place.ranks] for part in self.parts]
            zeros = rig.put(g, np.zeros(max(part.shape[1] for part in self.parts), np.float32))

            def launches(
                g: int = g, place: Any = place, mine: Any = mine, zeros: Any = zeros
            ) -> None:
                for (shape, held), parts in zip(sums, mine, strict=True):
                    n = int(np.prod(shape))
                    for rank, part in zip(place.ranks, parts, strict=True):
                        grid = (-(-n // 256),)
                        slot = rig.comm.slot(rank)
                        place.device.launch("add_f32", grid, 256, slot, part, zeros, n)
                    streams = [rig.streams[rank][:n].reshape(*shape) for rank in place.ranks]
                    rig.comm.reduce_add(g, streams, held, n)

            use_device(place.device.name)
            with place.device.prepared():
                launches()
            self.replays.append(place.device.capture(launches))

    def run(self, gpus: list[int] | None = None) -> None:
        for g, (place, replay) in enumerate(zip(self.rig.places, self.replays, strict=True)):
            if gpus is None or g in gpus:
                use_device(place.device.name)
                replay()
        if gpus is None:
            self.expect()

    def expect(self) -> None:
        for (shape, held), parts in zip(self.sums, self.parts, strict=True):
            typed = reduce_typed(self.rig.reduce_type)
            total = None
            for part, holds in zip(parts, held, strict=True):
                if holds:
                    part = part.reshape(shape)
                    part = (part if typed is None else typed(part)).reshape(-1)
                    total = part if total is None else total + part
            self.rig.want[: len(total)] += total


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def rig(request: Any) -> Iterator[Rig]:
    name, way = request.param
    if way == "nccl" and no_nccl():
        pytest.skip(no_nccl())
    made = Rig(name, way)
    yield made
    made.comm.close()


def no_nccl() -> str:
    from mlacli.backends.cuda_nccl import why_not

    return why_not()


def masks(n: int) -> list[tuple[bool, ...]]:
    """All ranks, and each left out once."""
    return [(True,) * n, *(tuple(r != out for r in range(n)) for out in range(n))]


def test_mixed_sizes_and_holders_replayed_in_any_order(rig: Rig) -> None:
    """Odd and even counts of sums to a graph, so that graphs meet each inbox in either state."""
    some = masks(rig.n_ranks)
    shapes = [(1, 2048), (1, 7168), (8, 2048), (1, 36), (64, 2048), (8, 7168), (1, 4), (64, 7168)]
    sums = [(shape, some[i % len(some)]) for i, shape in enumerate(shapes)]
    graphs = [rig.graph(sums), rig.graph(sums[:3]), rig.graph([sums[1]]), rig.graph(sums[3:5])]
    order = np.random.default_rng(1)
    for _ in range(3):
        for _ in range(30):
            graphs[order.integers(len(graphs))].run()
        rig.synchronize()
        rig.check()


def test_a_late_gpu_is_waited_for(rig: Rig) -> None:
    sums = [((1, 7168), (True,) * rig.n_ranks)] * 3 + [((64, 7168), (True,) * rig.n_ranks)]
    graph = rig.graph(sums)
    wait = cupy.RawKernel(
        'extern "C" __global__ void spin(long long ns) { long long a, b;'
        'asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(a));'
        'do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(b)); while (b - a < ns); }',
        "spin",
    )
    for late in (0, 1):
        for g, place in enumerate(rig.places):
            if g == late:
                use_device(place.device.name)
                with place.device.stream:
                    wait((1,), (1,), (np.int64(30_000_000),))
        graph.run()
        graph.run()
        rig.synchronize()
        rig.check()


@pytest.mark.parametrize("widths", [(4096, 4100), (37, 64), (0, 129), (70_000, 90_001)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_gathered_columns(rig: Rig, widths: tuple[int, ...], n: int) -> None:
    widths = tuple((widths * rig.n_ranks)[: rig.n_ranks])
    want = [rig.rng.standard_normal((n, w)).astype(np.float32) for w in widths]
    outs, replays = [], []
    for g, place in enumerate(rig.places):
        columns = [rig.put(g, want[r]) if widths[r] else None for r in place.ranks]
        outs.append(rig.put(g, np.zeros((n, sum(widths)), np.float32)))

        def launches(g: int = g, columns: Any = columns) -> None:
            rig.comm.gather(g, columns, list(widths), outs[g])

        with place.device.prepared():
            launches()
        replays.append(place.device.capture(launches))
    for _ in range(2):
        for place, replay in zip(rig.places, replays, strict=True):
            use_device(place.device.name)
            replay()
    rig.synchronize()
    rig.comm.check()
    for g, place in enumerate(rig.places):
        use_device(place.device.name)
        assert np.array_equal(place.device.get(outs[g]), np.concatenate(want, axis=1)), f"GPU {g}"


@pytest.mark.parametrize("way", ["p2p", "host", "nccl"])
@pytest.mark.parametrize("reduce_type", ["f16", "bf16", "q8_0"])
def test_partials_of_more_than_32_rows_are_rounded(way: str, reduce_type: str) -> None:
    if way == "nccl" and no_nccl():
        pytest.skip(no_nccl())
    rig = Rig("two", way, reduce_type)
    rows = (True, True)
    rig.graph([((32, 2048), rows), ((33, 2048), rows), ((512, 2048), rows)]).run()
    rig.synchronize()
    rig.check()
    rig.comm.close()


@pytest.mark.parametrize("n", [7168, 1 << 20])
@pytest.mark.parametrize("way", ["p2p", "host"])
def test_a_dead_gpu_ends_in_an_error(way: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLACLI_SPIN_MS", "300")
    rig = Rig("two", way)
    graph = rig.graph([((n,), (True, True))] * 5)
    graph.run()
    rig.synchronize()
    rig.check()
    start = time.perf_counter()
    graph.run(gpus=[0])
    rig.synchronize()
    assert 0.25 < time.perf_counter() - start < 2, "one limit, not one a sum"
    with pytest.raises(RankError, match=r"rank 1 .*no message from cuda1 within 0\.3 s"):
        rig.comm.check()
    rig.comm.reset()
    rig.comm.check()
    for g, place in enumerate(rig.places):
        use_device(place.device.name)
        place.device.copy_in(rig.streams[g], rig.want)
    graph.run()
    rig.synchronize()
    rig.check()
    rig.comm.close()


def test_peer_access_that_does_not_work_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU's messages get lost, as on hosts whose address translation breaks peer access."""
    monkeypatch.setenv("MLACLI_SPIN_MS", "100")
    places = []
    for gpu in (0, 1):
        use_device(f"cuda{gpu}")
        places.append(GpuPlace(CudaDevice(f"cuda{gpu}", 1 << 20), [gpu]))
    whole = places[1].device.launch

    def lost(name: str, *args: Any, **how: Any) -> None:
        if "N_GPUS" not in how or how["N_GPUS"] == 1:
            whole(name, *args, **how)

    places[1].device.launch = lost
    with pytest.raises(BackendError, match="sums by p2p fail: wrong values"):
        Collectives(places, "p2p", "f32", 1024)
    comm = Collectives(places, "auto", "f32", 1024) if not no_nccl() else None
    if comm is not None:
        assert comm.how == "nccl" and "sums by p2p fail" in comm.why
        comm.close()


def test_two_runs_give_the_same_bits() -> None:
    """Also through NCCL, whose order of sums is its own."""
    for way in ("p2p", "host") if no_nccl() else ("p2p", "host", "nccl"):
        found = []
        for _ in range(2):
            rig = Rig("uneven", way)
            graph = rig.graph([((1, 7168), (True,) * 5), ((64, 7168), (True,) * 5)])
            for _ in range(20):
                graph.run()
            rig.synchronize()
            use_device(rig.places[0].device.name)
            found.append(rig.places[0].device.get(rig.streams[1]))
            rig.comm.close()
        assert np.array_equal(*found), way
