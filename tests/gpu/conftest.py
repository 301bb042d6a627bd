"""GPU tests run where CuPy sees a device; a whole run without failure writes report.json."""

import datetime
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kit import gpu_proof
from kit.launcher import Launcher

HERE = Path(__file__).parent
LEFT_OUT = {"slow"}  # marks of tests that a whole run needn't have


@dataclass
class Run:
    """What became of the GPU tests of this session."""

    seconds: dict[str, float] = field(default_factory=dict)  # of tests that passed
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    deselected: list[str] = field(default_factory=list)
    written: str = ""


RUN = pytest.StashKey[Run]()


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    """A device with an arena of its own, opened once."""
    from mlacli.backends.cuda_device import CudaDevice

    return Launcher(CudaDevice("cuda0", 4 << 30))


@pytest.fixture
def ops(launcher: Launcher) -> Iterator[Launcher]:
    """That device for one test, whose memory begins as NaN."""
    import cupy

    device = launcher.device
    mark = device.mark()
    whole = device.take(((4 << 30) - mark,), "u1")
    device.rewind(mark)
    cupy.cuda.runtime.memset(whole.ptr, 255, whole.nbytes)
    cupy.cuda.runtime.deviceSynchronize()
    yield launcher
    device.rewind(mark)


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


def is_ours(item: pytest.Item) -> bool:
    return HERE in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if is_ours(item):
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def run_of(config: pytest.Config) -> Run:
    return config.stash.setdefault(RUN, Run())


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if is_ours(item) and not LEFT_OUT & set(item.keywords):
            run_of(item.config).deselected.append(item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome = yield
    report, run = outcome.get_result(), run_of(item.config)
    if report.failed:  # a fixture that fails counts as well
        run.failed.append(item.nodeid)
    elif report.skipped:
        run.skipped[item.nodeid] = str(report.longrepr[-1])
    elif report.when == "call":
        run.seconds[item.nodeid] = round(report.duration, 3)


def why_unwritten(config: pytest.Config, run: Run) -> str:
    """Why this session proves less than a report claims; empty when it proves it."""
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    if not any(path.resolve() in (HERE, *HERE.parents) for path in asked):
        return "only part of tests/gpu was asked for"
    if run.deselected:
        return f"{len(run.deselected)} tests were deselected"
    return f"{len(run.failed)} tests failed" if run.failed else ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = run_of(session.config)
    if not run.seconds:
        return
    if reason := why_unwritten(session.config, run):
        run.written = f"tests/gpu/report.json is left as it was: {reason}"
        return
    import cupy
    from cupy.cuda import nvrtc, runtime

    report = {
        "device": runtime.getDeviceProperties(0)["name"].decode(),
        "n_devices": runtime.getDeviceCount(),
        "driver": runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "passed": len(run.seconds),
        "skipped": run.skipped,
        "seconds": dict(sorted(run.seconds.items())),
        "files": gpu_proof.hashes(),
    }
    gpu_proof.REPORT.write_text(json.dumps(report, indent=1) + "\n")
    run.written = f"tests/gpu/report.json: {len(run.seconds)} tests passed"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if run_of(config).written:
        terminalreporter.write_line(run_of(config).written)


def commit() -> str:
    """The commit, with a `+` where files differ from it.

    MLACLI_COMMIT says it where the sources travelled without their repository.
    """
    if known := os.environ.get("MLACLI_COMMIT"):
        return known
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("diff", "HEAD") else "")


def git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=gpu_proof.ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
