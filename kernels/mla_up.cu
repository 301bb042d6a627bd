// Op        the weights that expand latent rows, as float16 in the order that mla_expand reads:
//           column c of head i is k_b[i, :, c] for c < k, then v_b[i, c, :]
// Shapes    up (slabs.cuh): columns h * (KS + VS) slabs of 64, in pairs, depth r; unboost [2];
//           k_b [h, r, k]; v_b [h, v, r]
// Dtypes    WTYPE (k_b) and WTYPE_V (GGUF type numbers), each in tiles (TILED, TILED_V 1: see
//           tile_layout.cuh) or raw GGUF bytes with k_row, v_row bytes a row; up float16,
//           unboost float32
// Variants  R=512 K=128 P=64 V=128 TILE=128 WTYPE=8 TILED=1 WTYPE_V=12 TILED_V=1;
//           R=512 K=192 P=64 V=256 TILE=64 WTYPE=8 TILED=0 WTYPE_V=1 TILED_V=1;
//           R=32 K=16 P=8 V=16 TILE=128 WTYPE=30 TILED=1 WTYPE_V=11 TILED_V=0
// Grid      (RS, h * (KS + VS)), 128 threads: a block of 64 columns x 64 of depth
// Assumes   k, v, r at compile time; whole rows (nothing is cut along k or r)
// Numerics  up = boost * weight, rounded as tiles.cuh says (raw: boost 1, rounded once);
//           unboost = 1 / boost of keys, of values
// Bound by  bytes: h (k + v) r x (weight + 2)
// Sources   own
// Tested by tests/kernels/test_prefill.py, tests/gpu/test_cuda_prefill.py
#include <cuda_fp16.h>

#include "pdl.cuh"
#include "quants.cuh"
#include "slabs.cuh"
#include "tiles.cuh"

// ---------------------------------------------------------------- helpers -------------------
// Calls put(row, column, two values) for rows 64 row .. + 63 and columns 64 column .. + 63 of one
// head's n_rows x n_columns; the thread's share of them, zeros outside.
template <int QTYPE, bool IN_TILES, class Put>
__device__ __forceinline__ void unpack_block(const unsigned char* w, int head, int n_heads,
                                             int n_rows, int n_columns, int row, int column,
                                             long long row_bytes, Put put) {
    if constexpr (IN_TILES) {  // a warp takes 16 rows
        constexpr int edge = Tile<QTYPE>::edge / TILE_COLS;
        const int row_tiles = (n_rows + 15) / 16, lane = threadIdx.x & 31, own = threadIdx.x >> 5;
        const int column_tiles = ((n_columns + 63) / 64 + edge - 1) / edge * edge;
        unsigned pairs[TILE_STEPS][4] = {};
        if (4 * row + own < row_tiles) {
            const auto view = tile_view<QTYPE>(w, (long long)n_heads * row_tiles, column_tiles);
            TileData<QTYPE> data;
            load_tile<QTYPE>(view, (long long)head * row_tiles + 4 * row + own, column, lane, data);
            const float boost = tile_boost<QTYPE>(w);
#pragma unroll
            for (int j = 0; j < TILE_STEPS; j++)
                scaled_fragment<QTYPE>(
                    data, j, half_scales<QTYPE>(data, j / Tile<QTYPE>::steps, boost), pairs[j]);
        }
#pragma unroll
        for (int j = 0; j < TILE_STEPS; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                put(16 * own + (lane >> 2) + 8 * (i & 1), 16 * j + 2 * (lane & 3) + 8 * (i >> 1),
                    pairs[j][i]);
    } else {  // a thread takes 32 columns of a row
        const int line = threadIdx.x >> 1, half = threadIdx.x & 1;
        float v[32];
#pragma unroll
        for (int i = 0; i < 32; i++) v[i] = 0.f;
        if (64 * row + line < n_rows && 64 * column + 32 * half < n_columns)
            load_group_tail<QTYPE>(w + ((long long)head * n_rows + 64 * row + line) * row_bytes,
                                   2 * column + half, n_columns, v);
#pragma unroll
        for (int i = 0; i < 32; i += 2) put(line, 32 * half + i, pack_halves(v[i], v[i + 1]));
    }
}

template <int QTYPE, bool IN_TILES>
__device__ __forceinline__ float unboost_of(const unsigned char* w) {
    if constexpr (IN_TILES) return tile_unboost<QTYPE>(w);
    return 1.f;
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(128)
mla_up(unsigned char* up, float* unboost, const unsigned char* k_b, const unsigned char* v_b, int h,
       long long k_row, long long v_row) {
    __align__(16) __shared__ unsigned short block[64][72];  // [column of up][depth]
    const int depth = blockIdx.x, slab = blockIdx.y, head = slab / (KS + VS);
    const int part = slab % (KS + VS);
    pdl_launch();
    if (part < KS)  // a row of k_b is one of depth
        unpack_block<WTYPE, TILED>(k_b, head, h, R, K, depth, part, k_row,
                                   [&](int row, int column, unsigned pair) {
                                       block[column][row] = (unsigned short)pair;
                                       block[column + 1][row] = (unsigned short)(pair >> 16);
                                   });
    else  // a row of v_b is a column
        unpack_block<WTYPE_V, TILED_V>(v_b, head, h, V, R, part - KS, depth, v_row,
                                       [&](int row, int column, unsigned pair) {
                                           block[row][column] = (unsigned short)pair;
                                           block[row][column + 1] = (unsigned short)(pair >> 16);
                                       });
    __syncthreads();
    pdl_wait();
    unsigned char* to = up + ((long long)(slab >> 1) * RS + depth) * 128 * SLAB_ROW;
    for (int i = threadIdx.x; i < 512; i += 128) {
        const int column = i >> 3, piece = i & 7;
        *reinterpret_cast<uint4*>(to + piece_at(64 * (slab & 1) + column, piece)) =
            *reinterpret_cast<const uint4*>(&block[column][8 * piece]);
    }
    if (depth == 0 && slab == 0 && threadIdx.x == 0) {
        unboost[0] = unboost_of<WTYPE, TILED>(k_b);
        unboost[1] = unboost_of<WTYPE_V, TILED_V>(v_b);
    }
}
