"""Times sums over GPUs by message size and way, in graphs, and checks them against NumPy.

python examples/bench_collectives.py [--gpus 0,1] [--ways p2p,nccl,host] [--sizes 2048,7168,..]
Each figure is the mean of a reduction in a graph of many, launched by one thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from mlacli.backends.cuda_collectives import Collectives, GpuPlace
from mlacli.backends.cuda_device import CudaDevice
from mlacli.backends.cuda_devices import use_device

SIZES = (2048, 7168, 8 * 2048, 8 * 7168, 64 * 2048, 64 * 7168, 512 * 2048, 2048 * 2048, 2048 * 7168)


def open_places(gpus: list[int]) -> list[GpuPlace]:
    places = []
    for rank, gpu in enumerate(gpus):
        use_device(f"cuda{gpu}")
        places.append(GpuPlace(CudaDevice(f"cuda{gpu}", 256 << 20), [rank]))
    return places


def measure(comm: Collectives, n: int, repeats: int) -> tuple[float, str]:
    """(microseconds of a reduction, what is wrong with its values) for `n` floats."""
    rng = np.random.default_rng(n)
    places = comm.group.gpus
    parts = rng.standard_normal((comm.group.n_ranks, n)).astype(np.float32)
    held = (True,) * comm.group.n_ranks
    streams, replays, marks = [], [], []
    for g, place in enumerate(places):
        use_device(place.device.name)
        marks.append(place.device.mark())
        x = place.device.take((n,), np.float32)
        place.device.copy_in(x, np.zeros(n, np.float32))
        for rank in place.ranks:
            place.device.copy_in(comm.slot(rank)[:n], parts[rank])
        with place.device.prepared():
            comm.reduce_add(g, [x] * len(place.ranks), held, n)
        streams.append(x)

        def launches(g: int = g, x: Any = x, times: int = repeats) -> None:
            for _ in range(times):
                comm.reduce_add(g, [x], held, n)

        once = place.device.capture(lambda f=launches: f(times=1))
        replays.append((once, place.device.capture(launches)))

    def run(which: int) -> float:
        for place in places:
            place.device.synchronize()
        start = time.perf_counter()
        for place, both in zip(places, replays, strict=True):
            use_device(place.device.name)
            both[which]()
        for place in places:
            place.device.synchronize()
        return (time.perf_counter() - start) * 1e6

    run(0)
    want = parts[0].copy()
    for part in parts[1:]:
        want += part
    wrong = []
    for place, x in zip(places, streams, strict=True):
        use_device(place.device.name)
        got = place.device.get(x)
        if not np.array_equal(got, want):
            at = int(np.flatnonzero(got != want)[0])
            wrong.append(f"{place.device.name}[{at}] {got[at]} not {want[at]}")
    one = min(run(0) for _ in range(5))
    many = float(np.median([run(1) for _ in range(5)]))
    comm.check()
    for place, mark in zip(places, marks, strict=True):
        place.device.rewind(mark)
    return (many - one) / max(1, repeats - 1), "; ".join(wrong)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--ways", default="p2p")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    given = parser.parse_args()
    places = open_places([int(word) for word in given.gpus.split(",")])
    sizes = [int(word) for word in given.sizes.split(",")]
    for way in given.ways.split(","):
        comm = Collectives(places, way, "f32", max(sizes))
        print(f"{comm.how}: {comm.why}; {comm.nbytes[0] / 2**20:.0f} MiB a GPU")
        for n in sizes:
            us, wrong = measure(comm, n, 200 if n < 1 << 20 else 20)
            print(f"  {n:>9} floats {us:9.2f} us  {4 * n / us / 1e3:7.1f} GB/s  {wrong}")
        comm.close()


if __name__ == "__main__":
    main()
