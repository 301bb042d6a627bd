"""Engines that come and go in one process, and processes that start: memory and answers stay."""

import subprocess
import sys
from pathlib import Path

import pytest
from kit.fault_runs import Case, run_all
from kit.golden_files import FILES

from mlacli.backends.cuda_devices import device_count

ROOT = Path(__file__).parents[2]
MODES = {
    "one": ("cuda0", "none"),
    "graph": ("cuda0,cuda1", "graph"),
    "layer": ("cuda0,cuda1", "layer"),
}


def soak(mode: str, cycles: int) -> None:
    devices, split = MODES[mode]
    if device_count() < len(devices.split(",")):
        pytest.skip("needs two GPUs")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "soak.py", "--model", FILES["v2lite"],
         "--dev", devices, "--sm", split, "--cycles", str(cycles)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_memory_stays_flat_over_some_cycles(mode: str) -> None:
    """Of GPUs that nobody else uses meanwhile."""
    soak(mode, 40)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_memory_stays_flat_over_a_thousand_cycles(mode: str) -> None:
    soak(mode, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_twenty_starts_say_the_same(mode: str) -> None:
    devices, split = MODES[mode]
    if device_count() < len(devices.split(",")):
        pytest.skip("needs two GPUs")
    cases = [Case(mode, "no fault", "decode", i) for i in range(20)]
    done = run_all(cases, {mode: ("-dev", devices, "-sm", split)}, 5).values()
    assert [one.code for one in done] == [0] * 20
    assert len({one.out for one in done}) == 1
