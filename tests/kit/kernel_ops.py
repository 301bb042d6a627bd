"""Just enough of CudaOps to launch kernels by name: on a GPU, or by simt.h on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_sources import kernel_folder, signatures, source

KIT = Path(__file__).parent


class SimtOps:
    """Kernels built by g++ and run on the CPU, thread after thread; arrays are NumPy's."""

    n_sm, capability = 2, 90

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.gettempdir(), f"simt-{os.getuid()}")
        self.folder.mkdir(exist_ok=True)
        self._libraries: dict[Any, Any] = {}
        self._held: list[np.ndarray] = []

    @staticmethod
    def why_not() -> str:
        if shutil.which("g++") is None:
            return "no g++ to build kernels with"
        return "" if cuda_headers() else "no CUDA toolkit headers (crt/host_defines.h)"

    def put(self, host: np.ndarray) -> Array:
        space = np.zeros(host.nbytes + 512, np.uint8)
        at = -space.ctypes.data % 256
        held = space[at : at + host.nbytes]
        held[:] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        self._held.append(held)
        return Array.dense(held.ctypes.data, host.shape, host.dtype)

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 255  # NaN, -1
        return self.put(array)

    def get(self, array: Array) -> np.ndarray:
        kind = np.ctypeslib.as_ctypes_type(array.dtype)
        pointer = ctypes.cast(array.ptr, ctypes.POINTER(kind))
        return np.ctypeslib.as_array(pointer, array.shape).copy()

    def run(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        key = (name, *sorted(defines.items()))
        if key not in self._libraries:
            self._libraries[key] = self._build(name, defines)
        kinds = signatures()[name][1]
        assert len(args) == len(kinds), f"{name}: {len(args)} arguments for {kinds}"
        words = (ctypes.c_uint64 * len(args))()
        for i, (kind, arg) in enumerate(zip(kinds, args, strict=True)):
            if kind == "p":
                words[i] = 0 if arg is None else arg.ptr
            elif kind == "f":
                words[i] = int(np.float32(arg).view(np.uint32))
            else:
                words[i] = int(arg) & (2**64 - 1)
        self._libraries[key].simt_run(*(*grid, 1, 1)[:3], block, words)

    def _build(self, name: str, defines: dict[str, Any]) -> Any:
        file = signatures()[name][0]
        text = kernel_folder().joinpath(f"{file}.cu").read_text()
        found = re.search(rf"\b{name}\(([^)]*)\)", text)
        assert found is not None
        args = []
        for i, one in enumerate(found[1].split(",")):
            kind = " ".join(re.split(r"\w+\s*$", one)[0].split())
            args.append(f"*(float*)&a[{i}]" if kind == "float" else f"({kind})a[{i}]")
        main = (
            f'#include "simt.h"\n{source(file)}\n'
            "alignas(128) thread_local unsigned char ring[1 << 18];  // dynamic shared memory\n"
            'extern "C" void simt_run(unsigned x, unsigned y, unsigned z, unsigned block,'
            " unsigned long long* a) {\n"
            f"simt::launch(dim3(x, y, z), dim3(block), {name}, {', '.join(args)});\n}}\n"
        )
        words = [f"-D{key}={value}" for key, value in sorted(defines.items())]
        flags = [
            "-std=c++17",
            "-O1",
            "-w",
            "-fno-extern-tls-init",
            "-shared",
            "-fPIC",
            f"-I{KIT}",
            f"-I{cuda_headers()}",
        ]
        simt = (KIT / "simt.h").read_text()
        digest = hashlib.sha256(repr((main, words, flags, simt)).encode()).hexdigest()[:24]
        path = self.folder / f"{digest}.so"
        if not path.exists():
            (self.folder / f"{digest}.cpp").write_text(main)
            command = [
                "g++",
                *flags,
                *words,
                str(self.folder / f"{digest}.cpp"),
                "-o",
                f"{path}.new",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:4000]
            os.replace(f"{path}.new", path)
        return ctypes.CDLL(str(path))


def cuda_headers() -> str:
    """A CUDA toolkit's include folder, whole: CuPy's wheels lack crt/."""
    roots = [os.environ.get("CUDA_HOME", ""), *map(str, Path("/usr/local").glob("cuda*"))]
    found = [r for r in roots if r and Path(r, "include/crt/host_defines.h").exists()]
    return f"{found[0]}/include" if found else ""


@dataclass
class GpuOps:
    """Kernels on the current GPU; arrays are never freed."""

    stream: Any = None
    kernels: Any = None
    held: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        import cupy as cp

        from mlacli.backends.cuda_kernels import Kernels

        self.stream = cp.cuda.Stream(non_blocking=True)
        self.kernels = Kernels(self.stream)
        self.n_sm = cp.cuda.Device().attributes["MultiProcessorCount"]
        self.capability = self.kernels.capability

    def put(self, host: np.ndarray) -> Array:
        import cupy as cp

        held = cp.asarray(np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        cp.cuda.Device().synchronize()
        self.held.append(held)
        return Array.dense(held.data.ptr, host.shape, host.dtype)

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 255
        return self.put(array)

    def get(self, array: Array) -> np.ndarray:
        import cupy as cp

        self.stream.synchronize()
        memory = cp.cuda.UnownedMemory(array.ptr, array.nbytes, self)
        view = cp.ndarray((array.nbytes,), cp.uint8, cp.cuda.MemoryPointer(memory, 0))
        return cp.asnumpy(view).view(array.dtype).reshape(array.shape)

    def run(self, *args: Any, **more: Any) -> None:
        self.kernels.launch(*args, **more)
