"""GPU tests run where CuPy sees a device; runs without failure add up to report.json."""

import datetime
import fcntl
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
    selected: list[str] = field(default_factory=list)
    slow: set[str] = field(default_factory=set)  # of the selected ones, those that may be left out
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


def pytest_collection_finish(session: pytest.Session) -> None:
    ours, run = [item for item in session.items if is_ours(item)], run_of(session.config)
    run.selected = [item.nodeid for item in ours]
    run.slow = {item.nodeid for item in ours if LEFT_OUT & set(item.keywords)}


def files_run(config: pytest.Config, run: Run) -> dict[str, dict[str, Any]]:
    """By file, how many tests a whole run has, which passed (slow ones apart), why others did not.

    A run of one test of a file doesn't know how many there are: 0.
    """
    parts = {Path(config.invocation_params.dir, arg.partition("::")[0]).resolve()
             for arg in config.args if "::" in arg}  # fmt: skip
    files: dict[str, dict[str, Any]] = {}
    for test in (*run.selected, *run.deselected):
        empty = {"n_tests": 0, "seconds": {}, "slow": {}, "skipped": {}}
        of = files.setdefault(_file(test), empty)
        if test in run.slow:
            if test in run.seconds:
                of["slow"][test] = run.seconds[test]
            continue
        of["n_tests"] += (gpu_proof.ROOT / _file(test)) not in parts
        for kind, found in (("seconds", run.seconds), ("skipped", run.skipped)):
            if test in found:
                of[kind][test] = found[test]
    return files


def _file(test: str) -> str:
    return test.partition("::")[0]


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = run_of(session.config)
    if not run.seconds:
        return
    if run.failed:
        run.written = f"tests/gpu/report.json is left as it was: {len(run.failed)} tests failed"
        return
    import cupy
    from cupy.cuda import nvrtc, runtime

    files, hashes = files_run(session.config, run), gpu_proof.tests()
    report = {
        "device": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "tests": {file: {"hash": hashes[file]} | of for file, of in sorted(files.items())},
        "files": gpu_proof.hashes(),
    }
    path = gpu_proof.REPORT
    with path.with_suffix(".lock").open("w") as lock:  # runs side by side on several GPUs
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = json.loads(path.read_text()) if path.exists() else None
        path.write_text(json.dumps(gpu_proof.merged(before, report), indent=1) + "\n")
    run.written = f"tests/gpu/report.json: {len(run.seconds)} more tests passed"


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
