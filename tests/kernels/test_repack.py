"""kernels/repack.cu run on the CPU: the tiles that NumPy makes, and GGUF's bytes out of them again.

Weakest link: kit/tiled.py; test_tiles.py holds it against gguf-py through the device's unpacking.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from kit.tiled import TILED, cut_row, qtype_of, shapes, tile_weight
from kit.toy_gguf import random_weight

from mlacli.loading.tiles import tiled_shape

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
CUDA = [Path(os.environ.get(f"CUDA_{x}", "/usr/local/cuda")) / "include" for x in ("PATH", "HOME")]


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the harness with")
    cuda = next((f for f in CUDA if (f / "crt" / "host_defines.h").exists()), None)
    if cuda is None:
        pytest.skip("no CUDA toolkit: simt.h needs its headers")
    binary = tmp_path_factory.mktemp("repack") / "harness"
    folders = (HERE.parent / "kit", KERNELS, KERNELS / "include", cuda)
    flags = ["-std=c++17", "-O1", "-w", *(f"-I{folder}" for folder in folders)]
    source = str(HERE / "repack_harness.cpp")
    subprocess.run(["g++", *flags, source, "-o", str(binary)], check=True)
    return binary


@pytest.mark.parametrize("name", TILED)
def test_device_makes_the_tiles_that_numpy_makes(harness, name) -> None:
    rng = np.random.default_rng(50 + int(T[name]))
    for shape, skip in shapes(name):
        q = qtype_of(name)
        held, _ = cut_row(name, shape[-1], skip)
        raw = random_weight((*shape[:-1], held), T[name], rng).view(np.uint8)
        raw = raw.reshape(*shape[:-1], -1)
        layout, want = tiled_shape(shape, q, skip), tile_weight(raw, name, shape, skip)
        words = (
            q.id, layout.lead, shape[-2], shape[-1], skip, raw.shape[-1], layout.n_col_tiles,
            layout.nbytes, 2,
        )  # fmt: skip
        done = subprocess.run(
            [str(harness), *map(str, words)], input=raw.tobytes(), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        got = np.frombuffer(done.stdout, np.uint8)
        assert got[:4].view(np.float32) == pytest.approx(want[:4].view(np.float32), rel=1e-6)
        for plane, (at, size) in layout.planes.items():
            same = got[at : at + size] == want[at : at + size]
            assert same.all(), f"{shape}: plane {plane} differs from byte {np.argmin(same)} on"
