// Op        route_few: gate scores of few tokens, their chosen experts and weights; ties go to the lower
//           id. scores[t][e] = s_t gate[e] . (x[t] norm), s_t = 1 / sqrt(mean of x[t]^2 + eps)
//           route_chosen: the choice alone, from scores that are there
// Shapes    ids, weights [n, K], scores [n, E], gate [E, d], x [n, d], norm [d], bias [E] or null, pos [n]
//           or null, imposed [n, K] or null: ids to take instead of choosing
// Dtypes    float32; ids, pos, imposed int32; counter one unsigned, 0 before the first launch and after each
// Grid      route_few (E), route_chosen (1); 256 threads. N_AHEAD: quadruples of a gate row that each thread
//           of route_few asks for before it waits
// Assumes   n <= 8, d a multiple of 4, E = N_EXPERTS <= 1024 a multiple of groups <= 64, K <= 32;
//           norm null: neither norm nor s
// Numerics  softmax (max subtracted) or sigmoid per expert; group score = its maximum (softmax) or its
//           best two (sigmoid); weights from unbiased scores; pos -1: ids -1, weights 0. The last CTA to
//           finish chooses: scores don't depend on which that is
// Bound by  latency
// Variants  N_EXPERTS=64 N_AHEAD=2; N_EXPERTS=1024 N_AHEAD=8
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec.cuh"
#include "route.cuh"

constexpr int WARPS = 8;

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(256)
route_few(int* ids, float* weights, float* scores, int* counter, const float* gate, const float* x,
          const float* norm, const float* bias, const int* pos, const int* imposed, int n, int d,
          int n_used, int n_groups, int n_groups_used, int sigmoid, int renormalise, long long ldx,
          float scale, float eps) {
    __shared__ float score[WARPS][N_EXPERTS], group[WARPS][64], part[WARPS], squares[WARPS];
    __shared__ int last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float4* row = (const float4*)(gate + (long long)blockIdx.x * d);
    const float4* norms = (const float4*)norm;
    const auto at = [&](const float4* p, int i) {  // ptxas would move __ldg behind the wait
        unsigned v[4];
        const bool there = p && 4 * i < d;
        few_load<4>((const unsigned char*)(p + i), there, v);
        return there ? make_float4(__uint_as_float(v[0]), __uint_as_float(v[1]), __uint_as_float(v[2]),
                                   __uint_as_float(v[3]))
                     : make_float4(1.f, 1.f, 1.f, 1.f);
    };
    float4 w[N_AHEAD];
#pragma unroll
    for (int k = 0; k < N_AHEAD; k++) {
        const int i = threadIdx.x + 256 * k;
        const float4 a = at(row, i), b = at(norms, i);
        w[k] = {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
    }
    float own_bias[PER_LANE];
    take_bias(bias, own_bias);
    pdl_wait();
    pdl_launch();
    for (int token = 0; token < n; token++) {
        const float* in = x + token * ldx;
        float sum = 0.f, square = 0.f;
        const auto add = [&](int i, const float4& w) {
            if (4 * i >= d) return;
            const float2 lo = *(const float2*)(in + 4 * i), hi = *(const float2*)(in + 4 * i + 2);
            sum += w.x * lo.x + w.y * lo.y + (w.z * hi.x + w.w * hi.y);
            square += lo.x * lo.x + lo.y * lo.y + (hi.x * hi.x + hi.y * hi.y);
        };
#pragma unroll
        for (int k = 0; k < N_AHEAD; k++) add(threadIdx.x + 256 * k, w[k]);
        for (int i = threadIdx.x + 256 * N_AHEAD; 4 * i < d; i += 256) {
            const float4 a = at(row, i), b = at(norms, i);
            add(i, {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w});
        }
        sum = warp_sum(sum), square = warp_sum(square);
        if (lane == 0) part[warp] = sum, squares[warp] = square;
        __syncthreads();
        if (threadIdx.x == 0) {
            sum = square = 0.f;
            for (int k = 0; k < WARPS; k++) sum += part[k], square += squares[k];
            scores[token * N_EXPERTS + blockIdx.x] = norm ? sum * rsqrtf(square / d + eps) : sum;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc((unsigned*)counter, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || warp >= n) return;
    const Choice how = {n_used, n_groups, n_groups_used, sigmoid, renormalise, scale};
    choose(ids + warp * n_used, weights + warp * n_used, scores + warp * N_EXPERTS, own_bias,
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
    float own_bias[PER_LANE];
    take_bias(bias, own_bias);
    pdl_wait();
    if (warp >= n) return;
    const Choice how = {n_used, n_groups, n_groups_used, sigmoid, renormalise, scale};
    choose(ids + warp * n_used, weights + warp * n_used, scores + warp * N_EXPERTS, own_bias,
           imposed ? imposed + warp * n_used : nullptr, pos && pos[warp] < 0, how, score[warp],
           group[warp]);
}
