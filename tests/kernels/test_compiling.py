"""Compiling ahead, the binaries kept on disk, and what a kernel that doesn't compile looks like."""

import os
from pathlib import Path

import pytest
from kit.kernel_texts import waits

from mlacli.errors import KernelCompileError, UsageError

pytest.importorskip("cupy", reason="needs CuPy's NVRTC (pip install 'mlacli[cuda13]')")

from mlacli.backends import cuda_sources
from mlacli.backends.cuda_compile import DiskCache, Unit, binaries, capability, target

SMALL = """// Op nothing
#include "pdl.cuh"
#include "own.cuh"
#include <cuda_fp16.h>
#include "pdl.cuh"

extern "C" __global__ void small(float* y, int n) {
    pdl_wait();
    if (threadIdx.x < n) y[threadIdx.x] = VALUE + OWN;
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels of our own, with an empty cache beside it."""
    include = tmp_path / "kernels" / "include"
    include.mkdir(parents=True)
    pdl = cuda_sources.kernel_folder().joinpath("include", "pdl.cuh").read_text()
    (include / "pdl.cuh").write_text(pdl)
    (include / "own.cuh").write_text("#pragma once\n#define OWN 1.f\n")
    (tmp_path / "kernels" / "small.cu").write_text(SMALL)
    monkeypatch.setattr(cuda_sources, "kernel_folder", lambda: tmp_path / "kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLACLI_DEBUG", raising=False)
    return tmp_path


def units(n: int) -> list[Unit]:
    return [Unit.of("small", {"VALUE": f"{i}.f"}) for i in range(n)]


def test_what_was_compiled_once_comes_from_disk(folder: Path) -> None:
    said: list[tuple[int, int]] = []
    first = binaries(units(3), "sm_90a", lambda *n: said.append(n))
    assert first.n_compiled == 3 and said == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert len(set(first.images.values())) == 3
    again = binaries(units(4), "sm_90a", lambda *n: said.append(n))
    assert again.n_compiled == 1 and said[4:] == [(0, 1), (1, 1)]
    assert {unit: again.images[unit] for unit in first.images} == first.images
    assert binaries(units(4), "sm_90a").seconds == 0


@pytest.mark.parametrize(
    "change", ["kernels/small.cu", "kernels/include/own.cuh", "target", "debug"]
)
def test_whatever_decides_a_binary_is_in_its_name(
    folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = binaries(units(1), "sm_90a")
    wanted = "sm_90a"
    if change == "target":
        wanted = "sm_75"
    elif change == "debug":
        monkeypatch.setenv("MLACLI_DEBUG", "1")
    else:
        path = folder / change
        path.write_text(path.read_text().replace("1.f", "2.f") + "\n// changed\n")
    after = binaries(units(1), wanted)
    assert after.n_compiled == 1
    if change in ("kernels/include/own.cuh", "target"):
        assert after.images != before.images


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "mlacli" / "kernels").iterdir())


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_compiled_anew(folder: Path, damage: str) -> None:
    want = binaries(units(1), "sm_90a").images
    (path,) = cached(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"cut": data[:-9], "changed": data, "empty": b""}[damage])
    after = binaries(units(1), "sm_90a")
    assert after.n_compiled == 1 and after.images == want
    assert binaries(units(1), "sm_90a").n_compiled == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="written for any user, but root sees other errors")
def test_a_cache_that_cannot_be_written_is_said(folder: Path) -> None:
    (folder / "cache").write_text("a file where the folder should be")
    done = binaries(units(1), "sm_90a")
    assert done.n_compiled == 1 and "can't be kept" in done.trouble


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = DiskCache(tmp_path)
    for i in range(5):
        store.put(f"k{i}", bytes([i]))
        os.utime(tmp_path / f"k{i}", (i, i))
    assert store.get("k0") == b"\0"  # now the latest used
    store.prune(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k0", "k4"]


@pytest.mark.parametrize(
    "file, line, break_it",
    [
        ("small.cu", 9, ("y[threadIdx.x]", "z[0]")),
        ("include/own.cuh", 3, ("1.f\n", "1.f\n]\n")),
    ],
)
def test_an_error_names_file_and_line(folder: Path, file: str, line: int, break_it) -> None:
    path = folder / "kernels" / file
    path.write_text(path.read_text().replace(*break_it))
    with pytest.raises(KernelCompileError) as raised:
        binaries(units(2), "sm_90a")
    e = raised.value
    assert (e.file, e.line) == (f"kernels/{file}", line)
    assert e.message.startswith(f"kernels/{file}:{line} does not compile for sm_90a -DVALUE=")
    assert "\n" not in e.message and e.log.count("\n") > 2
    assert not (folder / "cache").exists() or not cached(folder)


def test_ptxas_errors_name_the_file(folder: Path) -> None:
    path = folder / "kernels" / "small.cu"
    path.write_text(SMALL.replace("pdl_wait();", 'asm("nonsense.b32 %r1;");'))
    with pytest.raises(KernelCompileError) as raised:
        binaries(units(1), "sm_90a")
    assert (raised.value.file, raised.value.line) == ("kernels/small.cu", None)
    assert "nonsense" in raised.value.message


def test_a_kernel_that_does_not_wait_is_found(folder: Path) -> None:
    for name, inside in (("idle", "y[0] = 1"), ("deep", "helper<2>(y)"), ("early", "pdl_wait()")):
        text = "template <int N> __device__ void helper(float* y) { pdl_launch(); y[N] = 0; }\n"
        text += f'extern "C" __global__ void __launch_bounds__(32) {name}(float* y) {{ {inside}; }}'
        (folder / "kernels" / f"{name}.cu").write_text(f'#include "pdl.cuh"\n{text}\n')
    assert [waits(name, name) for name in ("idle", "deep", "early")] == [False, False, True]
    path = folder / "kernels" / "late.cu"
    path.write_text(
        (folder / "kernels" / "deep.cu")
        .read_text()
        .replace("launch()", "wait()")
        .replace("deep", "late")
    )
    assert waits("late", "late")


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLACLI_ARCH", raising=False)
    assert [target(device) for device in (75, 80, 89, 90, 120)] == [
        "sm_75", "sm_80", "sm_89", "sm_90a", "sm_120",
    ]  # fmt: skip
    assert target(999).startswith("compute_") and capability(90) == 90
    monkeypatch.setenv("MLACLI_ARCH", "75")
    assert target(90) == "compute_75" and capability(90) == 75
    for bad in ("sm_75", "70", "100"):
        monkeypatch.setenv("MLACLI_ARCH", bad)
        with pytest.raises(UsageError, match="MLACLI_ARCH"):
            target(90)


def test_ptx_is_compiled_for_the_driver(folder: Path) -> None:
    (image,) = binaries(units(1), "compute_75").images.values()
    assert b".target sm_75" in image and b".entry small" in image and image.endswith(b"\0")


def test_the_command_line_shows_log_and_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlacli import cli

    def fails(args: list[str]) -> int:
        raise KernelCompileError("kernels/x.cu", 3, "sm_90a", "no such thing", "first\nsecond\n")

    monkeypatch.setattr(cli, "_invoked", fails)
    assert cli.run([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "first", "second",
        "Error: kernels/x.cu:3 does not compile for sm_90a: no such thing "
        "(the compiler's log is above; a newer mlacli[cuda13] may help)",
    ]  # fmt: skip
