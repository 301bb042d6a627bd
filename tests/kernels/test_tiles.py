"""Weight tiles: NumPy's tiling read back by kernels/include/tiles.cuh, bit for bit with gguf-py.

Weakest link: kit/tiled.py lays the tiles out, so repack.cu is tested against it.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from kit.harness import program
from kit.tiled import TILED, boost, cut_row, qtype_of, scaled_values, shapes, tile_weight
from kit.toy_gguf import random_weight

from mlacli.loading.tiles import tiled_shape

HERE = Path(__file__).parent


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    kind = f"u{got.dtype.itemsize}"
    wrong = np.argwhere(got.view(kind) != want.view(kind))
    assert not len(wrong), f"{len(wrong)} of {got.size} differ, first at {wrong[0]}: " + str(
        (got[tuple(wrong[0])], want[tuple(wrong[0])])
    )


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    return program(HERE / "tiles_harness.cpp", folder, "-O1")


@pytest.mark.parametrize("name", TILED)
def test_tiles_unpack_as_gguf_does(harness, name) -> None:
    rng = np.random.default_rng(int(T[name]))
    for shape, skip in shapes(name):
        held, own = cut_row(name, shape[-1], skip)
        raw = random_weight((*shape[:-1], held), T[name], rng).view(np.uint8)
        raw = raw.reshape(*shape[:-1], -1)
        layout = tiled_shape(shape, qtype_of(name), skip)
        buffer = tile_weight(raw, name, shape, skip)
        words = [int(T[name]), layout.all_row_tiles, layout.n_col_tiles, layout.nbytes]
        done = subprocess.run(
            [str(harness), *map(str, words)], input=buffer.tobytes(), capture_output=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        rows, n = layout.n_row_tiles * 16, layout.n_col_tiles * 64
        size = layout.lead * rows * n
        exact = np.frombuffer(done.stdout, np.float32, size).reshape(layout.lead, rows, n)
        scaled = np.frombuffer(done.stdout, np.float16, size, 4 * size).reshape(exact.shape)
        flat = raw.reshape(-1, raw.shape[-1])
        values = dequantize(flat, T[name]).reshape(layout.lead, -1, held)
        by = boost(buffer[:4].view(np.float32)[0])
        halves = scaled_values(flat, name, by).reshape(values.shape)
        for got, want in ((exact, values), (scaled, halves)):
            inside = np.zeros(got.shape, bool)
            inside[:, : shape[-2], own] = True
            local = got[:, : shape[-2], own]
            same_bits(np.ascontiguousarray(local) + 0, want[..., own] + 0)  # + 0: one zero
            assert not got[~inside].any(), "padding and other ranks' columns are 0"
        largest = np.abs(halves[..., own].astype(np.float32)).max()
        assert name == "F16" or 2**8 < largest < 2**14
        error = halves[..., own] / np.float64(by if name != "F16" else 1) - values[..., own]
        assert np.mean(error**2) < 3e-7 * np.mean(values[..., own].astype(np.float64) ** 2)
