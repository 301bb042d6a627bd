"""GPU tests run where CuPy sees a device and write report.json when all of them pass."""

import datetime
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROVEN = ("kernels", "mlacli/backends", "mlacli/models", "mlacli/parallel", "mlacli/engine.py")


def why_not() -> str:
    """Why GPU tests can't run here; empty when they can."""
    try:
        import cupy
    except ImportError:
        return "needs CuPy (pip install 'mlacli[cuda13]')"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "needs a CUDA GPU"
    except cupy.cuda.runtime.CUDARuntimeError as e:
        return f"needs a CUDA GPU ({e})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def source_hash() -> str:
    """Hash of all that a GPU run proves."""
    digest = hashlib.sha256()
    for top in PROVEN:
        path = ROOT / top
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in (".py", ".cu", ".cuh"):
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if "gpu" in item.keywords and report.when == "call":
        runs = item.session.stash.setdefault(RUNS, {})
        runs[item.nodeid] = (report.outcome, round(report.duration, 3))


RUNS = pytest.StashKey[dict[str, tuple[str, float]]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    runs = session.stash.get(RUNS, {})
    if not runs or any(outcome != "passed" for outcome, _ in runs.values()):
        return
    import cupy

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    report = {
        "device": device,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "sources": source_hash(),
        "passed": len(runs),
        "seconds": {name: seconds for name, (_, seconds) in sorted(runs.items())},
    }
    Path(__file__).with_name("report.json").write_text(json.dumps(report, indent=1) + "\n")


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
