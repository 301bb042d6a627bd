// Gate scores of few tokens by a CTA per expert; the last CTA to finish chooses.
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec.cuh"
#include "route.cuh"

constexpr int ROUTE_WARPS = 8;

struct RouteShared {
    float score[ROUTE_WARPS][N_EXPERTS], group[ROUTE_WARPS][64], part[ROUTE_WARPS], squares[ROUTE_WARPS];
    int last;
};

// scores[t][blockIdx.x], and by the last of `ctas` CTAs ids and weights of all n tokens. 256 threads. The next
// launch may start when all CTAs have waited.
__device__ __forceinline__ void route_cta(
        RouteShared& shared, int* ids, float* weights, float* scores, int* counter, const float* gate,
        const float* x, const float* norm, const float* bias, const int* pos, const int* imposed, int n,
        int d, int ctas, const Choice& how, long long ldx, float eps) {
    constexpr int AHEAD = 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float4* row = (const float4*)(gate + (long long)blockIdx.x * d);
    const float4* norms = (const float4*)norm;
    const auto at = [&](const float4* p, int i) {
        unsigned v[4];
        const bool there = p && 4 * i < d;
        few_load<4>((const unsigned char*)(p + i), there, v);
        return there ? make_float4(__uint_as_float(v[0]), __uint_as_float(v[1]), __uint_as_float(v[2]),
                                   __uint_as_float(v[3]))
                     : make_float4(1.f, 1.f, 1.f, 1.f);
    };
    float4 w[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        const int i = threadIdx.x + 256 * k;
        const float4 a = at(row, i), b = at(norms, i);
        w[k] = {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
    }
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
        for (int k = 0; k < AHEAD; k++) add(threadIdx.x + 256 * k, w[k]);
        for (int i = threadIdx.x + 256 * AHEAD; 4 * i < d; i += 256) {
            const float4 a = at(row, i), b = at(norms, i);
            add(i, {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w});
        }
        sum = warp_sum(sum), square = warp_sum(square);
        if (lane == 0) shared.part[warp] = sum, shared.squares[warp] = square;
        __syncthreads();
        if (threadIdx.x == 0) {
            sum = square = 0.f;
            for (int k = 0; k < ROUTE_WARPS; k++) sum += shared.part[k], square += shared.squares[k];
            scores[token * N_EXPERTS + blockIdx.x] = norm ? sum * rsqrtf(square / d + eps) : sum;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        __threadfence();
        shared.last = atomicInc((unsigned*)counter, ctas - 1) == ctas - 1;
        __threadfence();
    }
    __syncthreads();
    if (!shared.last || warp >= n) return;
    choose(ids + warp * how.n_used, weights + warp * how.n_used, scores + warp * N_EXPERTS, bias,
           imposed ? imposed + warp * how.n_used : nullptr, pos && pos[warp] < 0, how, shared.score[warp],
           shared.group[warp]);
}
