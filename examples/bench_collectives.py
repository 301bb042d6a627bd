"""Times sums over GPUs by message size and way, in graphs, and checks them against NumPy.

python examples/bench_collectives.py [--gpus 0,1] [--ways p2p,nccl,host] [--sizes 2048,7168,..]
Each figure is the mean of a reduction in a graph of many, launched by one thread.
"""

from __future__ import annotations

import argparse

from mlacli.backends.cuda_collectives import Collectives
from mlacli.backends.cuda_probe import open_places, time_of_sum

SIZES = (2048, 7168, 8 * 2048, 8 * 7168, 64 * 2048, 64 * 7168, 512 * 2048, 2048 * 2048, 2048 * 7168)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--ways", default="p2p")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    given = parser.parse_args()
    sizes = [int(word) for word in given.sizes.split(",")]
    gpus = [int(word) for word in given.gpus.split(",")]
    places = open_places(gpus, 16 * max(sizes))
    for way in given.ways.split(","):
        comm = Collectives(places, way, "f32", max(sizes))
        print(f"{comm.how}: {comm.why}; {comm.nbytes[0] / 2**20:.0f} MiB a GPU")
        for n in sizes:
            us = time_of_sum(comm, n, 200 if n < 1 << 20 else 20)
            print(f"  {n:>9} floats {us:9.2f} us  {4 * n / us / 1e3:7.1f} GB/s")
        comm.close()


if __name__ == "__main__":
    main()
