"""Kernels as functions on the CPU: a .cu file under simt.h, built by g++ and kept by its hash."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mlacli.backends.cuda_sources import signatures, source

KIT = Path(__file__).parent
MOST_SHARED = 227 << 10  # bytes that a block may have on an SM
C = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_longlong, "f": ctypes.c_float}
_TYPES = {"p": "void*", "i": "int", "l": "long long", "f": "float"}
# Without it every use of a dynamic array calls a function of its thread.
_FLAGS = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off",
          "-fno-extern-tls-init")  # fmt: skip


@cache
def why_not() -> str:
    """Why kernels can't run on this CPU; empty when they can."""
    if shutil.which("g++") is None:
        return "needs g++"
    return "" if headers() else "needs a CUDA toolkit's headers for the host (crt/host_defines.h)"


@cache
def headers() -> str:
    """A toolkit's include folder, whole; CuPy's wheels leave out what a host compiler needs."""
    roots = [os.environ.get("CUDA_PATH", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")))]
    if nvcc := shutil.which("nvcc"):
        roots.append(str(Path(nvcc).resolve().parents[1]))
    found = [r for r in roots if r and Path(r, "include", "crt", "host_defines.h").is_file()]
    return f"{found[0]}/include" if found else ""


@cache
def kernel(name: str, defines: tuple[tuple[str, Any], ...]) -> Callable[..., None]:
    """f(x, y, z, block, *args): runs kernel `name` built with `defines` on addresses and numbers.

    BULK_SIM = the name of its dynamic array: its bulk copies are those of bulk_sim.h.
    """
    file, kinds = signatures()[name]
    text = source(file)
    found = re.search(rf"\b{name}\((.*?)\)\s*{{", text, re.S)
    assert found is not None
    casts = [
        f"({' '.join(p.split()[:-1])}{'*' * p.split()[-1].count('*')})a{i}"
        for i, p in enumerate(found[1].split(","))
    ]
    arrays = re.findall(r"extern __shared__ (?:\w+\(\d+\) )?(\w+(?: \w+)*) (\w+)\[\]", text)
    shared = "".join(
        f"alignas(128) thread_local {kind} {array}[{MOST_SHARED} / sizeof({kind})];\n"
        for array, kind in {array: kind for kind, array in arrays}.items()
    )
    given = "".join(f"#define {key} {value}\n" for key, value in defines)
    if "BULK_SIM" in dict(defines):
        given += f'#include "{KIT}/bulk_sim.h"\n'
    parameters = "".join(f", {_TYPES[kind]} a{i}" for i, kind in enumerate(kinds))
    run = library(
        f"{given}\n{text}\n{shared}"
        f'extern "C" void simt_run(int x, int y, int z, int block{parameters}) {{\n'
        f"    simt::launch(dim3(x, y, z), dim3(block), {name}, {', '.join(casts)});\n}}\n"
    ).simt_run
    run.argtypes = [ctypes.c_int] * 4 + [C[kind] for kind in kinds]
    run.restype = None
    return run


def library(unit: str) -> ctypes.CDLL:
    """`unit`, which simt.h comes before, as a library."""
    headers = ("simt.h", "barrier_sim.h", "bulk_sim.h")
    digest = _digest(unit, *(KIT.joinpath(file).read_text() for file in headers))
    made = _folder() / f"{digest}.so"
    if not made.exists():
        _build(made, "c++", "-", f'#include "{_precompiled()}"\n{unit}')
    return ctypes.CDLL(str(made))


@cache
def _precompiled() -> Path:
    """A copy of simt.h with its precompiled form beside it: half of the time of a build."""
    text = (KIT / "simt.h").read_text()
    folder = _folder() / _digest(text)
    folder.mkdir(exist_ok=True)
    header = folder / "simt.h"
    if not (folder / "simt.h.gch").exists():
        header.write_text(text)
        _build(folder / "simt.h.gch", "c++-header", str(header))
    return header


def _build(made: Path, language: str, file: str, text: str = "") -> None:
    own = made.with_name(f"{os.getpid()}.{made.name}")  # others may build it too
    command = ["g++", *_FLAGS, f"-I{headers()}", "-x", language, file, "-o", str(own)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    own.rename(made)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"mlacli-simt-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def _digest(*texts: str) -> str:
    return hashlib.sha256(repr((texts, _FLAGS, headers())).encode()).hexdigest()[:24]
