"""soak.py and token_times.py on the CPU; tests/gpu/test_cuda_soak.py runs the first on GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest
from kit.golden_files import FILES

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, "--model", FILES["v2lite"], *words],
        env={"PYTHONPATH": str(EXAMPLES.parent)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("split", [("--dev", "cpu"), ("--dev", "cpu,cpu", "--sm", "graph")])
def test_memory_stays_flat_over_cycles(split: tuple[str, ...]) -> None:
    done = run("soak.py", *split, "--cycles", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 cycles of cpu" in done.stdout and ", 0 wrong answers" in done.stdout


def test_growth_beyond_the_bar_fails() -> None:
    done = run("soak.py", "--dev", "cpu", "--cycles", "12", "--rss-mib", "-1000")
    assert done.returncode == 1, done.stdout + done.stderr


def test_times_of_tokens() -> None:
    done = run("token_times.py", "--dev", "cpu", "-n", "20", "--depth", "30", "--ub", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  p99 ") == 4 and done.stdout.count(" t/s") == 2
