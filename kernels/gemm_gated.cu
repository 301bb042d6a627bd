// Op        gemm_gated: h[t][o] = silu(gate_o . x[t]) * (up_o . x[t]) / 16
// Shapes    h [n, rows] at row stride ldh, x [n, cols] at row stride ldx; gate and up tiled
//           [row_tiles, col_tiles]
// Dtypes    gate and up any tiled type (Q0, Q1) as float16 times their boost; x float16 of value / 16;
//           sums float32; h float16 of value / 16, saturating
// Grid      as gemm
// Assumes   as gemm; both weights of the same shape and number of column tiles
// Numerics  as gemm; silu with the fast exponential: relative error 1e-6
// Bound by  tensor cores: 4 n rows cols operations
// Sources   see include/gemm.cuh
// Variants  Q0=12 Q1=12 TOKENS=128 STAGES=4; Q0=14 Q1=13 TOKENS=64 STAGES=4; Q0=1 Q1=1 TOKENS=96 STAGES=4
// Needs     8.0
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "gemm.cuh"
#include "gemm_store.cuh"
#include "pdl.cuh"

// ---------------------------------------------------------------- device helpers ------------
// Weight rows fastest, then tokens.
struct Items {
    const unsigned char *gate, *up;
    const unsigned short* x;
    long long ldx;
    int row_tiles, col_tiles, n_tokens, cols, skip, n_row_items, n;

    __device__ __forceinline__ void open(int item, GemmSource& from) const {
        const int row_tile = item % n_row_items * 8 + gemm_own_tile(), n = row_tiles - row_tile;
        if (Q0 == Q1 || gemm_own_part() == 0)
            from.set_tiles<Q0>(gemm_own_part() ? up : gate, row_tiles, col_tiles, row_tile, n);
        else
            from.set_tiles<Q1>(up, row_tiles, col_tiles, row_tile, n);
        const int token = item / n_row_items * TOKENS;
        from.set_x(x + token * ldx, min(n_tokens - token, TOKENS), col_tiles, skip, cols,
                   [&](int t) { return t * ldx; });
    }
};

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)
gemm_gated(unsigned short* h, const unsigned char* gate, const unsigned char* up,
           const unsigned short* x, int n, int rows, int row_tiles, int col_tiles, int cols, int skip,
           long long ldh, long long ldx) {
    extern __shared__ uint4 shared[];
    pdl_launch();
    pdl_wait();
    __shared__ Items items;  // spares registers
    const int n_row_items = (rows + 127) / 128;
    items = {gate, up, x, ldx, row_tiles, col_tiles, n, cols, skip, n_row_items,
             n_row_items * ((n + TOKENS - 1) / TOKENS)};
    __syncthreads();  // every thread wrote the same
    const float gate_boost = tile_boost<Q0>(gate), up_boost = tile_boost<Q1>(up);
    const float gate_scale = 16.f * tile_unboost<Q0>(gate), up_scale = tile_unboost<Q1>(up);
    Gemm<Items, max_of(StagedTile<Q0>::end, StagedTile<Q1>::end)> ring(items, shared);
    if (ring.copies()) return;
    for (int item = blockIdx.x; item < items.n; item += gridDim.x) {
        float g[TOKENS / 2], u[TOKENS / 2];
        ring.template multiply<Q0, Q1, TOKENS>(col_tiles, gate_boost, up_boost, g, u);
        const int token = item / n_row_items * TOKENS;
        store_half<TOKENS>([&](int i) { return silu(g[i] * gate_scale) * (u[i] * up_scale); },
                           item % n_row_items * 128, rows, n - token,
                           [&](int t) { return h + (token + t) * ldh; });
    }
}
