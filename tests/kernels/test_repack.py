"""Weights to the device and back, with kernels/repack.cu run on the CPU.

The tiles are those that NumPy makes, and what comes back is what the file has. Weakest link:
kit/tiled.py; test_tiles.py holds it against gguf-py through the device's unpacking.
"""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from kit.simt import headers, why_not
from kit.tiled import TILED, cut_row, qtype_of, shapes, tile_weight
from kit.toy_gguf import random_weight

from mlacli.backends import cuda_weights
from mlacli.backends.cuda_array import Array
from mlacli.loading.tiles import tiled_shape
from mlacli.parallel.shards import Shard

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if why_not():
        pytest.skip(why_not())
    built = tmp_path_factory.mktemp("repack") / "repack.so"
    folders = (HERE.parent / "kit", KERNELS, KERNELS / "include", headers())
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", *(f"-I{folder}" for folder in folders)]
    source = str(HERE / "repack_harness.cpp")
    subprocess.run(["g++", *flags, source, "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


class CpuDevice:
    """What upload and download need of a device, in host memory that starts as 0xA5."""

    def __init__(self, library: ctypes.CDLL, nbytes: int, n_spare: int) -> None:
        self.memory = np.full(nbytes + 256, 0xA5, np.uint8)
        start = -self.memory.ctypes.data % 256
        self.memory = self.memory[start : start + nbytes]
        self.library, self.at, self.n_spare, self.n_sent = library, 0, n_spare, 0

    def take(self, shape: tuple[int, ...], dtype: type) -> Array:
        array = Array.dense(self.memory.ctypes.data + self.at, shape, dtype)
        self.at += -(-array.nbytes // 256) * 256
        assert self.at <= self.memory.nbytes - self.n_spare
        return array

    def spare(self, most: int) -> Array:
        n = min(most, self.n_spare)
        return Array.dense(self.memory[self.memory.nbytes - self.n_spare :].ctypes.data, (n,), "u1")

    def send(self, array: Array, host: np.ndarray) -> None:
        assert array.nbytes == host.nbytes
        self.n_sent += 1
        packed = np.ascontiguousarray(host)
        ctypes.memmove(array.ptr, packed.ctypes.data, array.nbytes)

    def get(self, array: Array) -> np.ndarray:
        at = array.ptr - self.memory.ctypes.data
        return self.memory[at : at + array.nbytes].reshape(array.shape).copy()

    def launch(
        self, name: str, grid: tuple[int], block: int, tiles: Array, raw: Array, *sizes: int,
        WTYPE: int,
    ) -> None:  # fmt: skip
        assert (name, block) == ("repack_tiles", 128)
        pointers = (ctypes.c_void_p(tiles.ptr), ctypes.c_void_p(raw.ptr))
        assert self.library.repack_on_cpu(WTYPE, grid[0], *pointers, *sizes) == 0


def shard_of(name: str, shape: tuple[int, ...], skip: int) -> Shard:
    q = qtype_of(name)
    axis, ranges = (len(shape) - 1, ((512 + skip, 512 + skip + shape[-1]),)) if skip else (None, ())
    return Shard("blk.1.ffn_down_exps.weight", 0, 1, axis, ranges, shape, q, 0, ("x",))


@pytest.mark.parametrize("room", ["one piece", "16 rows a piece"])
@pytest.mark.parametrize("name", TILED)
def test_tiles_are_numpy_s_and_come_back(library, name, room) -> None:
    rng = np.random.default_rng(50 + int(T[name]))
    for shape, skip in shapes(name):
        held, _ = cut_row(name, shape[-1], skip)
        raw = random_weight((*shape[:-1], held), T[name], rng).view(np.uint8)
        raw = raw.reshape(*shape[:-1], -1)
        layout, want = tiled_shape(shape, qtype_of(name), skip), tile_weight(raw, name, shape, skip)
        n_spare = 1 << 20 if room == "one piece" else 16 * raw.shape[-1] + 15
        device = CpuDevice(library, layout.nbytes + n_spare, n_spare)
        weight = cuda_weights.upload(device, raw, shard_of(name, shape, skip))
        assert weight.tiles is not None and weight.skip == skip
        assert device.n_sent == 2 or room != "one piece"
        got = device.get(weight.tiles)
        assert got[:4].view(np.float32) == pytest.approx(want[:4].view(np.float32), rel=1e-6)
        for plane, (at, size) in layout.planes.items():
            same = got[at : at + size] == want[at : at + size]
            assert same.all(), f"{shape}: plane {plane} differs from byte {np.argmin(same)} on"
        assert np.array_equal(cuda_weights.download(device, weight), raw)


def test_views_of_every_kind_travel(library) -> None:
    whole = np.arange(4 * 64 * 272, dtype=np.uint32).astype(np.uint8).reshape(4, 64, 272)
    whole[..., 1::34] = 0  # no infinite scales
    for raw in (whole[1:3], whole[:, 16:48], whole[..., 34:102], whole[0], whole[0, :3]):
        shape = (*raw.shape[:-1], raw.shape[-1] // 34 * 32)
        device = CpuDevice(library, 1 << 20, 9000)
        weight = cuda_weights.upload(device, raw, shard_of("Q8_0", shape, 0))
        assert np.array_equal(cuda_weights.download(device, weight), raw)


def test_untiled_weights_travel_in_pieces(library, monkeypatch) -> None:
    monkeypatch.setattr(cuda_weights, "PIECE", 16 * 64)
    for raw in (np.arange(128, dtype=np.uint8), np.arange(2 * 40 * 64, dtype=np.uint32)):
        raw = raw.astype(np.uint8).reshape(-1, 40, 64) if raw.size > 128 else raw
        shape = (*raw.shape[:-1], raw.shape[-1] // 4)
        device = CpuDevice(library, 1 << 16, 0)
        weight = cuda_weights.upload(device, raw, shard_of("F32", shape, 0))
        assert weight.tiles is None and np.array_equal(device.get(weight.raw), raw)
        assert device.n_sent == (6 if raw.ndim > 1 else 1)
