"""Memory limits of the process and of its control group."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlacli import devices
from mlacli.flags import to_params


def test_ulimit_bounds_what_is_free() -> None:
    # In a process of its own: a limit can't be lifted again.
    code = (
        "import mmap, resource; from mlacli.devices import host_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))\n"
        "total, free = host_memory()\n"
        "held = mmap.mmap(-1, 1 << 30)\n"
        "print(total, free, free - host_memory()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, free, less = map(int, done.stdout.split())
    assert total <= 1 << 32 and free < total
    assert less == pytest.approx(1 << 30, rel=0.01)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch) -> Path:
    """An empty control group tree that this process believes to be in, at /a/b."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    plain = Path.read_text

    def read_text(self: Path, *args, **kwargs) -> str:
        return "1:x:/y\n0::/a/b\n" if self == Path("/proc/self/cgroup") else plain(self, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    return tmp_path


def limit(folder: Path, most: str, used: int = 0, pages: int = 0) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\nactive_file {pages - 1}\ninactive_file 1\n")


def test_a_limit_of_an_outer_group_counts_and_file_pages_are_free(groups: Path) -> None:
    limit(groups / "a" / "b", "max")
    limit(groups / "a", str(64 << 20), used=50 << 20, pages=40 << 20)
    assert devices.host_memory() == (64 << 20, 54 << 20)
    limit(groups / "a" / "b", str(32 << 20), used=31 << 20, pages=1 << 20)
    assert devices.host_memory() == (32 << 20, 2 << 20)


def test_a_group_over_its_limit_has_nothing_left(groups: Path) -> None:
    limit(groups, "1000", used=2000)
    assert devices.host_memory() == (1000, 0)


def test_no_groups_no_limit(groups: Path) -> None:
    total, free = devices.host_memory()
    assert 0 < free <= total and total > 64 << 20


@pytest.mark.parametrize("n_gpus, given, want", [
    (0, {}, ("cpu",)),
    (2, {}, ("cuda0", "cuda1")),
    (2, {"device": ("cpu",)}, ("cpu",)),
    (4, {"max_gpu": 3}, ("cuda0", "cuda1", "cuda2")),
    (0, {"device": ("cpu",) * 4, "max_gpu": 2}, ("cpu", "cpu")),
    (4, {"max_gpu": 0}, ("cuda0", "cuda1", "cuda2", "cuda3")),
])  # fmt: skip
def test_without_dev_all_gpus_take_part(
    monkeypatch: pytest.MonkeyPatch, n_gpus: int, given: dict, want: tuple
) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda: n_gpus)
    assert to_params(given).split.devices == want


def test_max_gpu_also_bounds_planned_devices() -> None:
    assert to_params({"vram": (1, 2, 3), "max_gpu": 2}).split.vram == (1, 2)


@pytest.mark.parametrize("cupy, want", [(True, (3, 0)), (False, (0, 3))])
def test_gpus_are_idle_without_cupy(
    monkeypatch: pytest.MonkeyPatch, cupy: bool, want: tuple[int, int]
) -> None:
    monkeypatch.undo()  # conftest's: there are no GPUs
    monkeypatch.setattr(devices, "_driver_gpus", lambda: 3)
    monkeypatch.setattr(devices, "find_spec", lambda name: name if cupy else None)
    assert (devices.gpu_count(), devices.idle_gpus()) == want
