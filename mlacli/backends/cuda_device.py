"""One rank's GPU: its memory, stream, kernels and graphs. The only way for ops to reach CuPy.

Ops see the `Device` protocol alone, so that they also run on a recorder that has no GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlacli.backends import cuda_errors
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_pages import Ring

if TYPE_CHECKING:
    from mlacli.backends.cuda_weights import HostBlock

Host = NDArray[Any]
_PAGE = 4 << 20  # bytes of page-locked memory for copies
UNDER_WAY = 8  # steps that may be, beside the one whose output is asked for: one a stage
_INPUT, _OUTPUT = 64 << 10, 2 << 20  # bytes of a step's inputs, of what is fetched from it


_NOT_READY = 600  # cudaErrorNotReady
_LATE = 1.0  # seconds


class Link(Protocol):
    """Copies on a stream of their own into numbered slots of device memory; nothing while noting.

    A slot's copies start when what was launched before its last `release` is done.
    """

    def copy(self, slot: int, copies: Sequence[tuple[int, int, int]]) -> None:
        """Start copies (to, from, bytes) into the slot."""
        ...

    def wait(self, slot: int) -> None:
        """Launches from here on find the slot's copies made."""
        ...

    def release(self, slot: int) -> None:
        """Launches up to here were the last to read the slot."""
        ...


class Device(Protocol):
    """What ops need of a GPU."""

    name: str
    n_sm: int
    capability: int  # 90 for compute capability 9.0
    on_delay: Callable[[], None] | None  # called now and then while a wait takes long

    def use(self) -> None:
        """Make it this thread's GPU; needed before anything below."""
        ...

    def follow(self, other: Any) -> None:
        """What is launched from now on waits for all that `other` was given so far."""
        ...

    def pull(self, target: Array, source: Array, other: Any) -> None:
        """Copy between arrays of this device and `other`, in this one's order."""
        ...

    @property
    def n_compiled(self) -> int:
        """Kernel variants that weren't on disk so far."""
        ...

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory at the next free address of the arena; its content is whatever was there."""
        ...

    def mark(self) -> int:
        """Where the next `take` will be."""
        ...

    def rewind(self, mark: int) -> None:
        """Everything taken since `mark` may be overwritten."""
        ...

    def launch(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **how: Any) -> None:
        """Run a kernel; `how` holds shared bytes and -D defines (backends/cuda_kernels.py)."""
        ...

    def copy_in(self, array: Array, host: Host) -> None:
        """Fill `array` from `host`, which the caller may change once this returns."""
        ...

    def get(self, array: Array) -> Host:
        """A host copy, once everything launched before is done."""
        ...

    def fetch(self, array: Array) -> Callable[[], Host]:
        """A host copy as of now, to be asked for after at most UNDER_WAY more of them."""
        ...

    def spare(self, most: int) -> Array:
        """At most `most` bytes that nothing uses until the arena is nearly full."""
        ...

    def send(self, array: Array, host: Host) -> None:
        """As copy_in for a piece of a weight, of any strides: see backends/cuda_staging.py."""
        ...

    def end_sends(self) -> None:
        """Wait for what was sent, and free the buffers that it went through."""
        ...

    def take_host(self, shape: tuple[int, ...]) -> HostBlock:
        """Bytes of host memory, page-locked where the system allows it."""
        ...

    @property
    def host_problem(self) -> str | None:
        """What of it could not be page-locked, and why; None where all was."""
        ...

    def keep(self, memory: Host, host: Host) -> None:
        """Fill bytes of host memory of take_host() from `host`."""
        ...

    def send_back(self, memory: Host, array: Array) -> None:
        """The same from the device, in the stream's order."""
        ...

    def bring(self, array: Array, source: Array) -> None:
        """Copy from page-locked host memory in the stream's order; a capture takes it along."""
        ...

    @property
    def link(self) -> Link:
        """Copies beside the stream, made ahead of the launches that need them."""
        ...

    @property
    def noting(self) -> bool:
        """Whether launches are only noted now."""
        ...

    def synchronize(self) -> None:
        """Wait until everything launched before is done."""
        ...

    def failure(self) -> Exception | None:
        """What it died of, so that nothing runs on it any more; None while it lives."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether something that was launched isn't done."""
        ...

    def close(self) -> None:
        """Give all memory back; nothing may be asked of it any more."""
        ...

    def prepared(
        self, report: Callable[[int, int], None] | None = None
    ) -> AbstractContextManager[None]:
        """Inside, launches only name their kernels; at the end those are compiled together.

        `report` is told how many are done, of how many, unless none is missing.
        """
        ...

    def capture(self, launches: Callable[[], Any]) -> Callable[[], None]:
        """What `launches` would run, as a graph: call the result to run it."""
        ...


