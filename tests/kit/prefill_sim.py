"""Runs expanded prefill's kernels on the CPU, through the host code that launches them on a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_kernels import signatures

KIT, HARNESS = Path(__file__).parent, Path(__file__).parents[1] / "kernels/prefill_harness.cpp"
KERNELS = Path(__file__).parents[2] / "kernels"
STOOD_IN = ("warpgroup.cuh", "bulk_copy.cuh", "pdl.cuh")


class SimulatedOps:
    """`cuda_prefill.Launcher` whose device memory is NumPy's, fresh memory being NaN."""

    def __init__(self, folder: Path, include: str, n_sm: int = 4) -> None:
        self.folder, self.include, self.n_sm = folder, include, n_sm
        self._memory: list[np.ndarray] = []
        self.launched: list[str] = []

    def new(self, shape: tuple[int, ...], dtype: Any = "f4") -> Array:
        return self.put(np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
                        .view(dtype).reshape(shape))  # fmt: skip

    def put(self, host: np.ndarray) -> Array:
        aligned = np.empty(host.nbytes + 256, np.uint8)
        start = -aligned.ctypes.data % 256
        kept = aligned[start : start + host.nbytes]
        kept[:] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        self._memory.append(kept)
        return Array.dense(kept.ctypes.data, host.shape, host.dtype)

    def get(self, array: Array) -> np.ndarray:
        memory = next(m for m in self._memory if m.ctypes.data == array.ptr)
        return memory.view(array.dtype).reshape(array.shape).copy()

    def run(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        self.launched.append(name)
        kinds, words = signatures()[name][1], []
        for kind, value in zip(kinds, args, strict=True):
            if kind == "p":
                words.append(0 if value is None else value.ptr)
            elif kind == "f":
                words.append(struct.unpack("q", struct.pack("d", value))[0])
            else:
                words.append(int(value))
        library = self._compiled(name, defines)
        library.run(*(*grid, 1)[:2], block, (ctypes.c_longlong * len(words))(*words))

    def _compiled(self, name: str, defines: dict[str, Any]) -> ctypes.CDLL:
        text = re.sub(r"extern __shared__ [^;]*;", "", inlined(f"{signatures()[name][0]}.cu"))
        sizes = "".join(f"#define {key} {value}\n" for key, value in sorted(defines.items()))
        text = sizes + text  # not as options: K and the like are names in the C++ library
        flags = [f"-DKERNEL={name}"]
        kit = "".join((KIT / f).read_text() for f in ("simt.h", "barrier_sim.h", "warpgroup_sim.h"))
        made_of = repr((text, flags, kit, HARNESS.read_text()))
        folder = self.folder / hashlib.sha256(made_of.encode()).hexdigest()[:16]
        if not (folder / "kernel.so").exists():
            folder.mkdir(exist_ok=True)
            (folder / "kernel_text.h").write_text(text)
            subprocess.run(
                ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{KIT}",
                 f"-I{self.include}", *flags, str(HARNESS), "-o", str(folder / "kernel.so")],
                check=True,
            )  # fmt: skip
        return ctypes.CDLL(str(folder / "kernel.so"))


def inlined(file: str, seen: set[str] | None = None) -> str:
    """kernels/<file> with our headers in their places, each once, but for those stood in for."""
    seen = set(STOOD_IN) if seen is None else seen

    def header(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return inlined(f"include/{match[1]}", seen).replace("#pragma once", "")

    return re.sub(r'#include "([\w.]+)"\n', header, (KERNELS / file).read_text())
