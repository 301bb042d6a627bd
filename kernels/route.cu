// Op        route_few: gate scores of few tokens, their chosen experts and weights; ties go to the lower
//           id. scores[t][e] = s_t gate[e] . (x[t] norm), s_t = 1 / sqrt(mean of x[t]^2 + eps)
//           route_chosen: the choice alone, from scores that are there
// Shapes    ids, weights [n, K], scores [n, E], gate [E, d], x [n, d], norm [d], bias [E] or null, pos [n]
//           or null, imposed [n, K] or null: ids to take instead of choosing
// Dtypes    float32; ids, pos, imposed int32; counter one unsigned, 0 before the first launch and after each
// Grid      route_few (E), route_chosen (1); 256 threads
// Assumes   n <= 8, d a multiple of 4, E = N_EXPERTS <= 1024 a multiple of groups <= 64, K <= 32;
//           norm null: neither norm nor s
// Numerics  softmax (max subtracted) or sigmoid per expert; group score = its maximum (softmax) or its
//           best two (sigmoid); weights from unbiased scores; pos -1: ids -1, weights 0. The last CTA to
//           finish chooses: scores don't depend on which that is
// Bound by  latency
// Variants  N_EXPERTS=64; N_EXPERTS=1024
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "route.cuh"
#include "route_scores.cuh"

constexpr int WARPS = ROUTE_WARPS;

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(256)
route_few(int* ids, float* weights, float* scores, int* counter, const float* gate, const float* x,
          const float* norm, const float* bias, const int* pos, const int* imposed, int n, int d,
          int n_used, int n_groups, int n_groups_used, int sigmoid, int renormalise, long long ldx,
          float scale, float eps) {
    __shared__ float score[WARPS][N_EXPERTS], group[WARPS][64];
    __shared__ ScoreSums sums;
    __shared__ int last;
    const int warp = threadIdx.x >> 5;
    score_cta(sums, scores, blockIdx.x, N_EXPERTS, gate, x, norm, n, d, ldx, eps);
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc((unsigned*)counter, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || warp >= n) return;
    const Choice how = {n_used, n_groups, n_groups_used, sigmoid, renormalise, scale};
    choose(ids + warp * n_used, weights + warp * n_used, scores + warp * N_EXPERTS, bias,
           imposed ? imposed + warp * n_used : nullptr, pos && pos[warp] < 0, how, score[warp],
           group[warp]);
}

extern "C" __global__ void __launch_bounds__(256)
route_chosen(int* ids, float* weights, const float* scores, const float* bias, const int* pos,
             const int* imposed, int n, int n_used, int n_groups, int n_groups_used, int sigmoid,
             int renormalise, float scale) {
    __shared__ float score[WARPS][N_EXPERTS], group[WARPS][64];
    const int warp = threadIdx.x >> 5;
    pdl_launch();
    pdl_wait();
    if (warp >= n) return;
    const Choice how = {n_used, n_groups, n_groups_used, sigmoid, renormalise, scale};
    choose(ids + warp * n_used, weights + warp * n_used, scores + warp * N_EXPERTS, bias,
           imposed ? imposed + warp * n_used : nullptr, pos && pos[warp] < 0, how, score[warp],
           group[warp]);
}
