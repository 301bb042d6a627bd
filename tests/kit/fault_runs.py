"""Runs of the command line with a fault planted by kit/faults.py, several at a time."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kit.golden_files import FILES

TESTS = Path(__file__).parents[1]
LIMIT = 30  # seconds in which any run ends that doesn't hang
WORDS = ("-m", str(FILES["v2lite"]), "--prompt-ids", "1,2,3,4,5", "-n", "100", "--temp", "0",
         "--no-perf")  # fmt: skip


class Case(NamedTuple):
    """A fault of a rank, and the devices of the run."""

    mode: str
    kind: str
    place: str
    rank: int = 0

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.kind}-{self.place}-rank{self.rank}"


@dataclass(frozen=True)
class Outcome:
    """What became of a run; `code` is None where it hung, `after` None without a fault."""

    code: int | None
    out: str
    err: str
    after: float | None  # seconds from the fault to the end of the process

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("Error:")]

    @property
    def is_tidy(self) -> bool:
        """No traceback, and nothing that the interpreter says of what it can't free."""
        return not any(word in self.err for word in ("Traceback", "Exception ignored", "Fatal"))


def run(case: Case, flags: Sequence[str]) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        struck = Path(folder, "struck")
        if case.kind in ("exception", "memory"):  # while a step is captured, which a warm-up does
            flags = [*flags, "--no-warmup"]
        words = [case.kind, case.place, str(case.rank), "run-model", *WORDS, *flags]
        env = os.environ | {"MLACLI_STRUCK": str(struck), "MLACLI_DEBUG": "0"}
        env["PYTHONPATH"] = f"{TESTS}:{TESTS.parent}:{env.get('PYTHONPATH', '')}"
        start = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "kit.faults", *words],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        code: int | None
        try:
            out, err = process.communicate(timeout=LIMIT)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            code = None
        end = time.time()
        after = end - float(struck.read_text()) if struck.exists() else None
    done = Outcome(code, out, err, after)
    took = "" if after is None else f", {after:.1f} s after the fault"
    print(
        f"{case.id}: code {code} in {end - start:.1f} s{took}: {' '.join(done.errors)}", flush=True
    )
    return done


def run_all(
    cases: Iterable[Case], modes: Mapping[str, Sequence[str]], at_once: int
) -> dict[Case, Outcome]:
    cases = list(cases)
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = pool.map(lambda case: run(case, modes[case.mode]), cases)
        return dict(zip(cases, outcomes, strict=True))
