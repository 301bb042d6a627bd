// Op        route_scores: y[t][e] = sum_c gate[e][c] x[t][c], many tokens
// Shapes    y [n, E], gate [E, d], x [n, d] at row stride ldx
// Dtypes    float32
// Grid      (ceil(n / 16), ceil(E / 64)), 256 threads
// Assumes   d and ldx multiples of 4, x and gate 16-byte aligned
// Numerics  sums of every fourth piece of 16 columns in order, then those four: relative error 1e-6,
//           as float32 as the choice of experts needs
// Bound by  float32 FMA: 2 n E d operations
// Sources   own
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "mma.cuh"
#include "pdl.cuh"

constexpr int TOKENS = 16, EXPERTS = 64, COLS = 64, LD = COLS + 4;  // + 4: rows in different banks
constexpr int ROWS = TOKENS + EXPERTS, RING = 4;

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(256)
route_scores_f32(float* y, const float* gate, const float* x, int n, int n_experts, int d,
                 long long ldx) {
    extern __shared__ float shared[];  // [RING][ROWS][LD]: tokens, then experts
    const int token0 = blockIdx.x * TOKENS, expert0 = blockIdx.y * EXPERTS;
    pdl_launch();
    pdl_wait();
    // Threads 64 p .. take columns 16 p .. of each 64, and of 16 x 64 results 4 x 4 each.
    const int part = threadIdx.x >> 6, at = threadIdx.x & 63, t = at >> 3 & 3;
    const int e = (at & 7) + (at >> 5) * 8;
    auto copy = [&](int chunk) {
        float* to = shared + chunk % RING * ROWS * LD;
        for (int i = threadIdx.x; i < ROWS * COLS / 4; i += 256) {
            const int row = i / (COLS / 4), column = chunk * COLS + i % (COLS / 4) * 4;
            const int own = row < TOKENS ? token0 + row : expert0 + row - TOKENS;
            const bool valid = column < d && own < (row < TOKENS ? n : n_experts);
            const float* from = row < TOKENS ? x + own * ldx : gate + (long long)own * d;
            cp_async16(to + row * LD + i % (COLS / 4) * 4, valid ? from + column : gate, valid);
        }
    };
    float sum[4][4] = {};
    const int chunks = (d + COLS - 1) / COLS;
    for (int c = 0; c < RING - 1; c++) {
        if (c < chunks) copy(c);
        cp_async_commit();
    }
    for (int c = 0; c < chunks; c++) {
        cp_async_wait<RING - 2>();
        __syncthreads();
        if (c + RING - 1 < chunks) copy(c + RING - 1);
        cp_async_commit();
        const float* xs = shared + c % RING * ROWS * LD + 16 * part;
#pragma unroll
        for (int k = 0; k < 16; k += 4) {
            float4 a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = *(const float4*)(xs + (t + 4 * i) * LD + k);
                b[i] = *(const float4*)(xs + (TOKENS + e + 16 * i) * LD + k);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    sum[i][j] += a[i].x * b[j].x, sum[i][j] += a[i].y * b[j].y;
                    sum[i][j] += a[i].z * b[j].z, sum[i][j] += a[i].w * b[j].w;
                }
        }
    }
    __syncthreads();
    float* parts = shared;  // [3][64 threads][16]
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (part) parts[(part - 1) * 1024 + i * 64 + at] = sum[i / 4][i % 4];
    __syncthreads();
    if (part) return;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float total = sum[i / 4][i % 4];
        for (int p = 0; p < 3; p++) total += parts[p * 1024 + i * 64 + at];
        const int token = token0 + t + 4 * (i / 4), expert = expert0 + e + 16 * (i % 4);
        if (token < n && expert < n_experts) y[(long long)token * n_experts + expert] = total;
    }
}
