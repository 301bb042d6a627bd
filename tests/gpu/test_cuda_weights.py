"""Tiles on a GPU: repacked, unpacked by tensor cores' rules, and downloaded again."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from kit.tiled import TILED, boost, cut_row, qtype_of, scaled_values, shapes, tile_weight
from kit.toy_gguf import random_weight

from mlacli.backends import cuda_weights
from mlacli.backends.cuda_sources import kernel_folder
from mlacli.loading import drawn
from mlacli.loading.tiles import tiled_shape
from mlacli.parallel.shards import Shard

INCLUDE = kernel_folder() / "include"
UNPACK = """
#include "tiles.cuh"
extern "C" __global__ void unpack(const unsigned char* buffer, float* exact, unsigned short* scaled,
                                  int n_row_tiles, int n_col_tiles) {
    using W = Tile<WTYPE>;
    const int lane = threadIdx.x, n = n_col_tiles * TILE_COLS;
    const TileView<WTYPE> view = tile_view<WTYPE>(buffer, n_row_tiles, n_col_tiles);
    TileData<WTYPE> w;
    load_tile<WTYPE>(view, blockIdx.y, blockIdx.x, lane, w);
#pragma unroll
    for (int j = 0; j < TILE_STEPS; j++) {
        unsigned r[4], low[4] = {}, half[4];
        float s[2], m[2];
        exact_scales<WTYPE>(w, j / W::steps, s, m);
        exact_fragment<WTYPE>(w, j, r);
        if constexpr (W::has_low) exact_low(w, j, low);
        const HalfScales scales = half_scales<WTYPE>(w, j / W::steps, tile_boost<WTYPE>(buffer));
        scaled_fragment<WTYPE>(w, j, scales, half);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int shift = i & 1 ? 0 : 16, reg = i / 2;
            const int row = 16 * blockIdx.y + lane / 4 + 8 * (reg & 1);
            const int col = 64 * blockIdx.x + 16 * j + 2 * (lane % 4) + 8 * (reg / 2) + i % 2;
            float value = bf16_bits_to_float(r[reg] << shift >> 16);
            if (W::has_low) value += bf16_bits_to_float(low[reg] << shift >> 16);
            exact[(long long)row * n + col] = __fmaf_rn(s[reg & 1], value, m[reg & 1]);
            scaled[(long long)row * n + col] = half[reg] << shift >> 16;
        }
    }
}
"""


def device(nbytes: int):
    from mlacli.backends.cuda_device import CudaDevice

    return CudaDevice("cuda0", nbytes)


def shard_of(name: str, shape: tuple[int, ...], skip: int) -> Shard:
    axis, ranges = (len(shape) - 1, ((512 + skip, 512 + skip + shape[-1]),)) if skip else (None, ())
    q = qtype_of(name)
    return Shard("blk.1.ffn_down_exps.weight", 0, 1, axis, ranges, shape, q, 0, ("x",))


def random_raw(name: str, shape: tuple[int, ...], skip: int, rng: np.random.Generator):
    held, own = cut_row(name, shape[-1], skip)
    raw = random_weight((*shape[:-1], held), T[name], rng).view(np.uint8)
    return raw.reshape(*shape[:-1], -1), held, own


def unpacked(tiles, layout, name: str) -> tuple[np.ndarray, np.ndarray]:
    import cupy as cp

    module = cp.RawModule(
        code=UNPACK, options=("-std=c++17", f"-I{INCLUDE}", f"-DWTYPE={int(T[name])}")
    )
    rows, n = layout.all_row_tiles * 16, layout.n_col_tiles * 64
    exact, scaled = cp.full((rows, n), 1e30, cp.float32), cp.full((rows, n), 9, cp.float16)
    sizes = (np.int32(layout.all_row_tiles), np.int32(layout.n_col_tiles))
    grid = (layout.n_col_tiles, layout.all_row_tiles)
    module.get_function("unpack")(grid, (32,), (np.uintp(tiles.ptr), exact, scaled, *sizes))
    shape = layout.lead, -1, n
    return exact.get().reshape(shape), scaled.get().reshape(shape)


@pytest.mark.parametrize("name", TILED)
def test_weights_are_repacked_unpacked_and_come_back(name: str) -> None:
    rng = np.random.default_rng(200 + int(T[name]))
    more = [((40, 27, 768), 0), ((1, 2000, 2048), 0)]
    for shape, skip in [*shapes(name), *more]:
        raw, held, own = random_raw(name, shape, skip, rng)
        layout, want = tiled_shape(shape, qtype_of(name), skip), tile_weight(raw, name, shape, skip)
        gpu = device(layout.nbytes + (4 << 20))  # the largest needs several pieces
        weight = cuda_weights.upload(gpu, raw, shard_of(name, shape, skip))
        gpu.end_sends()
        got = gpu.get(weight.tiles)
        assert got[:4].view(np.float32) == pytest.approx(want[:4].view(np.float32), rel=1e-6)
        for plane, (at, size) in layout.planes.items():
            same = got[at : at + size] == want[at : at + size]
            assert same.all(), f"{shape}: plane {plane} differs from byte {np.argmin(same)} on"
        assert np.array_equal(cuda_weights.download(gpu, weight), raw)

        flat = raw.reshape(-1, raw.shape[-1])
        values = dequantize(flat, T[name]).reshape(layout.lead, -1, held)
        by = boost(got[:4].view(np.float32)[0])
        halves = scaled_values(flat, name, by).reshape(values.shape)
        for result, wanted in zip(unpacked(weight.tiles, layout, name), (values, halves)):  # noqa: B905
            local = result[:, : shape[-2], own]
            wrong = np.argwhere(local != wanted[..., own])
            assert not len(wrong), (
                f"{shape} skip {skip} {result.dtype}: {len(wrong)} of {local.size} differ, first "
                f"{wrong[0]}: {local[tuple(wrong[0])]}, not {wanted[..., own][tuple(wrong[0])]}"
            )
            inside = np.zeros(result.shape, bool)
            inside[:, : shape[-2], own] = True
            assert not result[~inside].any(), "padding and other ranks' columns are 0"


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_K", "Q5_0", "IQ1_M", "IQ3_S", "MXFP4"])
def test_random_weights_drawn_on_the_device_are_those_of_numpy(name: str) -> None:
    shape, gpu = (3, 300, 1024), device(16 << 20)
    q = qtype_of(name)
    whole = drawn.Drawn.whole(drawn.source("w", q, 0.02, 5), (4, 400, q.row_bytes(2048)))
    raw = whole[1:, 100:, : q.row_bytes(1024)]
    weight = cuda_weights.upload(gpu, raw, shard_of(name, shape, 0))
    gpu.end_sends()
    assert np.array_equal(cuda_weights.download(gpu, weight), np.asarray(raw))
