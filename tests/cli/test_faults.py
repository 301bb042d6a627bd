"""Faults planted in a run on the CPU: how it ends, with which code, and that it ends at once.

tests/gpu/test_cuda_faults.py does the same on GPUs.
"""

import os
import re
from itertools import product

import pytest
from kit.fault_runs import Case, Outcome, run_all

MODES = {
    "one rank": ("-dev", "cpu"),
    "graph": ("-dev", "cpu,cpu", "-sm", "graph"),
    "layer": ("-dev", "cpu,cpu", "-sm", "layer"),
}
PLACES = ("load", "prefill", "decode")
CASES = [
    *(Case("one rank", "exception", place) for place in PLACES),
    *(Case(mode, "exception", place, 1) for mode, place in product(("graph", "layer"), PLACES)),
    *(Case("graph", "SIGINT", place, 1) for place in PLACES),
    Case("one rank", "SIGINT", "load"),
    Case("layer", "SIGTERM", "decode", 1),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return run_all(CASES, MODES, 2 * len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_how_a_run_with_a_fault_ends(outcomes: dict[Case, Outcome], case: Case) -> None:
    done = outcomes[case]
    assert done.after is not None and done.after < 10, done.err
    assert done.is_tidy, done.err
    if case.kind.startswith("SIG"):
        assert (done.code, done.errors) == (130 if case.kind == "SIGINT" else -15, [])
        return
    assert done.code == 1 and len(done.errors) == 1
    who = "internal error" if case.mode == "one rank" else "rank 1 failed"
    assert re.fullmatch(f"Error: {who}: ValueError: planted fault .*", done.errors[0])
    assert done.err.endswith(done.errors[0] + "\n")
