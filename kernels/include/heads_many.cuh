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

// A lane's part of all tiles of a row tile, under way at once: rows are short.
template <int QTYPE, int IN>
struct ManyTiles {
    static constexpr int USED = (IN + 63) / 64;
    TileData<QTYPE> w[USED];

    // May come before pdl_wait().
    __device__ __forceinline__ void load(const TileView<QTYPE>& view, long long row_tile) {
#pragma unroll
        for (int i = 0; i < USED; i++) load_tile<QTYPE>(view, row_tile, i, threadIdx.x & 31, w[i]);
    }
};

// acc[j][i] = row g (i < 2) or g + 8 times tokens 8 j + 2 t + i % 2: a warp, one row tile; x
// [TOKENS][MANY_LD<IN>], zeros from IN on. Multiply by many_result() afterwards.
template <int QTYPE, int IN, int TOKENS>
__device__ __forceinline__ void many_product(float (&acc)[TOKENS / 8][4],
                                             const ManyTiles<QTYPE, IN>& tiles, const __half* x,
                                             float boost) {
    constexpr int LD = MANY_LD<IN>;
    const int lane = threadIdx.x & 31;
    const __half* rows = x + ((lane >> 4) * 8 + (lane & 7)) * LD + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) acc[i][c] = 0.f;
#pragma unroll
    for (int tile = 0; tile < tiles.USED; tile++)
#pragma unroll
        for (int j = 0; j < TILE_STEPS; j++) {
            unsigned a[4];
            const int group = Tile<QTYPE>::has_scale ? j / Tile<QTYPE>::steps : 0;
            scaled_fragment<QTYPE>(tiles.w[tile], j,
                                   half_scales<QTYPE>(tiles.w[tile], group, boost), a);
#pragma unroll
            for (int i = 0; i < TOKENS / 16; i++) {
                unsigned b[4];
                ldmatrix(b, rows + 16 * i * LD + 64 * tile + 16 * j);
                const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_f16(acc[2 * i], a, b0);
                mma_f16(acc[2 * i + 1], a, b1);
            }
        }
}

template <int QTYPE>
__device__ __forceinline__ float many_result(const unsigned char* buffer) {
    return 16.f * tile_unboost<QTYPE>(buffer);
}
