"""Kernels as functions on the CPU: a .cu file under simt.h, built by g++, called with NumPy arrays."""

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

from mlacli.backends.cuda_kernels import signatures, source

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
    """f(grid, block, *args): runs kernel `name` built with `defines`; arrays are changed in place."""
    file, kinds = signatures()[name]
    text, folder = source(file), Path(mkdtemp(prefix="simt"))
    dynamic = re.search(r"extern __shared__ (\w+) (\w+)\[\];", text)
    memory = ""
    if dynamic:
        memory = f"alignas(128) thread_local {dynamic[1]} {dynamic[2]}[{max(shared, 16)} / sizeof({dynamic[1]}) + 1];"
    types = {"p": "void*", "i": "int", "l": "long long", "f": "float"}
    parameters = ", ".join(f"{types[kind]} a{i}" for i, kind in enumerate(kinds))
    match = re.search(rf"\b{name}\(([^)]*)\)", text)
    assert match
    casts = [p.rsplit("*", 1)[0] + "*" if "*" in p else "" for p in match[1].split(",")]
    args = ", ".join(f"({c.strip()})a{i}" if c else f"a{i}" for i, c in enumerate(casts))
    (folder / "kernel.cpp").write_text(
        f'#include "{KIT}/simt.h"\n{text}\n{memory}\nextern "C" void simt_run(int x, int y, int z, int block, '
        f"{parameters}) {{ simt::launch(dim3(x, y, z), dim3(block), {name}, {args}); }}\n"
    )
    command = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{include_path()}",
               *(f"-D{k}={v}" for k, v in defines.items()), "kernel.cpp", "-o", "kernel.so"]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    run = ctypes.CDLL(str(folder / "kernel.so")).simt_run
    run.argtypes, run.restype = [ctypes.c_int] * 4 + [_C[kind] for kind in kinds], None

    def call(grid: tuple[int, ...], block: int, *given: Any) -> None:
        values = [
            a.ctypes.data if isinstance(a, np.ndarray) else a for a in given
        ]
        run(*(*grid, 1, 1)[:3], block, *values)

    return call
