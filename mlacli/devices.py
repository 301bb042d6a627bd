"""Which devices there are and how much memory they have; no array library."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mlacli.errors import UsageError
from mlacli.params import SplitParams

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """A place to compute on. `total` and `free` in bytes; kind "planned" needn't exist.

    `capability`: of a GPU, 90 for compute capability 9.0, which planned ones are taken for.
    """

    name: str
    kind: Literal["cpu", "cuda", "planned"]
    total: int
    free: int
    capability: int = 90


def find_devices(split: SplitParams) -> tuple[Device, ...]:
    """The devices of -dev, or those that --vram describes."""
    if split.vram:
        return tuple(Device(f"gpu{i}", "planned", n, n) for i, n in enumerate(split.vram))
    return tuple(_device(name) for name in split.devices)


def _device(name: str) -> Device:
    if name == "cpu":
        return Device(name, "cpu", *host_memory())
    from mlacli.backends.cuda_devices import device_capability, device_memory

    return Device(name, "cuda", *device_memory(name), device_capability(name))


def default_devices() -> tuple[str, ...]:
    """Without -dev: all GPUs of this machine, or the CPU where there are none."""
    return tuple(f"cuda{i}" for i in range(gpu_count())) or ("cpu",)


def gpu_count() -> int:
    """How many GPUs CuPy would see; asked of the driver, which is quicker than importing CuPy."""
    return 0 if find_spec("cupy") is None else _driver_gpus()


def idle_gpus() -> int:
    """How many GPUs this machine has that can't be used, as CuPy isn't installed."""
    return _driver_gpus() if find_spec("cupy") is None else 0


def _driver_gpus() -> int:
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def present_devices() -> tuple[Device, ...]:
    """Every device of this machine that a model can run on."""
    from mlacli.backends.cuda_devices import device_count

    gpus = tuple(f"cuda{i}" for i in range(device_count()))
    return find_devices(SplitParams(devices=("cpu", *gpus)))


def main_device(split: SplitParams, devices: tuple[Device, ...]) -> Device:
    """The device that -mg names; UsageError when there are fewer."""
    if split.main_gpu >= len(devices):
        raise UsageError(
            f"-mg {split.main_gpu} names no device: there are {len(devices)}",
            f"give an index from 0 to {len(devices) - 1}",
        )
    return devices[split.main_gpu]


def host_memory() -> tuple[int, int]:
    """(total, available) bytes of this host, bounded by the limits of control group and process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        free = _kilobytes("/proc/meminfo", "MemAvailable:")
    except (OSError, StopIteration):
        free = total // 2  # no such file outside Linux: take half
    for limit, left in (*_group_limits(), *_process_limit()):
        total, free = min(total, limit), min(free, max(0, left))
    return total, free


def _kilobytes(path: str, word: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(word)) * 1024


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes left) of this process's control group and those above it (version 2).

    Pages of files count as used there, but make room when it gets tight.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line[4:] for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration):
        return
    leaf = CGROUPS / own
    for folder in (leaf, *leaf.parents):
        if not folder.is_relative_to(CGROUPS):
            return
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
                pages = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
                yield int(limit), int(limit) - used + pages
        except (OSError, ValueError):
            continue


def _process_limit() -> Iterator[tuple[int, int]]:
    """The same of `ulimit -v`, which counts the mapped file too."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        try:
            yield limit, limit - _kilobytes("/proc/self/status", "VmSize:")
        except (OSError, StopIteration):
            yield limit, limit // 2


def bytes_in_use(device: str) -> int:
    """Of a GPU, what all processes use; of the CPU, this process's resident pages."""
    if device == "cpu":
        return resident_bytes()
    from mlacli.backends.cuda_devices import device_memory

    total, free = device_memory(device)
    return total - free


def resident_bytes() -> int:
    """Bytes of this process that are in memory now; 0 where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
