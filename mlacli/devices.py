"""Which devices there are and how much memory they have; no array library."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlacli.errors import UsageError
from mlacli.params import SplitParams


@dataclass(frozen=True, slots=True)
class Device:
    """A place to compute on. `total` and `free` in bytes; kind "planned" needn't exist."""

    name: str
    kind: Literal["cpu", "cuda", "planned"]
    total: int
    free: int


def find_devices(split: SplitParams) -> tuple[Device, ...]:
    """The devices of -dev, or those that --vram describes."""
    if split.vram:
        return tuple(Device(f"gpu{i}", "planned", n, n) for i, n in enumerate(split.vram))
    return tuple(_device(name) for name in split.devices)


def _device(name: str) -> Device:
    if name == "cpu":
        return Device(name, "cpu", *host_memory())
    from mlacli.backends.cuda_devices import device_memory

    return Device(name, "cuda", *device_memory(name))


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
    """(total, available) bytes of this host, bounded by the control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        free = total // 2  # no such file outside Linux: take half
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            total, free = min(total, int(limit)), min(free, int(limit) - used)
    except (OSError, ValueError):
        return total, free
    return total, free


def resident_bytes() -> int:
    """Bytes of this process that are in memory now; 0 where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
