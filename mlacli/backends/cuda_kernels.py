"""Kernels of one device: source text, header inlining, typed signatures, launch.

CuPy's own launch checks nothing and has no attributes, so parameters are read from the kernels'
text and launches go to cuLaunchKernelEx, with programmatic dependent launch unless MLACLI_PDL=0.
"""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import cupy as cp

from mlacli.errors import BackendError

_CTYPES = {"p": ctypes.c_uint64, "i": ctypes.c_int, "l": ctypes.c_longlong, "f": ctypes.c_float}


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_byte * 64))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    )


def source(name: str) -> str:
    """kernels/<name>.cu with our own headers inlined, each once.

    CuPy's disk cache keys on this text, so a changed header can't be missed.
    """
    root, seen = _kernel_folder(), set[str]()

    def inlined(text: str) -> str:
        def header(match: re.Match[str]) -> str:
            if match[1] in seen:
                return ""
            seen.add(match[1])
            return inlined(
                root.joinpath("include", match[1]).read_text().replace("#pragma once", "")
            )

        return re.sub(r'#include "([\w.]+)"\n', header, text)

    return inlined(root.joinpath(f"{name}.cu").read_text())


def _kernel_folder() -> Traversable:
    """The package mlacli.kernels; in a checkout that isn't installed, the folder it maps."""
    try:
        return files("mlacli.kernels")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "kernels"


_KERNEL = re.compile(
    r'extern "C" __global__\s+(?:__\w+__\s*\([^)]*\)\s*)*void\s+'
    r"(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\(([^)]*)\)"
)
_KINDS = {"int": "i", "float": "f", "long": "l"}


@cache
def signatures() -> dict[str, tuple[str, str]]:
    """Kernel -> (file, parameters) of every kernel: p pointer, i int, l long long, f float."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(_kernel_folder().iterdir(), key=lambda path: path.name):
        if path.name.endswith(".cu"):
            for kernel, parameters in _KERNEL.findall(path.read_text()):
                assert kernel not in found, f"two kernels are called {kernel}"
                found[kernel] = path.name.removesuffix(".cu"), _kinds(parameters)
    return found


def _kinds(parameters: str) -> str:
    return "".join(
        "p" if "*" in one else _KINDS[one.replace("const ", "").split()[0]]
        for one in parameters.split(",")
    )


class Kernels:
    """Compiles kernels for the current device on first use and launches them on its stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._pdl = _Attribute(id=6)  # programmatic stream serialisation
        self._pdl.value[0] = 1
        self._use_pdl = os.environ.get("MLACLI_PDL", "1") != "0" and _capability() >= 90
        self._functions: dict[tuple[Any, ...], Any] = {}
        self.n_launches = 0

    def launch(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        """Run kernel `name`, compiled with -D of `defines`; args as its text declares them.

        `shared`: bytes of dynamic shared memory.
        """
        key = (name, *sorted(defines.items()))
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._compile(name, defines)
        if shared > 48 << 10 and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        signature = signatures()[name][1]
        assert len(args) == len(signature), f"{name}: {len(args)} arguments for {signature}"
        values: list[Any] = [
            _CTYPES[kind](_value(a, kind)) for a, kind in zip(args, signature, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        config = _Config(
            grid=(*grid, 1, 1)[:3], block=(block, 1, 1), shared=shared, stream=self.stream.ptr,
            attributes=ctypes.addressof(self._pdl) if self._use_pdl else None,
            n_attributes=int(self._use_pdl),
        )  # fmt: skip
        code = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function.kernel.ptr), pointers, None
        )
        if code:
            raise BackendError(f"launching {name} failed with CUDA error {code}")
        self.n_launches += 1

    @staticmethod
    def _compile(name: str, defines: dict[str, Any]) -> Any:
        options = ("-std=c++17", *(f"-D{key}={value}" for key, value in sorted(defines.items())))
        text = source(signatures()[name][0])
        try:
            function = cp.RawModule(code=text, options=options).get_function(name)
            _ = function.kernel  # compiles now
        except cp.cuda.compiler.CompileException as e:
            log = "\n".join(str(e).splitlines()[:20])
            raise BackendError(f"kernels/{signatures()[name][0]}.cu does not compile: {log}") from e
        return function


def _value(arg: Any, kind: str) -> Any:
    if kind != "p":
        return float(arg) if kind == "f" else int(arg)
    return 0 if arg is None else arg.ptr


@cache
def _capability() -> int:
    return int(cp.cuda.Device().compute_capability)
