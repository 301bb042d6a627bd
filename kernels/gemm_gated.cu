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
#include "gemm_gated.cuh"
#include "gemm_store.cuh"

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)
gemm_gated(unsigned short* h, const unsigned char* gate, const unsigned char* up,
           const unsigned short* x, int n, int rows, int row_tiles, int col_tiles, int cols, int skip,
           long long ldh, long long ldx) {
    extern __shared__ uint4 shared[];
    pdl_launch();
    pdl_wait();
    __shared__ Items items;  // spares registers
    items.set(gate, up, x, ldx, n, rows, row_tiles, col_tiles, cols, skip);
    __syncthreads();  // every thread wrote the same
    const float gate_boost = tile_boost<Q0>(gate), up_boost = tile_boost<Q1>(up);
    const float gate_scale = 16.f * tile_unboost<Q0>(gate), up_scale = tile_unboost<Q1>(up);
    Gemm<Items, TILE_BYTES> ring(items, shared);
    if (ring.copies()) return;
    for (int item = blockIdx.x; item < items.n; item += gridDim.x) {
        float g[TOKENS / 2], u[TOKENS / 2];
        ring.template multiply<Q0, Q1, TOKENS>(col_tiles, gate_boost, up_boost, g, u);
        const int token = items.token(item);
        store_half<TOKENS>([&](int i) { return silu(g[i] * gate_scale) * (u[i] * up_scale); },
                           items.row(item), rows, n - token,
                           [&](int t) { return h + (token + t) * ldh; });
    }
}
