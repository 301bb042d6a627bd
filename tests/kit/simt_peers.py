"""Several GPUs on this CPU: launches are kept in a queue a GPU and run together by kit/simt.h.

`PeerRig(ranks of each GPU)` stands in for devices and memory of backends/cuda_peer.PeerWay, whose
host code and kernels run as they are. `run(seed)` lets the GPUs take turns as drawn from the seed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from kit.simt import library

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_group import GpuPlace, Group, Mail
from mlacli.backends.cuda_sources import signatures, source

_C = {"p": "void*", "i": "int", "l": "long long"}
COPY, SENDS = -1, 1000  # a stand-in for a product; behind the variant whose packets it sends


class RigDevice:
    """A GPU's stream: launches are noted."""

    n_sm = 2

    def __init__(self, rig: PeerRig, index: int) -> None:
        self.rig, self.index, self.name = rig, index, f"cuda{index}"

    def launch(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, **defines: Any
    ) -> None:
        kinds = signatures()[name][1]
        values = [
            0 if arg is None else arg.ptr if kind == "p" else int(arg)
            for kind, arg in zip(kinds, args, strict=True)
        ]
        self.rig.note(self.index, self.rig.variant(name, defines), grid[0], block, values)


class PeerRig:
    """GPUs, their memory and what was launched on them."""

    def __init__(self, ranks: list[list[int]], reduce_type: str = "f32", limit_ms: int = 1000):
        self.variants: list[tuple[str, tuple[tuple[str, Any], ...]]] = []
        self.works: list[tuple[int, int, int, int, list[int]]] = []
        self._held: list[np.ndarray] = []
        self.devices = [RigDevice(self, i) for i in range(len(ranks))]
        places = tuple(GpuPlace(d, r) for d, r in zip(self.devices, ranks, strict=True))
        self.group = Group(places, reduce_type, limit_ms)
        self.changed: tuple[str, str] | None = None  # text to replace in kernels, with what

    # ---- memory, as PeerMemory

    def take(self, device: int, nbytes: int) -> int:
        self._held.append(np.full(nbytes + 256, 0xFF, np.uint8))
        return -(-self._held[-1].ctypes.data // 256) * 256

    def page(self, nbytes: int) -> Any:
        at = self.take(0, nbytes)
        page = type("Page", (), {})()
        page.ptr = at
        page.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(at))
        page.bytes[:] = 0
        return page

    def clear(self, device: int, ptr: int, nbytes: int) -> None:
        ctypes.memset(ptr, 0, nbytes)

    def write(self, device: int, ptr: int, host: np.ndarray) -> None:
        ctypes.memmove(ptr, host.ctypes.data, host.nbytes)

    def close(self) -> None:
        self._held.clear()

    def put(self, host: np.ndarray) -> Array:
        array = Array.dense(self.take(0, host.nbytes), host.shape, host.dtype)
        ctypes.memmove(array.ptr, host.ctypes.data, host.nbytes)
        return array

    def get(self, array: Array) -> np.ndarray:
        host = np.empty(array.shape, array.dtype)
        ctypes.memmove(host.ctypes.data, array.ptr, array.nbytes)
        return host

    # ---- launches

    def variant(self, name: str, defines: dict[str, Any]) -> int:
        key = name, tuple(sorted(defines.items()))
        if key not in self.variants:
            self.variants.append(key)
        return self.variants.index(key)

    def note(self, gpu: int, variant: int, grid: int, block: int, values: list[int]) -> None:
        self.works.append((gpu, variant, grid, block, values))

    def copy(self, gpu: int, to: Array, source: Array) -> None:
        """In the GPU's order: what a product would write."""
        self.note(gpu, COPY, 1, 1, [to.ptr, source.ptr, source.nbytes])

    def send(self, gpu: int, mail: Mail, partial: Array) -> None:
        """In the GPU's order: what a product would send of `partial`."""
        defines = {"N_GPUS": mail.n_gpus, "N_RANKS": self.group.n_ranks}
        at = self.variant("reduce_sent", defines)
        n = partial.size
        self.note(gpu, at + SENDS, 3, 32, [mail.words.ptr, partial.ptr, n])

    def run(self, seed: int, gpus: set[int] | None = None) -> None:
        """All that was launched, or that on `gpus` alone; launches are forgotten."""
        works = [work for work in self.works if gpus is None or work[0] in gpus]
        rows = np.array([[*work[:4], len(work[4])] for work in works], np.int32)
        values = np.array([v for work in works for v in work[4]], np.int64)
        run = library(self._text()).run
        run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
        run.restype = None
        run(len(self.devices), len(rows), rows.ctypes.data, values.ctypes.data, seed)
        self.works.clear()

    def _text(self) -> str:
        parts: list[str] = []
        makers: list[str] = []
        for i, (name, defines) in enumerate(self.variants):
            file, _ = signatures()[name]
            text = source(file).replace('extern "C" __global__', "inline")
            if self.changed:
                text = text.replace(*self.changed)
            macros = [key for key, _ in defines]
            macros += ["UNROLL", "PEER_CTAS", "PEER_TICKS", "PEER_POLLS"]
            parts += [f"#define {key} {value}" for key, value in defines]
            sender = _SENDER if name == "reduce_sent" else ""
            parts += [f"namespace variant{i} {{", text, sender, "}"]
            parts += [f"#undef {key}" for key in macros]
            makers.append(f"case {i}: return bound(variant{i}::{name}, at);")
            if sender:
                makers.append(f"case {i + SENDS}: return bound(variant{i}::send_partial, at);")
        return "\n".join(parts) + _RUN.replace("CASES", "\n".join(makers))


_SENDER = """
inline void send_partial(const void* words, const float* partial, int n) {
    Post<N_GPUS> post;
    post.open(words);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        post.send(i, partial[i]);
}
"""
_RUN = """
template <class A> A value(const long long*& at) { return (A)*at++; }
template <class... A> std::function<void()> bound(void (*kernel)(A...), const long long* at) {
    std::tuple<A...> given{value<A>(at)...};
    return [=] { std::apply(kernel, given); };
}
std::function<void()> work(int variant, const long long* at) {
    switch (variant) {
    CASES
    }
    return [=] { memcpy((void*)at[0], (void*)at[1], at[2]); };
}
extern "C" void run(int n_devices, int n, const int* rows, const long long* values, unsigned seed) {
    std::vector<std::vector<simt::Work>> queues(n_devices);
    for (int i = 0; i < n; i++, rows += 5, values += rows[-1])
        queues[rows[0]].push_back({(unsigned)rows[2], (unsigned)rows[3], work(rows[1], values)});
    simt::run_devices(queues, seed);
}
"""
