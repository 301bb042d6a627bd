// Op        route_scores: y[t][e] = sum_c gate[e][c] x[t][c], many tokens
// Shapes    y [n, E], gate [E, d], x [n, d] at row stride ldx
// Dtypes    float32
// Grid      (ceil(n / 16), ceil(E / 64), CLUSTER), 512 threads, shared bytes 42240 RING (2 or 3): a cluster
//           of 1 to 8 CTAs shares the columns of a result
// Assumes   d and ldx multiples of 4, x and gate 16-byte aligned
// Numerics  sums of every eighth piece of 16 columns in order, then those eight, then the CTAs: relative
//           error 1e-6, as float32 as the choice of experts needs
// Bound by  float32 FMA: 2 n E d operations
// Sources   own
// Variants  RING=3; RING=2; RING=2 CLUSTER=8 @9.0
// Needs     8.0
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "cluster.cuh"
#include "mma.cuh"
#include "pdl.cuh"

#if CLUSTER > 1
#define __shared_bounds__(threads) __cluster_dims__(1, 1, CLUSTER) __launch_bounds__(threads)
#else
#define __shared_bounds__(threads) __launch_bounds__(threads)
#endif

constexpr int TOKENS = 16, EXPERTS = 64, COLS = 128, LD = COLS + 4;  // + 4: rows in different banks
constexpr int ROWS = TOKENS + EXPERTS, PARTS = 8;

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __shared_bounds__(512)
route_scores_f32(float* y, const float* gate, const float* x, int n, int n_experts, int d,
                 long long ldx) {
    extern __shared__ float shared[];  // [RING][ROWS][LD]: tokens, then experts
#if CLUSTER > 1
    __shared__ float sums[TOKENS * EXPERTS];
#endif
    const int token0 = blockIdx.x * TOKENS, expert0 = blockIdx.y * EXPERTS;
    pdl_launch();
    pdl_wait();
    // Threads 64 p .. take columns 16 p .. of each 128, and of 16 x 64 results 4 x 4 each.
    const int part = threadIdx.x >> 6, at = threadIdx.x & 63;
    const int t = at >> 3 & 3, e = (at & 7) + (at >> 5) * 8;
    // A thread copies four columns of every 16th row.
    const int row = threadIdx.x >> 5, column = (threadIdx.x & 31) * 4;
    const float* own_x = x + (long long)min(token0 + row, n - 1) * ldx + column;
    const float* own_gate[EXPERTS / 16];
#pragma unroll
    for (int i = 0; i < EXPERTS / 16; i++)
        own_gate[i] = gate + (long long)min(expert0 + row + 16 * i, n_experts - 1) * d + column;
    auto copy = [&](int chunk) {
        float* to = shared + (chunk % RING * ROWS + row) * LD + column;
        const bool valid = chunk * COLS + column < d;
        const int from = valid ? chunk * COLS : -column;
        cp_async16(to, own_x + from, valid);
#pragma unroll
        for (int i = 0; i < EXPERTS / 16; i++)
            cp_async16(to + (TOKENS + 16 * i) * LD, own_gate[i] + from, valid);
    };
    float sum[4][4] = {};
    const int all = (d + COLS - 1) / COLS, rank = cluster_rank();
    const int first = all * rank / CLUSTER, chunks = all * (rank + 1) / CLUSTER;
    for (int c = first; c < first + RING - 1; c++) {
        if (c < chunks) copy(c);
        cp_async_commit();
    }
    for (int c = first; c < chunks; c++) {
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
    float* parts = shared;  // [PARTS][16][64 threads]
#pragma unroll
    for (int i = 0; i < 16; i++) parts[(part * 16 + i) * 64 + at] = sum[i / 4][i % 4];
    __syncthreads();
#pragma unroll
    for (int own = 0; own < 16; own += PARTS) {  // a part adds up two of a thread's 16
        const int i = own + part;
        float total = 0.f;
#pragma unroll
        for (int p = 0; p < PARTS; p++) total += parts[(p * 16 + i) * 64 + at];
        const int token = t + 4 * (i / 4), expert = e + 16 * (i % 4);
#if CLUSTER > 1
        sums[token * EXPERTS + expert] = total;
#else
        if (token0 + token < n && expert0 + expert < n_experts)
            y[(long long)(token0 + token) * n_experts + expert0 + expert] = total;
#endif
    }
#if CLUSTER > 1
    cluster_sync();
    constexpr int OWN = TOKENS * EXPERTS / CLUSTER;
    if (threadIdx.x < OWN) {
        const int at = rank * OWN + threadIdx.x;
        unsigned part[CLUSTER];
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) part[i] = peer_load((const unsigned*)sums + at, i);
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) total += __uint_as_float(part[i]);
        const int token = token0 + at / EXPERTS, expert = expert0 + at % EXPERTS;
        if (token < n && expert < n_experts) y[(long long)token * n_experts + expert] = total;
    }
    cluster_sync();  // others may still read this CTA's sums
#endif
}
