"""CUDA devices through CuPy: whether there are any, and how much memory they have."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mlacli.errors import BackendError


def device_count() -> int:
    """How many GPUs CuPy sees; 0 without CuPy or driver."""
    try:
        return int(_cupy("cuda0").cuda.runtime.getDeviceCount())
    except (BackendError, RuntimeError):
        return 0


def device_memory(name: str) -> tuple[int, int]:
    """(total, free) bytes of `cudaN`; BackendError says what is missing."""
    device, runtime = _device(name), _cupy(name).cuda.runtime
    try:
        with device:
            free, total = runtime.memGetInfo()
    except runtime.CUDARuntimeError as e:
        raise BackendError(f"device {name} is not available: {e}") from e
    return int(total), int(free)


def device_capability(name: str) -> int:
    """The compute capability that `cudaN` runs code of, 90 for 9.0: its own, or MLACLI_ARCH's."""
    device = _device(name)
    from mlacli.backends.cuda_compile import capability  # needs CuPy

    return capability(int(device.compute_capability))


def use_device(name: str) -> None:
    """Make `cudaN` this thread's current device."""
    _device(name).use()


def current_device() -> str:
    """This thread's current device."""
    return f"cuda{int(_cupy('cuda0').cuda.runtime.getDevice())}"


def _device(name: str) -> Any:
    cp = _cupy(name)
    try:
        count = cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as e:
        raise BackendError(
            f"device {name} is not available: {e}", "check the driver with nvidia-smi"
        ) from None
    index = int(name.removeprefix("cuda"))
    if index >= count:
        raise BackendError(
            f"device {name} is not available: there are {count} CUDA devices",
            "CUDA_VISIBLE_DEVICES decides which are seen",
        )
    return cp.cuda.Device(index)


def _cupy(device: str) -> ModuleType:
    try:
        import cupy
    except ImportError:
        raise BackendError(
            f"device {device} is not available: CuPy is not installed",
            "install mlacli[cuda13], or mlacli[cuda12] for an older driver; or use -dev cpu",
        ) from None
    module: ModuleType = cupy
    return module
