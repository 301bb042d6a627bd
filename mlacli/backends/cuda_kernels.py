"""Kernels of one device: compiled ahead, loaded, launched with checked arguments.

CuPy's own launch checks nothing and has no attributes, so parameters are read from the kernels'
text and launches go to cuLaunchKernelEx, with programmatic dependent launch unless MLACLI_PDL=0.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import cupy as cp

from mlacli.backends import cuda_errors
from mlacli.backends.cuda_compile import Unit, binaries, capability, target
from mlacli.backends.cuda_sources import debugging, signatures, source
from mlacli.errors import BackendError

__all__ = ["Kernels", "signatures", "source"]

_REFUSED = (200, 209, 218, 222, 223, 300)  # what modules fail with that the driver can't take
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
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


@dataclass(slots=True)
class _Function:
    """A loaded kernel and the dynamic shared memory it has been told to allow."""

    ptr: int
    signature: str
    shared: int = 0


@dataclass(slots=True)
class _Loaded:
    """What one GPU has loaded, for all its ranks, which load in a thread each, and later engines.

    It stays until the process ends: graphs of a closed engine may still refer to it, and the next
    engine finds it there.
    """

    modules: dict[Unit, int] = field(default_factory=dict)
    functions: dict[tuple[Any, ...], _Function] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)


_LOADED: dict[tuple[int, str, bool], _Loaded] = {}  # by GPU, compiler's target, debugging


class Kernels:
    """Kernels of the current device, compiled before their first launch, launched on a stream.

    Those of `beside`, for the same GPU, are loaded once for both.
    """

    def __init__(self, stream: Any, beside: Kernels | None = None) -> None:
        self.stream = stream
        device = int(cp.cuda.Device().compute_capability)
        self.capability, self.target = capability(device), target(device)
        self.n_launches = self.n_compiled = 0
        self.compile_s = 0.0
        self.trouble = ""  # why compiled kernels can't be kept on disk
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._pdl = _Attribute(id=6)  # programmatic stream serialisation
        self._pdl.value[0] = 1
        self._use_pdl = os.environ.get("MLACLI_PDL", "1") != "0" and self.capability >= 90
        key = int(cp.cuda.Device().id), self.target, debugging()
        found = _LOADED.setdefault(key, _Loaded()) if beside is None else beside._loaded
        self._loaded: _Loaded = found
        self._functions = self._loaded.functions
        self._follows = False  # another stream, so that the next kernel must wait for all of it
        self._noted: dict[tuple[Any, ...], None] | None = None

    def launch(
        self, name: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0,
        **defines: Any,
    ) -> None:  # fmt: skip
        """Run kernel `name`, compiled with -D of `defines`; args as its text declares them.

        `shared`: bytes of dynamic shared memory.
        """
        key = (name, *sorted(defines.items()))
        if self._noted is not None:
            self._noted[key] = None
            return
        if key not in self._functions:
            self.prepare([(name, defines)])
        function = self._functions[key]
        if shared > function.shared:
            cp.cuda.driver.funcSetAttribute(function.ptr, _MAX_DYNAMIC_SHARED, shared)
            function.shared = shared
        signature = function.signature
        assert len(args) == len(signature), f"{name}: {len(args)} arguments for {signature}"
        values: list[Any] = [
            _CTYPES[kind](_value(a, kind)) for a, kind in zip(args, signature, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        early, self._follows = self._use_pdl and not self._follows, False
        config = _Config(
            grid=(*grid, 1, 1)[:3], block=(block, 1, 1), shared=shared, stream=self.stream.ptr,
            attributes=ctypes.addressof(self._pdl) if early else None, n_attributes=int(early),
        )  # fmt: skip
        code = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function.ptr), pointers, None
        )
        if code:
            error = cuda_errors.of_code(code)
            raise BackendError(f"launching {name} failed: {cuda_errors.words(error)}") from error
        self.n_launches += 1

    def follow(self) -> None:
        """The stream has been made to wait for another: what comes next starts after that."""
        self._follows = True

    @property
    def noting(self) -> bool:
        """Whether launches are only noted, see prepared()."""
        return self._noted is not None

    @contextmanager
    def prepared(self, report: Callable[[int, int], None] | None = None) -> Iterator[None]:
        """Inside, launches are only noted; at the end, what they need is compiled all at once."""
        assert self._noted is None, "one dry run at a time"
        noted: dict[tuple[Any, ...], None] = {}
        self._noted = noted
        try:
            yield
        finally:
            self._noted = None
        self.prepare(((name, dict(defines)) for name, *defines in noted), report)

    def prepare(
        self, wanted: Iterable[tuple[str, Mapping[str, Any]]],
        report: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Compile, in parallel, and load what isn't there of kernels with their defines."""
        units: dict[tuple[Any, ...], Unit] = {
            (name, *sorted(defines.items())): Unit.of(signatures()[name][0], defines)
            for name, defines in wanted
        }
        with self._loaded.lock:
            self._prepare(units, report)

    def _prepare(
        self, units: Mapping[tuple[Any, ...], Unit], report: Callable[[int, int], None] | None
    ) -> None:
        modules = self._loaded.modules
        missing = [unit for unit in units.values() if unit not in modules]
        done = binaries(missing, self.target, report)
        self.n_compiled += done.n_compiled
        self.compile_s += done.seconds
        self.trouble = self.trouble or done.trouble
        for unit, image in done.images.items():
            modules[unit] = self._load(unit, image)
        for key, unit in units.items():
            if key not in self._functions:
                ptr = cp.cuda.driver.moduleGetFunction(modules[unit], key[0])
                self._functions[key] = _Function(ptr, signatures()[key[0]][1])

    def _load(self, unit: Unit, image: bytes) -> int:
        try:
            return int(cp.cuda.driver.moduleLoadData(image))
        except cp.cuda.driver.CUDADriverError as e:
            if e.status not in _REFUSED:
                raise
            raise BackendError(
                f"the driver refuses kernels/{unit.file}.cu as {self.target}: {e}",
                "the driver is older than the compiler: update it, or install mlacli[cuda12]",
            ) from None


def _value(arg: Any, kind: str) -> Any:
    if kind != "p":
        return float(arg) if kind == "f" else int(arg)
    return 0 if arg is None else arg.ptr
