"""The line that says whether a GPU run has seen the sources as they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import gpu_proof

RUN = {"device": "NVIDIA H200", "date": "2026-11-22", "passed": 57}


def report_of(root: Path, *names: str) -> dict[str, Any]:
    """Of a run that passed one test of each of these files."""
    found = {
        f"tests/gpu/{name}": {"n_tests": 1, "seconds": {name: 1.0}, "slow": {}, "skipped": {}}
        for name in names
    }
    for path, of in found.items():
        of["hash"] = gpu_proof.tests(root)[path]
    return RUN | {"files": gpu_proof.hashes(root), "tests": found, "passed": len(names)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("kernels/a.cu", "kernels/include/b.cuh", "mlacli/backends/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "mlacli" / "engine.py").write_text("")
    (tmp_path / "kernels" / "README.md").write_text("proves nothing")
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / "tests" / "gpu" / name).write_text(name)
    return tmp_path


def test_yes_and_no_since_which_files(root: Path) -> None:
    report = report_of(root, "test_a.py", "test_b.py")
    assert len(report["files"]) == 4
    assert gpu_proof.verdict(report, root) == "GPU-proven: yes (NVIDIA H200, 2026-11-22, 2 tests)"
    (root / "kernels" / "README.md").write_text("still nothing")
    (root / "mlacli" / "flags.py").write_text("not proven either")
    assert gpu_proof.changed(report, root) == []
    (root / "kernels" / "include" / "b.cuh").write_text("changed")
    (root / "kernels" / "new.cu").write_text("new")
    (root / "mlacli" / "engine.py").unlink()
    assert gpu_proof.verdict(report, root) == (
        "GPU-proven: no since kernels/include/b.cuh, kernels/new.cu, mlacli/engine.py "
        "(last run: NVIDIA H200, 2026-11-22, 2 tests)"
    )


def test_runs_on_the_same_sources_add_up(root: Path) -> None:
    first, second = report_of(root, "test_a.py"), report_of(root, "test_b.py")
    assert "no since tests/gpu/test_b.py (" in gpu_proof.verdict(first, root)
    both = gpu_proof.merged(first, second)
    assert gpu_proof.verdict(both, root) == "GPU-proven: yes (NVIDIA H200, 2026-11-22, 2 tests)"
    (part := report_of(root, "test_a.py"))["tests"]["tests/gpu/test_a.py"]["n_tests"] = 2
    partial = gpu_proof.merged(both, part)
    assert "no since tests/gpu/test_a.py (" in gpu_proof.verdict(partial, root)
    rest = json.loads(json.dumps(part))
    rest["tests"]["tests/gpu/test_a.py"]["skipped"] = {"other": "needs two GPUs"}
    assert gpu_proof.verdict(gpu_proof.merged(partial, rest), root) == (
        "GPU-proven: yes (NVIDIA H200, 2026-11-22, 2 tests)"
    )
    (root / "tests" / "gpu" / "test_a.py").write_text("another test")
    assert "no since tests/gpu/test_a.py (" in gpu_proof.verdict(both, root)
    assert gpu_proof.merged(first | {"device": "another"}, second) == second
    (root / "kernels" / "a.cu").write_text("changed")
    after = report_of(root, "test_b.py")
    assert gpu_proof.merged(both, after) == after


def test_a_run_of_single_tests_adds_them_and_slow_ones_stand_for_no_other(root: Path) -> None:
    both = report_of(root, "test_a.py", "test_b.py")
    one = report_of(root, "test_a.py")
    both["tests"]["tests/gpu/test_a.py"]["n_tests"] = 2
    one["tests"]["tests/gpu/test_a.py"] |= {"n_tests": 0, "seconds": {}, "slow": {"long": 9.0}}
    report = gpu_proof.merged(both, one)
    assert "no since tests/gpu/test_a.py (" in gpu_proof.verdict(report, root)
    one["tests"]["tests/gpu/test_a.py"]["seconds"] = {"other": 1.0}
    assert gpu_proof.verdict(gpu_proof.merged(report, one), root) == (
        "GPU-proven: yes (NVIDIA H200, 2026-11-22, 4 tests)"
    )


def test_a_report_without_hashes_proves_nothing(root: Path) -> None:
    assert gpu_proof.verdict(RUN, root).startswith("GPU-proven: no since kernels/a.cu, ")
    assert gpu_proof.verdict(None, root).startswith("GPU-proven: no")


def test_it_runs_as_ci_does() -> None:
    words = [sys.executable, gpu_proof.__file__]
    line = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert line.startswith(("GPU-proven: yes (", "GPU-proven: no since ")) and line.count("\n") == 1
