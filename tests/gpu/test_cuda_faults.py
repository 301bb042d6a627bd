"""Faults planted in a run on GPUs: one Error line that says where, its exit code, soon, no hang.

All runs share the GPUs and go on at the same time. tests/cli/test_faults.py does it on the CPU.
"""

import re
from itertools import product

import pytest
from kit.fault_runs import Case, Outcome, run, run_all

from mlacli.backends.cuda_devices import device_count

TWO = ("-dev", "cuda0,cuda1")
MODES = {
    "one": ("-dev", "cuda0"),
    "same": ("-dev", "cuda0,cuda0", "-sm", "graph"),
    "graph": (*TWO, "-sm", "graph"),
    "layer": (*TWO, "-sm", "layer"),
    "nccl": (*TWO, "-sm", "graph", "--comm", "nccl"),
    "host": (*TWO, "-sm", "graph", "--comm", "host"),
}
PLACES = ("load", "prefill", "decode")
KINDS = ("exception", "illegal", "memory", "SIGINT")
HEALTHY = ("no fault", "decode")
CASES = [
    *(Case(mode, kind, place, int(mode == "graph"))
      for mode, kind, place in product(("one", "graph"), KINDS, PLACES)),
    *(Case("graph", kind, "decode") for kind in ("exception", "illegal", "SIGINT")),
    *(Case("layer", kind, place, 1) for kind, place in product(("exception", "illegal"), PLACES)),
    *(Case("layer", kind, place, 1)
      for kind, place in (("SIGINT", "load"), ("SIGINT", "decode"), ("memory", "decode"))),
    *(Case("layer", "illegal", place) for place in ("prefill", "decode")),
    *(Case("nccl", "illegal", "decode", rank) for rank in (0, 1)),
    Case("nccl", "SIGINT", "decode", 1),
    Case("host", "illegal", "decode", 1),
    Case("same", "exception", "decode", 1),
    Case("same", "illegal", "decode"),
    Case("graph", "SIGTERM", "decode", 1),
    *(Case(mode, *HEALTHY) for mode in ("one", "graph", "layer")),
]  # fmt: skip
AT_ONCE = 9  # processes take turns on a GPU, and start slowly when there are many


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[Case, Outcome]:
    """Of the cases that were asked for."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {params["case"] for params in asked if isinstance(params.get("case"), Case)}
    wanted |= {Case(params["mode"], *HEALTHY) for params in asked if params.get("mode") in MODES}
    possible = {case for case in wanted if device_count() > 1 or case.mode in ("one", "same")}
    return run_all([case for case in CASES if case in possible], MODES, AT_ONCE)


def expected(case: Case) -> str:
    """The error line, as far as what and who, as a pattern; the hint in parentheses follows.

    Drivers may end all GPUs of a process with one of them.
    """
    two = "cuda1" in MODES[case.mode][1]
    device = f"cuda{case.rank}" if two else "cuda0"
    who = rf"rank {case.rank} \({device}\) failed"
    if case.kind == "exception":
        return f"{'internal error' if case.mode == 'one' else who}: ValueError: planted fault"
    if case.kind == "illegal":
        who = rf"(one of cuda0, cuda1 failed|{who})" if two else f"device {device} failed"
        return rf"{who}: an illegal memory access was encountered \(cudaErrorIllegalAddress\)"
    return f"device {device} {'needs' if case.place == 'load' else 'ran out of memory'}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_how_a_run_with_a_fault_ends(outcomes: dict[Case, Outcome], case: Case) -> None:
    if case not in outcomes:
        pytest.skip("needs two GPUs")
    done = outcomes[case]
    assert done.is_tidy, done.err
    if case.kind == "no fault":
        assert (done.code, done.errors, done.after) == (0, [], None), done.err
        return
    assert done.after is not None and done.after < 10, done.err
    if case.kind.startswith("SIG"):
        assert (done.code, done.errors) == (130 if case.kind == "SIGINT" else -15, [])
        return
    assert done.code == 1 and len(done.errors) == 1, done.err
    assert re.match(f"Error: {expected(case)}.* \\(.*\\)$", done.errors[0])
    assert done.err.endswith(done.errors[0] + "\n")


@pytest.mark.parametrize("mode", ["one", "graph", "layer"])
def test_after_all_of_them_the_gpus_work(outcomes: dict[Case, Outcome], mode: str) -> None:
    before = outcomes.get(Case(mode, *HEALTHY))
    if before is None:
        pytest.skip("needs two GPUs")
    again = run(Case(mode, *HEALTHY), MODES[mode])
    assert (again.code, again.out) == (0, before.out)
