"""Every kernel compiles for the oldest and the tuned architecture; needs NVRTC, not a GPU.

`-m slow` adds the architectures between and after. A kernel says in its header comment which
variants there are, what it needs and whether it promises not to spill (kit/kernel_texts.py).
"""

import re
from pathlib import Path

import pytest
from kit.kernel_texts import FILES, promises_no_spills, variants, waits

import mlacli
from mlacli.backends.cuda_sources import signatures
from mlacli.errors import KernelCompileError

pytest.importorskip("cupy", reason="needs CuPy's NVRTC (pip install 'mlacli[cuda13]')")

from mlacli.backends.cuda_compile import Unit, compiled

TUNED, OTHERS = 90, (80, 86, 89, 100, 120)
# Where a few registers are missing that Hopper has: compiled there, tuned for Hopper.
SPILLING = {("dsa_scores", "sm_100"), ("dsa_scores", "sm_120"), ("matvec_raw", "sm_120")}
# Files whose headers don't name their variants yet.
DEFINES = {
    "embed": {"WTYPE": 12},
    "matmul_vec": {"WTYPE": 14, "COLS": 8, "ROWS": 2},
    "matmul_experts": {"WTYPE": 12, "WTYPE_UP": 8},
    "mla_decode": {"R": 512, "P": 64, "HALF": 1, "CACHE": "__half"},
}


def cases(archs: tuple[int, ...]) -> list[tuple[Unit, str]]:
    """Every variant of every file for each of `archs` that it is for; 75 means its lowest."""
    found = {}
    for file in FILES:
        for defines, (lowest, alone) in variants(file):
            unit = Unit.of(file, defines or DEFINES.get(file, {}))
            for arch in archs:
                arch = lowest if arch == 75 else arch
                if arch == lowest or (arch > lowest and not alone):
                    found[unit, "sm_90a" if arch == TUNED else f"sm_{arch}"] = None
    return list(found)


def names(part: object) -> str:
    if isinstance(part, Unit):
        return " ".join([part.file, *(f"{name}={value}" for name, value in part.defines)])
    return str(part)


def check(unit: Unit, target: str) -> None:
    try:
        _, log = compiled(unit, target, "--ptxas-options=-v")
    except KernelCompileError as e:
        pytest.fail(f"{e.message}\n{e.log}")
    if promises_no_spills(unit.file) and (unit.file, target) not in SPILLING:
        frames = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert frames, log
        assert set(frames) == {("0", "0")}, log


@pytest.mark.parametrize("unit, target", cases((75, TUNED)), ids=names)
def test_kernel_compiles(unit: Unit, target: str) -> None:
    check(unit, target)


@pytest.mark.slow
@pytest.mark.parametrize("unit, target", cases(OTHERS), ids=names)
def test_kernel_compiles_for_other_architectures(unit: Unit, target: str) -> None:
    check(unit, target)


@pytest.mark.parametrize("kernel", signatures())
def test_every_kernel_waits_for_its_predecessor(kernel: str) -> None:
    """A kernel without pdl_wait would let the one after it start before the one before it ends."""
    assert waits(signatures()[kernel][0], kernel)


@pytest.mark.parametrize("kernel", signatures())
def test_every_kernel_is_launched(kernel: str) -> None:
    hosts = (Path(mlacli.__file__).parent / "backends").glob("cuda_*.py")
    assert any(f'"{kernel}"' in path.read_text() for path in hosts)
