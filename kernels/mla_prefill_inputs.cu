// Op        what expanded prefill reads beside the cache, as float16 in the order of its products:
//           up: column c of head i is k_b[i, :, c] for c < k, then v_b[i, c, :];
//           queries: rotated (pairs 2i, 2i + 1 of the p part) and times 1 + growth *
//           ln(1 + floor(pos / length))
// Shapes    up (slabs.cuh): columns h * (KS + VS) slabs of 64, in pairs, depth r; unboost [2];
//           k_b [h, r, k]; v_b [h, v, r]; queries (slabs.cuh); q [n, h, k + p] with token stride
//           ldq; cosine, sine [n, p / 2]; pos [n], -1 = padded
// Dtypes    WTYPE (k_b) and WTYPE_V (GGUF type numbers), each in tiles (TILED, TILED_V 1: see
//           tile_layout.cuh) or raw GGUF bytes with k_row, v_row bytes a row; up, queries float16,
//           the rest float32
// Variants  R=512 K=128 P=64 V=128 TILE=128 WTYPE=8 TILED=1 WTYPE_V=12 TILED_V=1;
//           R=512 K=192 P=64 V=256 TILE=64 WTYPE=8 TILED=0 WTYPE_V=1 TILED_V=1;
//           R=32 K=16 P=8 V=16 TILE=128 WTYPE=30 TILED=1 WTYPE_V=11 TILED_V=0
// Grid      (RS * h * (KS + VS) + 128 ceil(n / 128)), 128 threads: first blocks of 64 columns x 64
//           of depth of up, then tokens
// Assumes   k, p, v, r at compile time, k and p multiples of 8, q at a multiple of 16 bytes and ldq
//           of 4; whole rows (nothing is cut along k or r)
// Numerics  up = boost * weight, rounded as tiles.cuh says (raw: boost 1, rounded once);
//           unboost = 1 / boost of keys, of values; queries rounded once, within +-65504, padded
//           ones 0
// Bound by  bytes: h (k + v) r x (weight + 2) + 6 n h (k + p)
// Sources   own
// Tested by tests/kernels/test_prefill.py, tests/gpu/test_cuda_prefill.py
#include <cuda_fp16.h>

#include "pdl.cuh"
#include "quants.cuh"
#include "slabs.cuh"
#include "tiles.cuh"

#define COLUMN_SLABS (KS + VS)  // of up, a head

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

// A block of up, brought into order in shared memory before pdl_wait.
__device__ __forceinline__ void write_up(unsigned char* up, float* unboost,
                                         const unsigned char* k_b, const unsigned char* v_b, int h,
                                         long long k_row, long long v_row, int at) {
    __align__(16) __shared__ unsigned short block[64][72];  // [column of up][depth]
    const int depth = at % RS, slab = at / RS, head = slab / COLUMN_SLABS;
    const int part = slab % COLUMN_SLABS;
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
    if (at == 0 && threadIdx.x == 0) {
        unboost[0] = unboost_of<WTYPE, TILED>(k_b);
        unboost[1] = unboost_of<WTYPE_V, TILED_V>(v_b);
    }
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(128)
mla_prefill_inputs(unsigned char* up, float* unboost, unsigned char* queries,
                   const unsigned char* k_b, const unsigned char* v_b, const float* q,
                   const float* cosine, const float* sine, const int* pos, int n, int h,
                   long long k_row, long long v_row, long long ldq, int length, float growth) {
    const int n_up = RS * COLUMN_SLABS * h, t = (int)blockIdx.x - n_up, blocks = (n + 127) / 128;
    pdl_launch();
    if (t < 0) {
        write_up(up, unboost, k_b, v_b, h, k_row, v_row, blockIdx.x);
        return;
    }
    pdl_wait();
    const int at = t < n ? pos[t] : -1;
    float factor = 1.f;
    if (growth != 0.f && at >= 0) factor += growth * log1pf((float)(at / length));
    for (int i = threadIdx.x; i < h * SLABS * 8; i += 128) {
        const int head = i / (SLABS * 8), column = i % (SLABS * 8), slab = column >> 3;
        const int in_nope = slab < KS, first = 8 * (in_nope ? column : column - 8 * KS);
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = 0.f;
        if (at >= 0 && first < (in_nope ? K : P)) {
            const float* from =
                q + t * ldq + (long long)head * (K + P) + (in_nope ? first : K + first);
            const float4 low = *reinterpret_cast<const float4*>(from);
            const float4 high = *reinterpret_cast<const float4*>(from + 4);
            v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
            v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
            if (!in_nope)
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const float c = cosine[t * (P / 2) + (first + j) / 2];
                    const float s = sine[t * (P / 2) + (first + j) / 2];
                    const float even = v[j], odd = v[j + 1];
                    v[j] = even * c - odd * s, v[j + 1] = even * s + odd * c;
                }
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] *= factor;
        }
        unsigned char* to =
            queries + (((long long)head * blocks + t / 128) * SLABS + slab) * QUERY_SLAB;
        *reinterpret_cast<uint4*>(to + piece_at(t % 128, column & 7)) = pack_piece(v);
    }
}

