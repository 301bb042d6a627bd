"""Kernels as functions on the CPU: a .cu file under simt.h, built by g++, given NumPy arrays."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_sources import signatures, source

KIT = Path(__file__).parent
_C = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_longlong, "f": ctypes.c_float}


def include_path() -> str | None:
    """A folder with all CUDA headers that the shim needs (wheels leave some out); None without."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += sorted(Path("/usr/local").glob("cuda*/include"))
    whole = [f for f in folders if (f / "crt" / "host_defines.h").exists()]
    return str(whole[0]) if whole else None


@cache
def kernel(name: str, shared: int = 0, **defines: Any) -> Callable[..., None]:
    """f(grid, block, *args): runs kernel `name` built with `defines`; writes into the arrays."""
    file, kinds = signatures()[name]
    text, folder = source(file), Path(mkdtemp(prefix="simt"))
    dynamic = re.search(r"extern __shared__ (\w+) (\w+)\[\];", text)
    memory = ""
    if dynamic:
        of, at = dynamic[1], dynamic[2]
        memory = f"alignas(128) thread_local {of} {at}[{max(shared, 16)} / sizeof({of}) + 1];"
    types = {"p": "void*", "i": "int", "l": "long long", "f": "float"}
    parameters = ", ".join(f"{types[kind]} a{i}" for i, kind in enumerate(kinds))
    match = re.search(rf"\b{name}\(([^)]*)\)", text)
    assert match
    casts = [p.rsplit("*", 1)[0] + "*" if "*" in p else "" for p in match[1].split(",")]
    args = ", ".join(f"({c.strip()})a{i}" if c else f"a{i}" for i, c in enumerate(casts))
    given = "".join(f"#define {k} {v}\n" for k, v in defines.items())
    if "BULK_SIM" in defines:
        given += f'#include "{KIT}/bulk_sim.h"\n'
    (folder / "kernel.cpp").write_text(
        f'#include "{KIT}/simt.h"\n{given}\n{text}\n{memory}\n'
        f'extern "C" void simt_run(int x, int y, int z, int block, {parameters}) {{\n'
        f"    simt::launch(dim3(x, y, z), dim3(block), {name}, {args});\n}}\n"
    )
    command = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{include_path()}",
               "kernel.cpp", "-o", "kernel.so"]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    run = ctypes.CDLL(str(folder / "kernel.so")).simt_run
    run.argtypes, run.restype = [ctypes.c_int] * 4 + [_C[kind] for kind in kinds], None

    def call(grid: tuple[int, ...], block: int, *given: Any) -> None:
        values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in given]
        run(*(*grid, 1, 1)[:3], block, *values)

    return call


class SimtOps:
    """What host modules need of CudaOps, on this machine's memory; scratch begins as NaN."""

    def __init__(self, n_sm: int = 4, capability: int = 80) -> None:
        self.n_sm, self.capability = n_sm, capability
        self._held: dict[int, np.ndarray[Any, Any]] = {}

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        return self.put(np.full(shape, 0xFF, np.uint8).repeat(np.dtype(dtype).itemsize, -1), dtype)

    def put(self, host: np.ndarray[Any, Any], dtype: Any = None) -> Array:
        """`host` itself where it is dense, as `dtype`."""
        host = np.ascontiguousarray(host)
        host = host if dtype is None else host.view(dtype)
        self._held[host.ctypes.data] = host
        return Array.dense(host.ctypes.data, host.shape, host.dtype)

    def get(self, array: Array) -> np.ndarray[Any, Any]:
        return self._held[array.ptr].reshape(array.shape)

    def run(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **how: Any) -> None:
        if name == "mla_decode_mma" and self.capability >= 90:
            how["BULK_SIM"] = "attention_memory"
        pointers = [a.ptr if isinstance(a, Array) else a for a in args]
        kernel(name, **how)(grid, block, *pointers)
