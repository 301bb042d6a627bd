// Op        unpack_tiles: GGUF rows -> float16 tiles (tile_layout.cuh), for a product of many tokens
// Shapes    raw [lead, rows] of row_bytes each, leads lead_bytes apart; tiles: those of a float16
//           weight [lead, rows, n_in]; the first `skip` columns of a row are another rank's and left out
// Dtypes    WTYPE any GGUF type but F32
// Grid      (row tiles of a lead * ceil(n_col_tiles / 4), leads); 128 threads, a warp per tile
// Assumes   skip a multiple of 32; with `list`, tiles of moe_sort: only leads that are in its first
//           ends[3] entries are written
// Numerics  each value rounded to float16 once, saturating; padding is 0
// Bound by  bytes written
// Sources   own
// Variants  WTYPE=10; WTYPE=11; WTYPE=16; WTYPE=17; WTYPE=18; WTYPE=19; WTYPE=21; WTYPE=22; WTYPE=29;
//           WTYPE=6; WTYPE=12
// Tested by tests/kernels/test_raw.py, tests/gpu/test_cuda_raw.py
#include "pairs.cuh"
#include "pdl.cuh"
#include "quants.cuh"
#include "tile_layout.cuh"

extern "C" __global__ void __launch_bounds__(128)
unpack_tiles(unsigned char* tiles, const unsigned char* raw, int rows, int n_in, int skip,
             int n_col_tiles, long long row_bytes, long long lead_bytes, const int* list,
             const int* ends) {
    __align__(16) __shared__ unsigned numbers[4][TILE_ROWS][TILE_COLS / 2 + 2];  // pairs
    const int col_blocks = (n_col_tiles + 3) / 4, n_row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int row_tile = blockIdx.x / col_blocks, col_block = blockIdx.x % col_blocks;
    const int r = threadIdx.x >> 3, group = threadIdx.x & 7;
    pdl_launch();
    pdl_wait();
    if (list != nullptr) {
        bool found = false;
        for (int i = threadIdx.x & 31; i < ends[3]; i += 32)
            found |= list[4 * i] == (int)blockIdx.y;
        if (!__any_sync(~0u, found)) return;  // all warps alike
    }
    const int row = row_tile * TILE_ROWS + r, c = 256 * col_block + 32 * group;
    float v[32];
    if (row < rows && c < n_in) {
        load_group_tail<WTYPE>(raw + blockIdx.y * lead_bytes + row * row_bytes, (c + skip) / 32,
                               skip + n_in, v);
    } else {
#pragma unroll
        for (int i = 0; i < 32; i++) v[i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
        numbers[group >> 1][r][16 * (group & 1) + i] =
            half2_of(fminf(fmaxf(v[2 * i], -65504.f), 65504.f),
                     fminf(fmaxf(v[2 * i + 1], -65504.f), 65504.f));
    __syncthreads();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, col_tile = 4 * col_block + warp;
    if (col_tile >= n_col_tiles) return;
    unsigned char* to = tiles + TILE_HEADER +
        (((long long)blockIdx.y * n_row_tiles + row_tile) * n_col_tiles + col_tile) * 2048;
#pragma unroll
    for (int j = 0; j < TILE_STEPS; j++) {
        const int g = lane >> 2, at = 8 * j + (lane & 3);
        *(uint4*)(to + 512 * j + 16 * lane) =
            make_uint4(numbers[warp][g][at], numbers[warp][g + 8][at], numbers[warp][g][at + 4],
                       numbers[warp][g + 8][at + 4]);
    }
}
