"""The error tree: everything mlacli raises for bad input or environment.

A message says what, which value and which limit; the hint says what to do. `cli/` alone turns
these into one `Error:` line and an exit code. Our own broken invariants stay `assert`s.
"""

from __future__ import annotations


def one_line(text: str, most: int = 1000) -> str:
    """`text` on one line that a terminal can't be fooled by: names in a file may hold anything.

    What isn't printable is escaped, and more than `most` characters lose their middle.
    """

    def shortened(text: str) -> str:
        return text if len(text) <= most else f"{text[: most * 2 // 3]} [...] {text[-most // 4 :]}"

    text = shortened(" ".join(text.split()))
    if text.isprintable():
        return text
    return shortened("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


class MlacliError(Exception):
    """Bad input or environment; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MlacliError):
    """An unknown flag, a bad value, or flags that exclude each other."""

    exit_code = 2


class StrictDowngrade(MlacliError):
    """`--strict`: the run would differ from what was asked."""

    exit_code = 3


class GgufError(MlacliError):
    """A file that can't be read as GGUF."""


class MissingTensor(GgufError):
    """A tensor that the architecture needs is not in the file."""


class BadTensorShape(GgufError):
    """A tensor whose shape contradicts the metadata."""


class UnsupportedFeature(MlacliError):
    """A valid architecture, tensor type or feature that mlacli does not run."""


class PlanError(MlacliError):
    """The model can't be divided as asked."""


class MemoryBudgetError(MlacliError):
    """A device is too small for its part of the plan."""

    def __init__(self, device: str, need: int | None, have: int, hint: str = "") -> None:
        """`need` is None where something small beside the plan was refused."""
        what = "ran out of memory" if need is None else f"needs {need / 2**30:.2f} GiB"
        super().__init__(f"device {device} {what}, has {have / 2**30:.2f} GiB", hint)
        self.device, self.need, self.have = device, need, have


class ContextFull(MlacliError):
    """More tokens than the context holds."""


class BackendError(MlacliError):
    """A device or its libraries failed."""


class KernelCompileError(BackendError):
    """A kernel that the CUDA compiler refuses: a bug of ours, or a compiler too old for it."""

    def __init__(self, file: str, line: int | None, target: str, reason: str, log: str) -> None:
        place = file if line is None else f"{file}:{line}"
        super().__init__(
            f"{place} does not compile for {target}: {reason}",
            "the compiler's log is above; a newer mlacli[cuda13] may help",
        )
        self.file, self.line, self.log = file, line, log


class RankError(BackendError):
    """A rank died; the others were stopped."""

    def __init__(
        self, rank: int, cause: BaseException | str, device: str = "",
        hint: str = "set MLACLI_DEBUG=1 to see the traceback",
    ) -> None:  # fmt: skip
        what = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"rank {rank}{device and f' ({device})'} failed: {what}", hint)
        self.rank, self.device = rank, device