class CudaDevice:
    """The current CUDA device with an arena of `nbytes`.

    Ranks on one GPU have one each: a stream and an arena of their own, the kernels of `beside`.
    """

    def __init__(self, name: str, nbytes: int, beside: CudaDevice | None = None) -> None:
        import cupy as cp

        from mlacli.backends.cuda_arena import Arena
        from mlacli.backends.cuda_kernels import Kernels

        cuda_errors.hush()
        self._runtime = cp.cuda.runtime
        self._page = np.frombuffer(cp.cuda.alloc_pinned_memory(_PAGE), np.uint8, _PAGE)
        self._page_in_use = False  # by a copy to the device that may be under way
        self._inputs: Any = Ring(_INPUT, UNDER_WAY + 1)
        self._outputs: Any = Ring(_OUTPUT, UNDER_WAY + 1)
        device = cp.cuda.Device()
        self.name, self.index, self.use = name, int(device.id), device.use
        self.on_delay: Callable[[], None] | None = None  # called while a wait takes long
        self.stream = cp.cuda.Stream(non_blocking=True)
        self._reached = cp.cuda.Event(disable_timing=True)
        self.kernels: Kernels = Kernels(self.stream, None if beside is None else beside.kernels)
        self.arena = Arena(name, nbytes)
        self.take, self.mark, self.rewind = self.arena.take, self.arena.mark, self.arena.rewind
        self.spare = self.arena.spare
        self._staging: Any = None
        self._host_memory: Any = None
        self._link: Link | None = None
        self.launch, self.prepared = self.kernels.launch, self.kernels.prepared
        self.n_sm = int(device.attributes["MultiProcessorCount"])
        self.capability = self.kernels.capability

    @property
    def n_compiled(self) -> int:
        return self.kernels.n_compiled

    def copy_in(self, array: Array, host: Host) -> None:
        host = np.ascontiguousarray(host)
        assert host.nbytes == array.nbytes, "a copy changes no sizes"
        if host.nbytes > _PAGE:
            self._copy(array.ptr, host.ctypes.data, host.nbytes)
            self.stream.synchronize()
        elif 0 < host.nbytes <= _INPUT:
            page, sent = self._inputs.next()
            sent.synchronize()  # at once for an event that was never recorded
            page[: host.nbytes] = host.reshape(-1).view(np.uint8)
            self._copy(array.ptr, page.ctypes.data, host.nbytes)
            sent.record(self.stream)
        elif host.nbytes:
            if self._page_in_use:
                self.synchronize()
            self._page[: host.nbytes] = host.reshape(-1).view(np.uint8)
            self._copy(array.ptr, self._page.ctypes.data, host.nbytes)
            self._page_in_use = True

    def get(self, array: Array) -> Host:
        host = np.empty(array.shape, array.dtype)
        if 0 < host.nbytes <= _PAGE:  # page-locked memory is copied to at full speed
            self._copy(self._page.ctypes.data, array.ptr, host.nbytes)
            self.synchronize()
            host.reshape(-1).view(np.uint8)[:] = self._page[: host.nbytes]
        else:
            if host.nbytes:
                self._copy(host.ctypes.data, array.ptr, host.nbytes)
            self.synchronize()
        return host

    def fetch(self, array: Array) -> Callable[[], Host]:
        if array.nbytes > _OUTPUT:
            host = self.get(array)
            return lambda: host
        page, arrived = self._outputs.next()
        if array.nbytes:
            self._copy(page.ctypes.data, array.ptr, array.nbytes)
        arrived.record(self.stream)

        def waited() -> Host:
            self._wait(partial(self._runtime.eventQuery, arrived.ptr), arrived.synchronize)
            found: Host = page[: array.nbytes].view(array.dtype).reshape(array.shape).copy()
            return found

        return waited

    def send(self, array: Array, host: Host) -> None:
        assert host.nbytes == array.nbytes, "a copy changes no sizes"
        if self._staging is None:
            from mlacli.backends.cuda_staging import Staging

            self._staging = Staging(self.stream)
        if host.nbytes:
            self._staging.send(array.ptr, host)

    def end_sends(self) -> None:
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def take_host(self, shape: tuple[int, ...]) -> HostBlock:
        if self._host_memory is None:
            from mlacli.backends.cuda_host import HostMemory

            self._host_memory = HostMemory()
        block: HostBlock = self._host_memory.take(shape)
        return block

    @property
    def host_problem(self) -> str | None:
        memory = self._host_memory
        return None if memory is None else memory.problem

    def keep(self, memory: Host, host: Host) -> None:
        np.copyto(memory, host)

    def send_back(self, memory: Host, array: Array) -> None:
        self._copy(memory.ctypes.data, array.ptr, memory.nbytes)

    def bring(self, array: Array, source: Array) -> None:
        if not self.noting:
            self._copy(array.ptr, source.ptr, source.nbytes)
            self.kernels.follow()

    @property
    def link(self) -> Link:
        if self._link is None:
            from mlacli.backends.cuda_host import CopyLink

            self._link = CopyLink(self)
        return self._link

    @property
    def noting(self) -> bool:
        return self.kernels.noting

    def synchronize(self) -> None:
        self._wait(partial(self._runtime.streamQuery, self.stream.ptr), self.stream.synchronize)
        self._page_in_use = False

    def _wait(self, query: Callable[[], int], wait: Callable[[], None]) -> None:
        """Where another GPU may be what is waited for, that one is looked at when it takes long."""
        if self.on_delay is None:
            wait()
            return
        late = time.monotonic() + _LATE
        while (code := query()) == _NOT_READY:
            if time.monotonic() > late:
                self.on_delay()
                time.sleep(0.005)
        if code:
            raise cuda_errors.of_code(code)

    @property
    def is_busy(self) -> bool:
        return bool(self._runtime.streamQuery(self.stream.ptr) == _NOT_READY)

    def failure(self) -> Exception | None:
        return cuda_errors.failure_of(self.stream)

    def close(self) -> None:
        with suppress(*cuda_errors.faults()):  # of a launch that failed
            self.use()
            self.stream.synchronize()
        self.on_delay = self._staging = self._link = None
        self._page, self._inputs, self._outputs = (
            np.empty(0, np.uint8),
            None,
            None,
        )  # CuPy keeps them
        if self.failure() is None:
            self.arena.close()
        else:
            cuda_errors.abandon(self.arena)

    def follow(self, other: CudaDevice) -> None:
        other._reached.record(other.stream)
        self.stream.wait_event(other._reached)
        self.kernels.follow()

    def pull(self, target: Array, source: Array, other: CudaDevice) -> None:
        assert target.nbytes == source.nbytes, "a copy changes no sizes"
        self._runtime.memcpyPeerAsync(
            target.ptr, self.index, source.ptr, other.index, source.nbytes, self.stream.ptr
        )

    def capture(self, launches: Callable[[], Any]) -> Callable[[], None]:
        with self.stream:
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                launches()
            except BaseException:
                with suppress(*cuda_errors.faults()):  # of streams that weren't joined
                    self.use()
                    self.stream.end_capture()
                raise
            self.use()  # captures of several GPUs lie within each other
            graph = self._ended()

        return partial(graph.launch, self.stream)  # no Python runs in it, so no signal's handler

    def _ended(self) -> Any:
        """The graph of the capture under way."""
        try:
            return self.stream.end_capture()
        except Exception as e:
            cuda_errors.met_on(self.name, e)
            raise

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        kind = self._runtime.memcpyDefault
        self._runtime.memcpyAsync(target, source, nbytes, kind, self.stream.ptr)
