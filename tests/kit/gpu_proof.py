"""Which sources GPU runs proved: prints `GPU-proven: yes`, or `no since <files>`.

CI has no GPU. The tests in tests/gpu write report.json with a hash of every file that they prove,
and of every file of tests; this compares it with the files as they are now.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "tests" / "gpu" / "report.json"
PROVEN = ("kernels", "mlacli/backends", "mlacli/models", "mlacli/parallel", "mlacli/engine.py")
_NAMED = 8  # files that the line names


def hashes(root: Path = ROOT) -> dict[str, str]:
    """Hash of every source that a GPU run proves, by path."""
    found = {}
    for top in PROVEN:
        path = root / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh"):
                found[file.relative_to(root).as_posix()] = _hash(file)
    return found


def tests(root: Path = ROOT) -> dict[str, str]:
    """Hash of every file of GPU tests, by path."""
    files = sorted((root / "tests" / "gpu").glob("test_*.py"))
    return {file.relative_to(root).as_posix(): _hash(file) for file in files}


def merged(report: dict[str, Any] | None, run: dict[str, Any]) -> dict[str, Any]:
    """The report after `run`: tests of runs on the same sources and kind of device add up.

    A test that was skipped once and passed another time, with more GPUs, has passed.
    """
    found = {path: dict(of) for path, of in run["tests"].items()}
    if report is not None and all(report.get(x) == run[x] for x in ("files", "device")):
        for path, of in report["tests"].items():
            new = found.setdefault(path, of)
            if new["hash"] == of["hash"]:
                new["n_tests"] = max(of["n_tests"], new["n_tests"])
                new["seconds"] = of["seconds"] | new["seconds"]
                new["slow"] = of["slow"] | new["slow"]
                skipped = of["skipped"] | new["skipped"]
                new["skipped"] = {x: why for x, why in skipped.items() if x not in new["seconds"]}
    n_passed = sum(len(of["seconds"]) + len(of["slow"]) for of in found.values())
    return run | {"tests": dict(sorted(found.items())), "passed": n_passed}


def changed(report: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Files that are new, gone or other than when the report was written, or not run whole."""
    ran = {
        path: of["hash"]
        for path, of in report.get("tests", {}).items()
        if len(of["seconds"]) + len(of["skipped"]) == of["n_tests"]
    }
    then, now = report.get("files", {}) | ran, hashes(root) | tests(root)
    return sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))


def verdict(report: dict[str, Any] | None, root: Path = ROOT) -> str:
    """The line that CI prints."""
    if report is None:
        return "GPU-proven: no, tests/gpu/report.json is missing"
    run = f"{report['device']}, {report['date']}, {report['passed']} tests"
    files = changed(report, root)
    if not files:
        return f"GPU-proven: yes ({run})"
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return f"GPU-proven: no since {', '.join(files[:_NAMED])}{more} (last run: {run})"


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    print(verdict(json.loads(REPORT.read_text()) if REPORT.exists() else None))
