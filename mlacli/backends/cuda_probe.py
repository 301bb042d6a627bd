"""What this machine's GPUs are and how fast: memory, links, sums, and whether NCCL works.

Each figure takes milliseconds to measure; NCCL is tried in a child process that can be ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cupy as cp
import numpy as np

from mlacli.backends.cuda_collectives import Collectives, GpuPlace
from mlacli.backends.cuda_device import CudaDevice
from mlacli.backends.cuda_devices import use_device
from mlacli.backends.cuda_nccl import set_environment, why_not
from mlacli.backends.cuda_peer_memory import enable_access
from mlacli.errors import BackendError

SIZES = (2048, 7168)  # floats of a residual row: V2-Lite's, V3's
NCCL_SECONDS = 60
_COPIED = 256 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU; rates in bytes a second: its memory read and written, copies from pinned memory."""

    name: str
    model: str
    capability: int
    n_sm: int
    total: int
    free: int
    memory_rate: float = 0.0
    host_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Probe:
    """GPUs; by pair [from][to] whether kernels reach the other's memory, and the rate of copies;

    the way of sums and their microseconds by message size, in a graph.
    """

    gpus: tuple[Gpu, ...]
    access: tuple[tuple[bool, ...], ...] = ()
    links: tuple[tuple[float, ...], ...] = ()
    how: str = ""
    why: str = ""
    sums: dict[int, float] = field(default_factory=dict)
    nccl: str = ""


def listed(indices: Sequence[int]) -> Probe:
    """The GPUs and who reaches whom, without measuring."""
    can = cp.cuda.runtime.deviceCanAccessPeer
    access = tuple(tuple(a != b and bool(can(a, b)) for b in indices) for a in indices)
    return Probe(tuple(_gpu(i) for i in indices), access)


def measured(indices: Sequence[int]) -> Probe:
    """All of it."""
    found = listed(indices)
    gpus = tuple(
        Gpu(g.name, g.model, g.capability, g.n_sm, g.total, g.free, *_own_rates(i))
        for i, g in zip(indices, found.gpus, strict=True)
    )
    if len(indices) < 2:
        return Probe(gpus, found.access)
    enable_access(indices)  # without it copies take the way through the host
    links = tuple(tuple(0.0 if a == b else _link_rate(a, b) for b in indices) for a in indices)
    comm = Collectives(open_places(indices), "auto", "f32", max(SIZES))
    try:
        sums = {n: time_of_sum(comm, n) for n in SIZES}
    finally:
        comm.close()
    return Probe(gpus, found.access, links, comm.how, comm.why, sums, nccl_verdict(indices))


def _gpu(index: int) -> Gpu:
    with cp.cuda.Device(index):
        free, total = cp.cuda.runtime.memGetInfo()
        known = cp.cuda.runtime.getDeviceProperties(index)
    return Gpu(
        f"cuda{index}", known["name"].decode(), known["major"] * 10 + known["minor"],
        known["multiProcessorCount"], int(total), int(free),
    )  # fmt: skip


# ---------------------------------------------------------------- copies


