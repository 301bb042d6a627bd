"""NVRTC: kernel texts to binaries, several at once, kept on disk under a hash of what made them.

Needs CuPy's NVRTC but no GPU, so that tests compile every kernel. Knows no launch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cupy.cuda import nvrtc

from mlacli.backends.cuda_sources import debugging, source
from mlacli.errors import BackendError, KernelCompileError, UsageError

# Flushes denormals, as all kernels are written and tested to bear.
_OPTIONS = ("-std=c++17", "-ftz=true")
_KEPT = 2000  # binaries on disk; the least recently used go first


@dataclass(frozen=True, slots=True)
class Unit:
    """What NVRTC compiles at once: a file of kernels/ with values for its macros."""

    file: str
    defines: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, file: str, defines: Mapping[str, Any]) -> Unit:
        return cls(file, tuple(sorted((name, str(value)) for name, value in defines.items())))

    def options(self, target: str) -> tuple[str, ...]:
        macros = (f"-D{name}={value}" for name, value in self.defines)
        return (f"-arch={target}", *_OPTIONS, *(["-lineinfo"] if debugging() else []), *macros)


# ---------------------------------------------------------------- targets


def capability(device: int) -> int:
    """The compute capability to write code for, as 90: the device's own, or MLACLI_ARCH's."""
    asked = os.environ.get("MLACLI_ARCH", "")
    if not asked:
        return device
    if not asked.isdecimal() or not 75 <= int(asked) <= device:
        raise UsageError(
            f"MLACLI_ARCH={asked} is no architecture for a device of capability {device}",
            f"use a number from 75 to {device}, or leave it unset",
        )
    return int(asked)


def target(device: int) -> str:
    """NVRTC's -arch for a device: its machine code, or PTX that its driver compiles.

    PTX is for MLACLI_ARCH, and for devices newer than this NVRTC. wgmma needs the target sm_90a.
    """
    known = nvrtc.getSupportedArchs()
    wanted = capability(device)
    if wanted == device and device in known:
        return "sm_90a" if device == 90 else f"sm_{device}"
    usable = [arch for arch in known if arch <= wanted]
    if not usable:
        raise BackendError(
            f"this NVRTC has no code for devices of capability {wanted / 10}",
            f"it knows {min(known) / 10} and up: install mlacli[cuda12] or use a newer device",
        )
    return f"compute_{max(usable)}"


# ---------------------------------------------------------------- compiling


@cache
def include_options() -> tuple[str, ...]:
    """Where NVRTC finds cuda_fp16.h and cuda_bf16.h: in the toolkit that CuPy uses."""
    from cupy._environment import get_cuda_path

    root = get_cuda_path()
    folders = [Path(root) / "include"] if root else []
    found = [folder for folder in folders if (folder / "cuda_fp16.h").is_file()]
    if not found:
        raise BackendError(
            f"cuda_fp16.h is not in {', '.join(map(str, folders)) or 'any CUDA toolkit'}",
            "install mlacli[cuda13] or mlacli[cuda12], which bring CUDA's headers",
        )
    return tuple(f"-I{folder}" for folder in found)


def compiled(unit: Unit, target: str, *more: str, text: str | None = None) -> tuple[bytes, str]:
    """The unit's binary (PTX for compute_ targets) and NVRTC's log; `more` options."""
    text = source(unit.file) if text is None else text
    program = nvrtc.createProgram(text, f"kernels/{unit.file}.cu", (), ())
    try:
        nvrtc.compileProgram(program, unit.options(target) + include_options() + more)
        log = nvrtc.getProgramLog(program)
        if target.startswith("compute_"):
            image = nvrtc.getPTX(program) + b"\0"
        else:
            image = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as e:
        log = nvrtc.getProgramLog(program)
        raise _refused(unit, target, log or str(e)) from None
    finally:
        nvrtc.destroyProgram(program)
    return image, log


def _refused(unit: Unit, target: str, log: str) -> KernelCompileError:
    """The error that names the first complaint of the log and its place."""
    found = re.search(r"^(kernels/\S+)\((\d+)\): (?:catastrophic )?error:? *(.*)$", log, re.M)
    file, line = (found[1], int(found[2])) if found else (f"kernels/{unit.file}.cu", None)
    lines = [text for text in log.splitlines() if text.strip()]
    reason = found[3] if found else next((x for x in lines if "error" in x.lower()), lines[0])
    words = " ".join(f"-D{name}={value}" for name, value in unit.defines)
    return KernelCompileError(file, line, f"{target} {words}".rstrip(), reason, log)


# ---------------------------------------------------------------- cache on disk


def cache_folder() -> Path:
    """Where binaries are kept: XDG's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlacli" / "kernels"


def key(text: str, options: Iterable[str]) -> str:
    """The name under which a binary is kept: a hash of all that decides what it is."""
    made_of = [text, *options, ".".join(map(str, nvrtc.getVersion()))]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


class DiskCache:
    """Binaries by key. Where the folder can't be written, `trouble` says so and none are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trouble = ""

    def get(self, key: str) -> bytes | None:
        """The binary kept under `key`; None when there is none or its file is damaged."""
        path = self.folder / key
        try:
            data = path.read_bytes()
            os.utime(path)  # used now, so not among the first to go
        except OSError:
            return None
        digest, image = data[:32], data[32:]
        return image if hashlib.sha256(image).digest() == digest else None

    def put(self, key: str, image: bytes) -> None:
        """Keeps `image`; another process sees all of it or nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(image).digest() + image)
                os.replace(name, self.folder / key)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as e:
            self.trouble = f"compiled kernels can't be kept in {self.folder}: {e.strerror}"

    def prune(self, most: int = _KEPT) -> None:
        """Deletes the least recently used binaries beyond `most`."""
        try:
            found = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in found[: max(0, len(found) - most)]:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # another process prunes too, or the folder isn't there


@dataclass(slots=True)
class Compiled:
    """Binaries by unit; how many had to be compiled, and in how many seconds."""

    images: dict[Unit, bytes]
    n_compiled: int = 0
    seconds: float = 0.0
    trouble: str = ""


def binaries(
    units: Iterable[Unit], target: str, progress: Callable[[int, int], None] | None = None,
) -> Compiled:  # fmt: skip
    """All units' binaries, from disk or compiled in parallel (NVRTC lets go of the GIL).

    `progress` is told units compiled and units to compile, and never called when there are none.
    """
    start = time.perf_counter()
    store, done = DiskCache(cache_folder()), Compiled({})
    missing: dict[Unit, tuple[str, str]] = {}
    texts: dict[str, str] = {}
    for unit in dict.fromkeys(units):
        text = texts.setdefault(unit.file, "") or source(unit.file)
        texts[unit.file] = text
        name = key(text, unit.options(target))
        if (image := store.get(name)) is not None:
            done.images[unit] = image
        else:
            missing[unit] = name, text
    if not missing:
        return done
    if progress is not None:
        progress(0, len(missing))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {
            pool.submit(compiled, unit, target, text=text): unit
            for unit, (_, text) in missing.items()
        }
        try:
            for job in as_completed(jobs):
                unit = jobs[job]
                done.images[unit] = job.result()[0]
                store.put(missing[unit][0], done.images[unit])
                done.n_compiled += 1
                if progress is not None:
                    progress(done.n_compiled, len(missing))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    store.prune()
    done.seconds, done.trouble = time.perf_counter() - start, store.trouble
    return done
