"""What users are told of CUDA's errors, on devices that only pretend to have died."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest

from mlacli.backends import cuda_errors
from mlacli.backends.cuda_errors import explained, hush, of_code
from mlacli.errors import BackendError, MemoryBudgetError, RankError

pytest.importorskip("cupy")
ILLEGAL, INVALID, NO_MEMORY = 700, 1, 2


@dataclass
class Gpu:
    name: str
    code: int = 0

    def failure(self) -> Exception | None:
        return of_code(self.code) if self.code else None


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_errors, "_hushed", False)
    monkeypatch.setattr(cuda_errors, "current_device", lambda: "cuda0")
    monkeypatch.setattr(cuda_errors, "device_memory", lambda name: (8 << 30, 1 << 29))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ILLEGAL_WORDS = "an illegal memory access was encountered (cudaErrorIllegalAddress)"


def test_a_dead_gpu_is_named_whatever_call_met_it() -> None:
    gpus = {0: Gpu("cuda0"), 1: Gpu("cuda1", ILLEGAL)}
    launch = raised(BackendError("launching embed failed: ..."), of_code(ILLEGAL))
    waiting = RankError(0, TimeoutError("no message from cuda0 within 5 s"))
    in_a_rank = raised(RankError(0, of_code(ILLEGAL)), of_code(ILLEGAL))
    for error in (of_code(ILLEGAL), launch, waiting, in_a_rank):
        told: Any = explained(error, gpus)
        assert isinstance(told, RankError) and told.rank == 1
        assert told.message == f"rank 1 (cuda1) failed: {ILLEGAL_WORDS}" and told.hint


def test_a_gpu_of_several_ranks_or_of_the_only_one_is_named_alone() -> None:
    for n in (1, 2):
        told = explained(of_code(ILLEGAL), {rank: Gpu("cuda0", ILLEGAL) for rank in range(n)})
        assert told is not None and told.message == f"device cuda0 failed: {ILLEGAL_WORDS}"


def test_gpus_that_all_died_are_all_named() -> None:
    gpus = {0: Gpu("cuda0", ILLEGAL), 1: Gpu("cuda1", ILLEGAL), 2: Gpu("cuda0", ILLEGAL)}
    told = explained(of_code(ILLEGAL), gpus)
    assert told is not None and told.message == f"one of cuda0, cuda1 failed: {ILLEGAL_WORDS}"


def test_a_living_gpu_that_refuses_a_call() -> None:
    gpus = {0: Gpu("cuda0"), 1: Gpu("cuda1")}
    told = explained(of_code(INVALID), gpus)
    assert told is not None
    assert told.message == "device cuda0 failed: invalid argument (cudaErrorInvalidValue)"
    told = explained(raised(RankError(1, of_code(NO_MEMORY)), of_code(NO_MEMORY)), gpus)
    assert isinstance(told, MemoryBudgetError)
    assert told.message == "device cuda1 ran out of memory, has 0.50 GiB"


def test_a_failure_of_python_gets_its_ranks_device() -> None:
    gpus = {0: Gpu("cuda0"), 1: Gpu("cuda1")}
    told = explained(raised(RankError(1, ValueError("boom")), ValueError("boom")), gpus)
    assert told is not None and told.message == "rank 1 (cuda1) failed: ValueError: boom"


@pytest.mark.parametrize(
    "error", [ValueError("boom"), BackendError("no"), RankError(0, TimeoutError("no message"))]
)
def test_what_says_enough_stays(error: Exception) -> None:
    assert explained(error, {0: Gpu("cuda0"), 1: Gpu("cuda1")}) is None


def test_after_a_death_only_cuda_is_hushed(capsys: pytest.CaptureFixture[str]) -> None:
    class Held:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    said = []
    sys.unraisablehook = lambda what: said.append(what.exc_value)
    mine, cudas = ValueError("boom"), of_code(ILLEGAL)
    Held(cudas)
    hush()
    hush()
    Held(cudas)
    Held(mine)
    assert said == [cudas, mine]
