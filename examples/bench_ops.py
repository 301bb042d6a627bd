"""Times every kernel of a real step on a GPU: python examples/bench_ops.py v2lite --n-kv 16384

Loads a preset's random weights, writes down what one step launches, and runs each kernel again on
its own, over all layers in turn, so that no weight is still in the L2 cache. Prints a Markdown
table for kernels/README.md: microseconds and bytes a launch, the share of the bandwidth that a copy
reaches on the same device, and per kernel the fit time = a + bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import datetime
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.engine import Engine
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading.presets import PRESETS, preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.prepare import prepare

FLUSH = 256 << 20  # bytes that are written to empty the L2 cache
COLD = 160 << 20  # bytes of a kernel's launches from which on they push each other out of it
REPLAYS = 7
LEAST = 100_000  # bytes of weights or cache from which on a rate says something
WRITERS = ("latent", "dsa_prepare")  # kernels that only add rows to the cache


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch as ops asked for it, and what it reads of weights and cache."""

    name: str
    args: tuple[Any, ...]  # grid, block and the kernel's own
    how: dict[str, Any]
    tensors: tuple[str, ...]
    nbytes: int

    @property
    def kind(self) -> tuple[str, str]:
        """Kernel and tensors, without their layer."""
        names = (re.sub(r"^blk\.\d+\.|\.weight$", "", tensor) for tensor in self.tensors)
        return self.name, " + ".join(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Row:
    """The launches of one kind in a step: microseconds and bytes of one."""

    kernel: str
    what: str
    count: int
    us: float
    nbytes: float


# ---- what a step launches -------------------------------------------------------------------


class Owners:
    """Whose memory an address is: weights and cache rows by the arrays that hold them."""

    def __init__(self, engine: Engine, n: int, n_kv: int) -> None:
        hp, plan = engine.prepared.hparams, engine.prepared.plan
        self._written = n / (n_kv + n)  # share of the rows in use that are new
        self._spans: list[tuple[int, int, str, float]] = []  # start, stop, tensor, bytes read
        weights, cache = engine._weights[0], engine._caches[0]
        found = [weights.token_embd, weights.output_norm, weights.output]
        found += [w for layer in weights.layers.values() for w in layer._weights.values()]
        for w in found:
            read = float(w.held.nbytes)
            if w.name == "token_embd.weight":
                read *= n / w.shape[0]
            elif "_exps." in w.name:
                read *= min(1.0, n * hp.routing.n_used / hp.E)
            self._spans.append((w.held.ptr, w.held.ptr + w.held.nbytes, w.name, read))
        parts = [(part, "cache") for held in cache.rows.values() for part in (held.rows,)]
        parts += [(part, "index keys") for part in cache.index_rows.values()]
        for part, name in parts:
            for array in _arrays(part):
                read = array.nbytes * min(1.0, (n_kv + n) / plan.n_ctx)
                self._spans.append((array.ptr, array.ptr + array.nbytes, name, read))

    def of(self, kernel: str, args: Sequence[Any]) -> tuple[tuple[str, ...], int]:
        """Tensors among the arguments, and the bytes of them that a launch must read.

        Activations aren't counted: their buffers are larger than what is used of them.
        """
        tensors: dict[str, float] = {}
        for array in args:
            if isinstance(array, Array):
                span = next((s for s in self._spans if s[0] <= array.ptr < s[1]), None)
                if span is not None:
                    new = span[2] in ("cache", "index keys") and kernel in WRITERS
                    tensors[span[2]] = span[3] * (self._written if new else 1)
        return tuple(tensors), int(sum(tensors.values()))


def _arrays(part: Any) -> list[Array]:
    """The device arrays that cache rows consist of."""
    if isinstance(part, Array):
        return [part]
    names = getattr(part, "__slots__", ())
    return [a for a in (getattr(part, name) for name in names) if isinstance(a, Array)]


@contextmanager
def kept_apart(device: Any, arena: Any) -> Iterator[None]:
    """Inside, nothing taken is overwritten: every launch finds its inputs when it runs again."""
    before = device.take, device.mark, device.rewind
    device.take, device.mark, device.rewind = arena.take, arena.mark, lambda mark: None
    try:
        yield
    finally:
        device.take, device.mark, device.rewind = before


def recorded_step(engine: Engine, n: int, n_kv: int, arena: Any) -> list[Launch]:
    """The launches of a step of `n` tokens after `n_kv`, which has run; scratch from `arena`."""
    hp, device = engine.prepared.hparams, engine._ops(0).device
    owners, found = Owners(engine, n, n_kv), []
    launch, prepared = device.launch, device.prepared

    def noted(name: str, grid: Any, block: int, *args: Any, **how: Any) -> None:
        tensors, nbytes = owners.of(name, args)
        found.append(Launch(name, (grid, block, *args), how, tensors, nbytes))
        launch(name, grid, block, *args, **how)

    @contextmanager
    def unnoted(*args: Any) -> Iterator[None]:
        """What only names its kernels is not part of the step."""
        before = len(found)
        with prepared(*args):
            yield
        del found[before:]

    def step() -> None:
        engine._ranks.start(
            [1 + i % 50 for i in range(n)], n_kv, hp.rope.frequencies(hp.p), [n - 1],
            engine._forwards(), capture=False,
        )()  # fmt: skip

    step()  # compiles, and leaves what belongs to the engine where it is
    with kept_apart(device, arena):
        device.launch, device.prepared = noted, unnoted
        try:
            step()
        finally:
            device.launch, device.prepared = launch, prepared
    return found


# ---- time -----------------------------------------------------------------------------------


def rows(launches: Sequence[Launch], time_us: Callable[[Sequence[Launch]], float]) -> list[Row]:
    """One row per kind, in the order of the step; `time_us` of one launch of several."""
    kinds: dict[tuple[str, str], list[Launch]] = {}
    for one in launches:
        kinds.setdefault(one.kind, []).append(one)
    return [
        Row(*kind, len(of), time_us(of), statistics.mean(one.nbytes for one in of))
        for kind, of in kinds.items()
    ]


def fits(found: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Kernel -> (a in us, bytes per us) of time = a + bytes / bandwidth, where sizes differ."""
    lines = {}
    for kernel in dict.fromkeys(row.kernel for row in found):
        own = [row for row in found if row.kernel == kernel]
        own = [row for row in own if row.nbytes >= LEAST]
        sizes = np.array([row.nbytes for row in own])
        if len(own) > 1 and sizes.max() > 1.5 * sizes.min():
            slope, a = np.polyfit(sizes, [row.us for row in own], 1, w=1 / np.sqrt(sizes))
            if slope > 0:
                lines[kernel] = float(a), float(1 / slope)
    return lines


def markdown(found: Sequence[Row], copy_rate: float) -> str:
    """The table; `copy_rate` in bytes per microsecond."""
    lines = ["| kernel | tensors | launches | us | MB | TB/s | of a copy |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        rate, shown = row.nbytes / row.us, "| - | - | - |"
        if row.nbytes >= LEAST:
            shown = f"| {row.nbytes / 1e6:.2f} | {rate / 1e6:.2f} | {rate / copy_rate:.0%} |"
        lines.append(f"| {row.kernel} | {row.what} | {row.count} | {row.us:.2f} {shown}")
    total = sum(row.us * row.count for row in found)
    lines.append(f"| all | | {sum(row.count for row in found)} | {total:.0f} | | | |")
    lines += [
        f"\n{kernel}: {a:.2f} us + bytes / {rate / 1e6:.2f} TB/s"
        for kernel, (a, rate) in fits(found).items()
    ]
    return "\n".join(lines)


class Clock:
    """Times launches on a device, each finding its weights in memory and not in the L2 cache."""

    def __init__(self, device: Any) -> None:
        import cupy as cp

        self._cp, self._device = cp, device
        self._flush = cp.cuda.alloc(FLUSH)

    def __call__(self, launches: Sequence[Launch]) -> float:
        """Microseconds of one of the launches, run one after another as in a step."""
        if sum(one.nbytes for one in launches) >= COLD:
            return self._graph(lambda: self._run(launches)) / len(launches)
        few = (list(launches) * 20)[:20]
        both = self._graph(lambda: [(self._empty(), self._run([one])) for one in few])
        return (both - self._graph(lambda: [self._empty() for _ in few])) / len(few)

    def copy_rate(self) -> float:
        """Bytes per microsecond, read and written, of the driver's own copy of a gigabyte."""
        from mlacli.backends.cuda_probe import seconds_of_copy

        n = 1 << 30
        a, b = (self._cp.cuda.alloc(n) for _ in range(2))
        return 2e-6 * n / seconds_of_copy(self._device.index, b.ptr, a.ptr, n)

    def step(self, launches: Sequence[Launch]) -> float:
        """Microseconds of all of them as one graph."""
        return self._graph(lambda: self._run(launches))

    def _run(self, launches: Sequence[Launch]) -> None:
        for one in launches:
            self._device.launch(one.name, *one.args, **one.how)

    def _empty(self) -> None:
        self._flush.memset_async(0, FLUSH, self._device.stream)

    def _graph(self, launches: Callable[[], Any]) -> float:
        replay, stream = self._device.capture(launches), self._device.stream
        replay()
        times = []
        for _ in range(REPLAYS):
            events = [self._cp.cuda.Event() for _ in range(2)]
            events[0].record(stream)
            replay()
            events[1].record(stream)
            events[1].synchronize()
            times.append(1e3 * self._cp.cuda.get_elapsed_time(*events))
        return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", help=f"{', '.join(PRESETS)}; with :N of N layers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--n-kv", type=int, nargs="+", default=[0])
    parser.add_argument("--ranks", type=int, default=1, help="the first of N under -sm graph")
    args = parser.parse_args()
    import cupy as cp

    from mlacli.backends.cuda_arena import Arena

    flags = {
        "device": ",".join(["cuda0"] * args.ranks),
        "split_mode": "graph" if args.ranks > 1 else "none",
        "ctx_size": max(args.n_kv) + max(args.tokens) + 256,
        "ubatch_size": max(args.tokens),
    }
    params = to_params(library_values(LOADED, flags))
    with Engine(prepare(SyntheticFile(preset(args.preset), on_gpus=True), params)) as engine:
        device: Any = engine._ops(0).device
        clock = Clock(device)
        rate = clock.copy_rate()
        name = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        print(f"{name}, {datetime.date.today()}, copy {rate / 1e6:.2f} TB/s")
        scratch = Arena("cuda0", cp.cuda.runtime.memGetInfo()[0] // 2)
        for n in args.tokens:
            for n_kv in args.n_kv:
                scratch.rewind(0)
                launches = recorded_step(engine, n, n_kv, scratch)
                print(f"\n{args.preset}, {n} tokens at n_kv {n_kv}: {clock.step(launches):.0f} us")
                print(markdown(rows(launches, clock), rate), flush=True)


if __name__ == "__main__":
    main()
