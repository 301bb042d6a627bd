// Gate scores of few tokens, a CTA per expert.
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec.cuh"

constexpr int ROUTE_WARPS = 8;

struct ScoreSums {
    float part[ROUTE_WARPS], squares[ROUTE_WARPS];
};

// scores[t][e] = s_t gate[e] . (x[t] norm) of all n tokens, s_t = 1 / sqrt(mean of x[t]^2 + eps); norm null: neither
// norm nor s. 256 threads. The next launch may start when all CTAs have waited.
__device__ __forceinline__ void score_cta(
        ScoreSums& sums, float* scores, int e, int n_experts, const float* gate, const float* x,
        const float* norm, int n, int d, long long ldx, float eps) {
    constexpr int AHEAD = 2;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float4* row = (const float4*)(gate + (long long)e * d);
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
        if (lane == 0) sums.part[warp] = sum, sums.squares[warp] = square;
        __syncthreads();
        if (threadIdx.x == 0) {
            sum = square = 0.f;
            for (int k = 0; k < ROUTE_WARPS; k++) sum += sums.part[k], square += sums.squares[k];
            scores[token * n_experts + e] = norm ? sum * rsqrtf(square / d + eps) : sum;
        }
        __syncthreads();
    }
}
