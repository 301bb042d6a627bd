// Products of many tokens with a head's tiled weight on tensor cores: float16 weights (tiles.cuh,
// scaled) times float16 activations that hold a sixteenth, so that 1e6 doesn't overflow; float32 sums.
//
// Sources: own. Tested by tests/kernels/test_mla.py
#pragma once
#include <cuda_fp16.h>

#include "mma.cuh"
#include "tiles.cuh"

// Halves between tokens in shared memory: an odd number of 16 bytes.
template <int IN>
constexpr int MANY_LD = (IN + 63) / 64 * 64 + 8;

__device__ __forceinline__ __half many_half(float x) {
    return __float2half_rn(fminf(fmaxf(x * 0.0625f, -65504.f), 65504.f));
}

// acc[j][i] = row g (i < 2) or g + 8 times tokens 8 j + 2 t + i % 2: a warp, one row tile whose first
// tile is `first`; x [TOKENS][MANY_LD<IN>], zeros from IN on. Multiply by many_result() afterwards.
template <int QTYPE, int IN, int TOKENS>
__device__ __forceinline__ void many_product(float (&acc)[TOKENS / 8][4], const TileView<QTYPE>& view,
                                             long long row_tile, const __half* x, float boost) {
    constexpr int USED = (IN + 63) / 64, LD = MANY_LD<IN>;
    const int lane = threadIdx.x & 31;
    const __half* rows = x + ((lane >> 4) * 8 + (lane & 7)) * LD + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) acc[i][c] = 0.f;
    TileData<QTYPE> w;
    load_tile<QTYPE>(view, row_tile, 0, lane, w);
#pragma unroll 1
    for (int tile = 0; tile < USED; tile++) {
        TileData<QTYPE> next = w;
        if (tile + 1 < USED) load_tile<QTYPE>(view, row_tile, tile + 1, lane, next);
#pragma unroll
        for (int j = 0; j < TILE_STEPS; j++) {
            unsigned a[4];
            const int group = Tile<QTYPE>::has_scale ? j / Tile<QTYPE>::steps : 0;
            scaled_fragment<QTYPE>(w, j, half_scales<QTYPE>(w, group, boost), a);
#pragma unroll
            for (int i = 0; i < TOKENS / 16; i++) {
                unsigned b[4];
                ldmatrix(b, rows + 16 * i * LD + 64 * tile + 16 * j);
                const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_f16(acc[2 * i], a, b0);
                mma_f16(acc[2 * i + 1], a, b1);
            }
        }
        w = next;
    }
}

template <int QTYPE>
__device__ __forceinline__ float many_result(const unsigned char* buffer) {
    return 16.f * tile_unboost<QTYPE>(buffer);
}
