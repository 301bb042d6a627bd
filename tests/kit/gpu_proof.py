"""Which sources the last GPU run proved: prints `GPU-proven: yes`, or `no since <files>`.

CI has no GPU. The tests in tests/gpu write report.json with a hash of every file that they prove;
this compares it with the files as they are now.
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
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                found[file.relative_to(root).as_posix()] = digest[:16]
    return found


def changed(report: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Files that are new, gone or other than when the report was written."""
    then, now = report.get("files", {}), hashes(root)
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


if __name__ == "__main__":
    print(verdict(json.loads(REPORT.read_text()) if REPORT.exists() else None))
