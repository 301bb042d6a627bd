"""A GPU that only writes down what it is told: the CUDA ops run on it without CuPy and without GPU.

`recorded(monkeypatch)` puts it in the place of every cudaN. Memory has addresses but no content,
and an address is never given out twice, so that the use of what was rewound is found out.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from mlacli import devices
from mlacli.backends import cuda_device, cuda_devices, cuda_ops, cuda_ranks
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_sources import signatures
from mlacli.backends.cuda_weights import HostBlock
from mlacli.devices import Device
from mlacli.engine import Engine
from mlacli.errors import MemoryBudgetError
from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading.gguf_file import GgufFile, TensorInfo
from mlacli.loading.presets import Preset
from mlacli.loading.synthetic import SyntheticFile
from mlacli.parallel.shards import Shard
from mlacli.prepare import prepare

H200 = 141 << 30
LAUNCH_US, BYTES_US = 1.2, 4.3e6  # a launch with PDL, and bytes read per microsecond
_MOST_SHARED = 227 << 10
_ALIGN = 256


@dataclass(slots=True, eq=False)
class Block:
    """One array that was taken from the arena."""

    ptr: int
    nbytes: int
    place: int  # in the arena
    live: bool = True
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, with the blocks that its pointers point into."""

    name: str
    grid: tuple[int, ...]
    block: int
    shared: int
    defines: tuple[tuple[str, Any], ...]
    blocks: tuple[Block, ...]

    @property
    def shards(self) -> list[Shard]:
        """The weights that it reads."""
        found = {id(b.shard): b.shard for b in self.blocks if b.shard is not None}
        return list(found.values())


