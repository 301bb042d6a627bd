"""Speed of experts in host memory against the link's: python examples/bench_link.py v2lite

Times copies of page-locked memory, then loads a preset's random weights with all routed experts in
host memory (-cmoe) and times decode and prefill: the bytes of the experts that a step needs, over
its time, as a share of the link's rate. Decode needs those that are chosen, prefill all of them.
Last, what products on the host itself would reach.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlacli.engine import Engine
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading.presets import PRESETS, preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.prepare import prepare

PIECE, PIECES = 64 << 20, 32
DEPTH = 64  # cached tokens under a decode step


def link_rate() -> float:
    """Bytes a second of copies from page-locked memory to the GPU."""
    import cupy as cp

    runtime, stream = cp.cuda.runtime, cp.cuda.Stream(non_blocking=True)
    device, host = cp.cuda.Memory(PIECE), cp.cuda.alloc_pinned_memory(PIECE)

    def copies() -> None:
        for _ in range(PIECES):
            kind = runtime.memcpyHostToDevice
            runtime.memcpyAsync(device.ptr, host.ptr, PIECE, kind, stream.ptr)
        stream.synchronize()

    return PIECE * PIECES / min(_seconds(copies, 4))


def host_rate() -> float:
    """Bytes a second of float32 weights that NumPy's threads multiply with a vector."""
    weights, x = np.ones((1 << 17, 2048), np.float32), np.ones(2048, np.float32)
    return weights.nbytes / min(_seconds(lambda: weights @ x, 4))


def lines(engine: Engine, rate: float, sizes: Sequence[int]) -> Iterator[str]:
    """What decode, and prompts of `sizes` tokens, take."""
    hp, plan = engine.prepared.hparams, engine.prepared.plan
    on_host = sum(rank.host for rank in plan.ranks)
    tokens = np.random.default_rng(0).integers(0, hp.n_vocab, max(*sizes, DEPTH)).tolist()
    load = engine.timings.load_s
    yield f"{on_host / 1e9:.2f} GB in host memory, loaded in {load:.1f} s"

    def line(name: str, n: int, seconds: float, nbytes: float) -> str:
        speed = nbytes / seconds
        text = f"{name}: {1e3 * seconds:.2f} ms, {n / seconds:.1f} t/s, {nbytes / 1e6:.0f} MB at "
        return text + f"{speed / 1e9:.1f} GB/s, {speed / rate:.0%} of the link"

    def prompt(n: int) -> None:
        engine.rewind(0)
        engine.prefill(tokens[:n])

    prompt(DEPTH)
    decode = statistics.median(_seconds(lambda: engine.decode(1), 24)[4:])
    yield line("decode", 1, decode, on_host * hp.routing.n_used / hp.E)
    for n in sizes:
        yield line(f"prefill {n}", n, min(_seconds(lambda n=n: prompt(n), 4)[1:]), on_host)


def _seconds(run: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", help=f"{', '.join(PRESETS)}; with :N of N layers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    args = parser.parse_args()
    import cupy as cp

    name, rate = cp.cuda.runtime.getDeviceProperties(0)["name"].decode(), link_rate()
    print(f"{name}, {datetime.date.today()}, link {rate / 1e9:.1f} GB/s", flush=True)
    most = max(args.tokens)
    flags = {"device": "cuda0", "cpu_moe": True, "ctx_size": most + 256}
    params = to_params(library_values(LOADED, flags | {"batch_size": most, "ubatch_size": most}))
    with Engine(prepare(SyntheticFile(preset(args.preset), on_gpus=True), params)) as engine:
        for text in lines(engine, rate, args.tokens):
            print(text, flush=True)
    print(f"host: {host_rate() / 1e9:.1f} GB/s of float32 weights multiplied by NumPy")


if __name__ == "__main__":
    main()