def _own_rates(index: int) -> tuple[float, float]:
    with cp.cuda.Device(index):
        n = min(_COPIED, int(cp.cuda.runtime.memGetInfo()[0]) // 4)
        a, b = cp.cuda.Memory(n), cp.cuda.Memory(n)
        page = cp.cuda.alloc_pinned_memory(n // 4)
        own = 2 * n / seconds_of_copy(index, b.ptr, a.ptr, n)  # read and written
        return own, n // 4 / seconds_of_copy(index, a.ptr, page.ptr, n // 4)


def _link_rate(source: int, target: int) -> float:
    with cp.cuda.Device(source):
        n = min(_COPIED, int(cp.cuda.runtime.memGetInfo()[0]) // 4)
        a = cp.cuda.Memory(n)
    with cp.cuda.Device(target):
        b = cp.cuda.Memory(n)
    return n / seconds_of_copy(source, b.ptr, a.ptr, n)


def seconds_of_copy(index: int, target: int, source: int, n: int) -> float:
    """The best of a few, by events on a stream of device `index`."""
    runtime, best = cp.cuda.runtime, float("inf")
    with cp.cuda.Device(index):
        stream = cp.cuda.Stream(non_blocking=True)
        for _ in range(4):
            start, stop = cp.cuda.Event(), cp.cuda.Event()
            start.record(stream)
            runtime.memcpyAsync(target, source, n, runtime.memcpyDefault, stream.ptr)
            stop.record(stream)
            stop.synchronize()
            best = min(best, cp.cuda.get_elapsed_time(start, stop) / 1e3)
    return best


# ---------------------------------------------------------------- sums


def open_places(indices: Sequence[int], nbytes: int = 1 << 20) -> list[GpuPlace]:
    """A rank on each GPU, with an arena of `nbytes`."""
    places = []
    for rank, index in enumerate(indices):
        use_device(f"cuda{index}")
        places.append(GpuPlace(CudaDevice(f"cuda{index}", nbytes), [rank]))
    return places


def time_of_sum(comm: Collectives, n: int, repeats: int = 200) -> float:
    """Microseconds of a sum of `n` floats over all ranks, of many in a graph; checks its values."""
    places, n_ranks = comm.group.gpus, comm.group.n_ranks
    parts = np.random.default_rng(n).standard_normal((n_ranks, n)).astype(np.float32)
    graphs: list[tuple[Callable[[], None], Callable[[], None]]] = []
    streams = []
    for g, place in enumerate(places):
        device, mark = place.device, place.device.mark()
        use_device(device.name)
        x = device.take((n,), np.float32)
        device.copy_in(x, np.zeros(n, np.float32))
        for rank in place.ranks:
            device.copy_in(comm.slot(rank)[:n], parts[rank])

        def sums(times: int, g: int = g, x: Any = x) -> None:
            for _ in range(times):
                comm.reduce_add(g, [x] * len(places[g].ranks), (True,) * n_ranks, n)

        with device.prepared():
            sums(1)
        once, many = (device.capture(partial(sums, times)) for times in (1, repeats))
        graphs.append((once, many))
        streams.append(x)
        device.rewind(mark)  # nothing else is taken while this runs

    def run(which: int) -> float:
        _synchronize(places)
        start = time.perf_counter()
        for place, pair in zip(places, graphs, strict=True):
            use_device(place.device.name)
            pair[which]()
        _synchronize(places)
        return (time.perf_counter() - start) * 1e6

    run(0)
    comm.check()
    want = parts[0]
    for part in parts[1:]:
        want = want + part
    for place, x in zip(places, streams, strict=True):
        use_device(place.device.name)
        got = place.device.get(x)
        close = got == want if comm.how != "nccl" else np.isclose(got, want, 1e-4, 1e-5)
        if not close.all():
            raise BackendError(
                f"a sum over {len(places)} GPUs by {comm.how} is wrong on {place.device.name}",
                "try another --comm; the link or its driver is at fault",
            )
    one = min(run(0) for _ in range(5))
    all_of_them = float(np.median([run(1) for _ in range(5)]))
    comm.check()
    return max(0.0, all_of_them - one) / (repeats - 1)


def _synchronize(places: Sequence[GpuPlace]) -> None:
    for place in places:
        use_device(place.device.name)
        place.device.synchronize()


# ---------------------------------------------------------------- NCCL


def nccl_verdict(indices: Sequence[int], seconds: float = NCCL_SECONDS) -> str:
    """What became of sums through NCCL in a process of their own."""
    if reason := why_not():
        return reason
    environment = dict(os.environ)
    set_environment(environment)
    code = f"from mlacli.backends.cuda_probe import try_nccl; try_nccl({list(indices)})"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True,
            text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"failed: no answer within {seconds:g} s"
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        return f"failed: {said}"
    us = json.loads(done.stdout.splitlines()[-1])
    return "works, " + ", ".join(f"{t:.1f} us for {n} floats" for n, t in us.items())


def try_nccl(indices: Sequence[int]) -> None:
    """In the child: sums through NCCL; prints their times as JSON."""
    comm = Collectives(open_places(indices), "nccl", "f32", max(SIZES))
    sys.stdout.write(json.dumps({n: time_of_sum(comm, n) for n in SIZES}) + "\n")
    comm.close()
