"""CUDA's errors in words that say which GPU and rank failed, and what to do.

An illegal address, say, ends the context of its GPU: every later call of the process there fails
with the same error, those that free memory too, even of other GPUs. So what an engine holds is
then left to the system, and what was said once is not said again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from mlacli.backends.cuda_devices import current_device, device_memory
from mlacli.errors import BackendError, MemoryBudgetError, MlacliError, RankError

_FATAL = range(700, 721)  # cudaErrorIllegalAddress and its like
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation and the driver's code
# cudaErrorNotReady, and the errors of calls that a stream being captured does not take.
_ALIVE = (0, 600, *range(900, 909))
_AGAIN = "run it again; if it fails again, compute-sanitizer with MLACLI_DEBUG=1 finds the kernel"
_hushed = False


def faults() -> tuple[type[Exception], ...]:
    """CuPy's errors; none where CuPy isn't even loaded, as on simulated devices."""
    if "cupy" not in sys.modules:
        return ()
    import cupy as cp

    cuda = cp.cuda
    return cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, cuda.memory.OutOfMemoryError


class Mortal(Protocol):
    """A device that may die."""

    name: str

    def failure(self) -> Exception | None: ...


def failure_of(stream: Any) -> Exception | None:
    """What the stream's GPU died of; None while it lives."""
    import cupy as cp

    code = cp.cuda.runtime.streamQuery(stream.ptr)
    return None if code in _ALIVE else of_code(code)


def of_code(code: int) -> Exception:
    """The error that a call of the driver returned."""
    import cupy as cp

    error: Exception = cp.cuda.runtime.CUDARuntimeError(code)
    return error


def words(error: BaseException) -> str:
    """CUDA's own sentence, its name for it behind."""
    name, _, text = str(error).partition(": ")
    return f"{text} ({name})" if text else name


def explained(error: Exception, gpus: Mapping[int, Mortal]) -> MlacliError | None:
    """What a user is told instead of `error`; None where that is good enough as it is.

    `gpus`: each rank's device.
    """
    known = faults()
    cause = error.__cause__ if isinstance(error, BackendError) else error
    if isinstance(cause, known) or (cause is None and isinstance(error, RankError)):
        deaths = {rank: device.failure() for rank, device in gpus.items()}
        if any(deaths.values()):
            return _died({rank: gpus[rank].name for rank, death in deaths.items() if death},
                         len(gpus), next(filter(None, deaths.values())))  # fmt: skip
    if isinstance(error, RankError) and not isinstance(cause, known):
        if error.device or cause is None or error.rank not in gpus:
            return None
        return RankError(error.rank, cause, gpus[error.rank].name)
    if not isinstance(cause, known):
        return None
    name = gpus[error.rank].name if isinstance(error, RankError) else current_device()
    name = getattr(cause, "met_on", name)
    if isinstance(cause, MemoryError) or getattr(cause, "status", 0) == _OUT_OF_MEMORY:
        return out_of_memory(name)
    return BackendError(f"device {name} failed: {words(cause)}", _AGAIN)


def _died(names: Mapping[int, str], n_ranks: int, death: Exception) -> MlacliError:
    """Drivers may end all GPUs of a process with one of them (seen on two H200)."""
    if n_ranks > 1 and len(names) == 1:
        ((rank, name),) = names.items()
        return RankError(rank, words(death), name, _AGAIN)
    several = list(dict.fromkeys(names.values()))
    which = f"device {several[0]}" if len(several) == 1 else f"one of {', '.join(several)}"
    return BackendError(f"{which} failed: {words(death)}", _AGAIN)


def out_of_memory(name: str) -> MlacliError:
    """For what is taken beside the plan: graphs, modules, buffers of libraries."""
    hint = "other programs use the device: free it, or use a smaller -c or -ub"
    return MemoryBudgetError(name, None, device_memory(name)[1], hint)


def met_on(name: str, error: Exception) -> None:
    """`error` is of a call for that GPU, wherever else it is caught."""
    if isinstance(error, faults()) and not hasattr(error, "met_on"):
        error.met_on = name  # type: ignore[attr-defined]


def abandon(held: object) -> None:
    """Keep it until the process ends: a GPU that died takes nothing back."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))


def hush() -> None:
    """Events and pages of CuPy that a dead GPU doesn't take back no longer print so."""
    global _hushed
    if _hushed:
        return
    _hushed, before = True, sys.unraisablehook

    def hook(what: Any) -> None:
        error = what.exc_value
        if not (isinstance(error, faults()) and getattr(error, "status", 0) in _FATAL):
            before(what)

    sys.unraisablehook = hook
