"""A Device whose memory is the host's and whose kernels run on the CPU through kit/simt.h.

So host code that launches kernels is tested with them, without a GPU; clusters are left out
(capability 80). `Launcher` gives a device the names that host modules use of their ops.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlacli.backends.cuda_array import Array

try:
    from mlacli.backends.cuda_sources import signatures, source
except ImportError:
    from mlacli.backends.cuda_kernels import signatures, source

HERE = Path(__file__).parent
_TYPES = {"p": "void*", "i": "int", "l": "long long", "f": "float"}
# What kit/simt.h has not.
_MORE = """
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline double __longlong_as_double(long long x) { double d; memcpy(&d, &x, 8); return d; }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <class T, class V> inline T atomicMin(T* p, V v) {
    const T old = *p;
    if ((T)v < old) *p = (T)v;
    return old;
}
inline int __syncthreads_count(int p) {
    static thread_local int count;
    __syncthreads();
    count = 0;
    __syncthreads();
    count += p != 0;
    __syncthreads();
    return count;
}
"""
_CTYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_longlong, "f": ctypes.c_float}


@cache
def why_not() -> str:
    """Why kernels can't run on this CPU; empty when they can."""
    if shutil.which("g++") is None:
        return "needs g++"
    return "" if _include() else "needs a CUDA toolkit's headers for the host (CUDA_PATH)"


def _include() -> str:
    """A toolkit's include folder; NVRTC's own headers don't serve a host compiler."""
    for root in (os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"):
        if root and (Path(root) / "include" / "crt" / "host_defines.h").is_file():
            return f"{root}/include"
    return ""


class Launcher:
    """new, put, get and run on a device, as CudaOps has them."""

    def __init__(self, device: Any) -> None:
        self.device, self.n_sm, self.capability = device, device.n_sm, device.capability
        self.run = device.launch
        self.get = device.get

    def new(self, shape: tuple[int, ...], dtype: Any = "f4") -> Array:
        return self.device.take(shape, dtype)

    def put(self, host: np.ndarray) -> Array:
        array = self.device.take(host.shape, host.dtype)
        self.device.copy_in(array, host)
        return array


class SimtDevice:
    """Every take is a host array of its own, full of NaN bits."""

    n_sm, capability = 4, 80

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = Array.dense(0, shape, dtype)
        memory = np.full(array.nbytes + 64, 0xFF, np.uint8)
        self._held.append(memory)
        return Array.dense(-(-memory.ctypes.data // 16) * 16, shape, dtype)

    def mark(self) -> int:
        return 0

    def rewind(self, mark: int) -> None:
        """Nothing is used twice."""

    def copy_in(self, array: Array, host: np.ndarray) -> None:
        ctypes.memmove(array.ptr, np.ascontiguousarray(host).ctypes.data, array.nbytes)

    def get(self, array: Array) -> np.ndarray:
        host = np.empty(array.shape, array.dtype)
        ctypes.memmove(host.ctypes.data, array.ptr, array.nbytes)
        return host

    def launch(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        assert shared <= 227 << 10, "no SM has more shared memory"
        kinds = signatures()[name][1]
        values = [
            _CTYPES[kind](0 if arg is None else arg.ptr if kind == "p" else arg)
            for kind, arg in zip(kinds, args, strict=True)
        ]
        x, y, z = (*grid, 1, 1)[:3]
        _built(name, tuple(sorted(defines.items())))(x, y, z, block, *values)


@cache
def _built(name: str, defines: tuple[tuple[str, Any], ...]) -> Any:
    file, kinds = signatures()[name]
    text = source(file)
    kernel_types = re.search(rf"\b{name}\((.*?)\)\s*{{", text, re.S)
    assert kernel_types is not None
    casts = [
        f"({' '.join(p.split()[:-1])}{'*' * p.split()[-1].count('*')})a{i}"
        for i, p in enumerate(kernel_types[1].split(","))
    ]
    arrays = dict(re.findall(r"extern __shared__ (?:\w+\(\d+\) )?(\w+) (\w+)\[\]", text))
    shared = "".join(
        f"alignas(16) thread_local {kind} {array}[(227 << 10) / sizeof({kind})];\n"
        for kind, array in arrays.items()
    )
    parameters = "".join(f", {_TYPES[kind]} a{i}" for i, kind in enumerate(kinds))
    given = "\n".join(f"#define {key} {value}" for key, value in defines)
    unit = (
        f'#include "{HERE}/simt.h"\n{_MORE}\n{given}\n{text}\n{shared}'
        f'extern "C" void run(int x, int y, int z, int block{parameters}) {{\n'
        f"    simt::launch(dim3(x, y, z), dim3(block), {name}, {', '.join(casts)});\n}}\n"
    )
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += [f"-I{_include()}"]
    simt = (HERE / "simt.h").read_text()
    digest = hashlib.sha256(repr((unit, simt, flags)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "mlacli-simt"
    folder.mkdir(exist_ok=True)
    library = folder / f"{name}-{digest}.so"
    if not library.exists():
        made = folder / f"{digest}.tmp.so"
        subprocess.run(
            ["g++", *flags, "-x", "c++", "-", "-o", str(made)], input=unit, text=True, check=True
        )
        made.rename(library)
    run = ctypes.CDLL(str(library)).run
    run.argtypes = [ctypes.c_int] * 4 + [_CTYPES[kind] for kind in kinds]
    run.restype = None
    return run