@dataclass
class Recorder:
    """What ops told a device of `nbytes`; stands in for CudaDevice."""

    name: str
    nbytes: int
    beside: Any = None  # another rank's on the same GPU
    n_sm: int = 132
    capability: int = 90
    launches: list[Launch] = field(default_factory=list)
    units: set[tuple[str, tuple[tuple[str, Any], ...]]] = field(default_factory=set)
    n_reads: int = 0
    n_compiled: int = 0
    is_busy: bool = False
    peak: int = 0
    loaded: int = 0  # bytes of weights and cache
    host_bytes: int = 0
    copied: int = 0  # over the link
    mapped: bool = True  # what is in host memory

    def __post_init__(self) -> None:
        self._on_gpu: list[Recorder] = [] if self.beside is None else self.beside._on_gpu
        self._on_gpu.append(self)  # their streams join a capture on one of them
        self._at = 0
        self._next = (len(self._on_gpu) << 44) + (1 << 40)
        self._blocks: list[Block] = []
        self._live: list[Block] = []
        self._quiet = self._capturing = False

    def use(self) -> None:
        """There is no current device."""

    def follow(self, other: Any) -> None:
        """What is launched here runs in the order in which it was launched."""

    def pull(self, target: Array, source: Array, other: Any) -> None:
        assert target.nbytes == source.nbytes, "a copy changes no sizes"
        self.block_of(target.ptr, "the target of a copy")
        other.block_of(source.ptr, "the source of a copy")

    # ---- memory

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = self._new(shape, dtype)
        if self._at + array.nbytes > self.nbytes:
            raise MemoryBudgetError(self.name, self._at + array.nbytes, self.nbytes)
        self._live.append(self._blocks[-1])
        self._at += -(-array.nbytes // _ALIGN) * _ALIGN
        self.peak = max(self.peak, self._at)
        return array

    def _new(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = Array.dense(self._next, shape, dtype)
        self._blocks.append(Block(self._next, array.nbytes, self._at))
        room = -(-max(1, array.nbytes) // _ALIGN) * _ALIGN
        self._next += room + _ALIGN  # a gap, which belongs to nobody
        return array

    def spare(self, most: int) -> Array:
        free = (self.nbytes - self._at) // _ALIGN * _ALIGN
        return self._new((min(most, free),), np.uint8)

    def mark(self) -> int:
        return self._at

    def rewind(self, mark: int) -> None:
        self._at = mark
        while self._live and self._live[-1].place >= mark and self._live[-1].nbytes:
            self._live.pop().live = False

    def block_of(self, ptr: int, what: str) -> Block:
        """The block that an address lies in, which must not have been rewound."""
        blocks = self._on_gpu[(ptr >> 44) - 1]._blocks
        at = bisect.bisect_right(blocks, ptr, key=lambda block: block.ptr) - 1
        block = blocks[at]
        assert at >= 0 and ptr < block.ptr + max(1, block.nbytes), f"{what} points at no array"
        assert block.live, f"{what} was rewound before"
        return block

    # ---- launches

    def launch(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        said = tuple(sorted(defines.items()))
        self.units.add((name, said))
        if self._quiet:  # an empty launch names a kernel ahead
            return
        signature = signatures()[name][1]
        assert len(args) == len(signature), f"{name}: {len(args)} arguments for {signature}"
        blocks = []
        for i, (arg, kind) in enumerate(zip(args, signature, strict=True)):
            what = f"argument {i} of {name}"
            if kind == "p":
                assert arg is None or isinstance(arg, Array), f"{what} is no array"
                if arg is not None:
                    blocks.append(self.block_of(arg.ptr, what))
                    last = sum((n - 1) * s for n, s in zip(arg.shape, arg.strides, strict=True))
                    end = arg.ptr + (last + arg.dtype.itemsize if arg.size else 0)
                    assert end <= blocks[-1].ptr + blocks[-1].nbytes, f"{what} is too long"
            else:
                assert isinstance(arg, (int, float, np.number, bool)), f"{what} is no number"
                assert kind != "i" or -(2**31) <= int(arg) < 2**31, f"{what} is no int: {arg}"
        x, y, z = (*grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, f"{name}: grid {grid}"
        assert 0 < block <= 1024 and shared <= _MOST_SHARED, f"{name}: {block=}, {shared=}"
        self.launches.append(Launch(name, grid, block, shared, said, tuple(blocks)))

    @contextmanager
    def prepared(self, report: Any = None) -> Iterator[None]:
        self._quiet = True
        yield
        self._quiet = False

    def capture(self, launches: Callable[[], Any]) -> Callable[[], None]:
        before = [len(one.launches) for one in self._on_gpu]
        for one in self._on_gpu:
            one._capturing = True
        launches()
        graphs = []
        for one, n in zip(self._on_gpu, before, strict=True):
            one._capturing = False
            graphs.append((one, one.launches[n:]))
            del one.launches[n:]

        def replay() -> None:
            for one, graph in graphs:
                one.launches.extend(graph)

        return replay

    # ---- host

    def copy_in(self, array: Array, host: Any) -> None:
        assert not self._capturing, "a step reads the host"
        assert host.nbytes == array.nbytes, "a copy changes no sizes"
        self.block_of(array.ptr, "the target of a copy")

    send = copy_in

    def end_sends(self) -> None:
        self.synchronize()

    def get(self, array: Array) -> Any:
        assert not self._capturing, "a step reads back to the host"
        self.block_of(array.ptr, "the source of a copy")
        self.n_reads += 1
        return np.zeros(array.shape, array.dtype)

    def fetch(self, array: Array) -> Callable[[], Any]:
        host = self.get(array)
        return lambda: host

    def close(self) -> None:
        """Memory is kept, to be looked at."""

    def failure(self) -> None:
        """It lives."""

    def synchronize(self) -> None:
        assert not self._capturing, "a step waits for the device"

    @property
    def noting(self) -> bool:
        return self._quiet

    def take_host(self, shape: tuple[int, ...]) -> HostBlock:
        array = self._new(shape, np.uint8)
        self.host_bytes += array.nbytes
        return HostBlock(array, np.zeros(1, np.uint8), self.mapped)

    @property
    def host_problem(self) -> str | None:
        return None if self.mapped else "nothing is page-locked"

    def keep(self, memory: Any, host: Any) -> None:
        """No content."""

    def send_back(self, memory: Any, array: Array) -> None:
        self.block_of(array.ptr, "the source of a copy")

    def bring(self, array: Array, source: Array) -> None:
        assert array.nbytes == source.nbytes, "a copy changes no sizes"
        self.block_of(array.ptr, "the target of a copy")
        self.block_of(source.ptr, "its source")
        self.copied += 0 if self._quiet else source.nbytes

    @property
    def link(self) -> Recorder:
        return self

    def copy(self, slot: int, copies: Sequence[tuple[int, int, int]]) -> None:
        if self._quiet:
            return
        assert not self._capturing, "a captured step makes copies"
        for target, source, nbytes in copies:
            for ptr, what in ((target, "the target of a copy"), (source, "its source")):
                block = self.block_of(ptr, what)
                assert ptr + nbytes <= block.ptr + block.nbytes, f"{what} is too short"
        self.copied += sum(nbytes for *_, nbytes in copies)

    def wait(self, slot: int) -> None:
        assert not self._capturing, "a captured step waits for copies"

    def release(self, slot: int) -> None:
        """Nothing is overwritten here."""


class Header(SyntheticFile):
    """A preset whose tensors have sizes but no content: memory that nobody touches."""

    def data(self, info: TensorInfo) -> memoryview:
        return np.zeros(info.nbytes, np.uint8).data


def recorded(
    monkeypatch: pytest.MonkeyPatch, model: Preset | GgufFile, capability: int = 90, **flags: Any
) -> Engine:
    """An engine of `model` on a recorder, loaded; flags as for mlacli.load."""
    upload = cuda_ops.CudaOps.upload

    def tagged(ops: Any, pieces: Any, shard: Shard) -> Any:
        weight = upload(ops, pieces, shard)
        for name in weight.__slots__:
            array = getattr(weight, name)
            if isinstance(array, Array):
                ops.device.block_of(array.ptr, "a weight").shard = shard
        return weight

    monkeypatch.setattr(cuda_ops.CudaOps, "upload", tagged)
    monkeypatch.setattr(
        devices, "_device", lambda name: Device(name, "cuda", H200, H200, capability)
    )
    monkeypatch.setattr(cuda_devices, "use_device", lambda name: None)
    monkeypatch.setattr(cuda_device, "CudaDevice", partial(Recorder, capability=capability))
    monkeypatch.setattr(devices, "bytes_in_use", lambda name: 0)
    compile_ahead = cuda_ranks.CudaRanks.compile

    def compiled(ranks: Any, *args: Any) -> int:
        for ops in ranks.ops:
            ops.device.loaded = ops.device.mark()
        return compile_ahead(ranks, *args)

    monkeypatch.setattr(cuda_ranks.CudaRanks, "compile", compiled)
    params = to_params(library_values(LOADED, {"device": "cuda0"} | flags))
    return Engine(prepare(Header(model) if isinstance(model, Preset) else model, params))


def recorder(engine: Engine, rank: int = 0) -> Recorder:
    return engine._ops(rank).device


def step(engine: Engine, n: int, rank: int = 0) -> list[Launch]:
    """The launches of one step of `n` tokens from what is cached now, which is put back."""
    n_kv, device = engine.n_kv, recorder(engine, rank)
    engine.prefill([1] * n) if n > 1 else engine.decode(1)
    engine.rewind(n_kv)
    device.launches.clear()
    engine.prefill([1] * n) if n > 1 else engine.decode(1)  # the graph again
    found = list(device.launches)
    engine.rewind(n_kv)
    return found


def read_bytes(launch: Launch, hp: Any, n: int) -> float:
    """Weight bytes that a launch reads at least: of chosen experts, of n embedding rows."""
    return sum(active_bytes(shard, hp, n) for shard in launch.shards)


def active_bytes(shard: Shard, hp: Any, n: int) -> float:
    if shard.tensor == "token_embd.weight":
        return n * shard.nbytes / shard.shape[0]
    share = min(1.0, n * hp.routing.n_used / hp.E) if "_exps." in shard.tensor else 1.0
    return shard.nbytes * share


def predicted_us(launches: Sequence[Launch], engine: Engine, n_kv: int) -> float:
    """Microseconds of a decode step: launches with PDL, and all bytes at an H200's rate."""
    prepared = engine.prepared
    weights = sum(read_bytes(launch, prepared.hparams, 1) for launch in launches)
    plan = prepared.plan
    cache = n_kv * plan.ranks[0].cache / plan.n_ctx
    return LAUNCH_US * len(launches) + (weights + cache) / BYTES_US
