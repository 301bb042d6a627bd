// Op        absorbed attention of one token and head over a range of latent rows (split-KV):
//           score_j = scale * q . row_j, weights = softmax, o = sum_j weight_j row_j[:r]
// Shapes    part [n, h, splits, r + 2] (unnormalised o, maximum, sum), q_lat [n, h, r] rows of ld_lat,
//           q_pe [n, h, p] rows of ld_pe, cache [n_ctx, r + p], pos [n] (-1: no token); q8_0: cache
//           [n_ctx, 32 blocks], scales [n_ctx, blocks]; top_k > 0: only rows chosen [n, top_k], of which
//           -1 and those beyond pos are left out
// Dtypes    cache CACHE (float, __half, __nv_bfloat16, signed char); all else float32; HALF 1 rounds query, row
//           and probability to float16 (-gap f16), sums stay float32
// Grid      (splits, h, n), 256 threads: 8 warps take rows in turn, merged at the end
// Assumes   R = r, P = p at compile time; rows up to pos[t] are written
// Numerics  online softmax per warp, warps merged in order; an empty range gives sum 0
// Bound by  bytes of the cache times h (heads don't share reads yet)
// Variants  R=512 P=64 HALF=1 CACHE=__half; R=32 P=8 HALF=0 CACHE=float
// Sources   online softmax: arXiv 1805.02867; own
// Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_models.py
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pdl.cuh"
#include "reduce.cuh"

#define NR ((R + 31) / 32)
#define NP ((P + 31) / 32)
#define NONE __int_as_float(0xff800000)  // -inf

// Value i of row j.
__device__ __forceinline__ float get(const float* c, const __half*, long long j, int i) {
    return c[j * (R + P) + i];
}
__device__ __forceinline__ float get(const __half* c, const __half*, long long j, int i) {
    return __half2float(c[j * (R + P) + i]);
}
__device__ __forceinline__ float get(const __nv_bfloat16* c, const __half*, long long j, int i) {
    return __bfloat162float(c[j * (R + P) + i]);
}
__device__ __forceinline__ float get(const signed char* c, const __half* d, long long j, int i) {
    constexpr int blocks = (R + P + 31) / 32;
    return (float)c[j * 32 * blocks + i] * __half2float(d[j * blocks + i / 32]);
}
__device__ __forceinline__ float rounded(float v) {
    return HALF ? __half2float(__float2half_rn(v)) : v;
}

extern "C" __global__ void __launch_bounds__(256)
mla_decode_split(float* part, const float* q_lat, const float* q_pe, const CACHE* cache,
                 const __half* scales, const int* chosen, const int* pos, int ld_lat, int ld_pe,
                 int top_k, float scale) {
    const int split = blockIdx.x, head = blockIdx.y, t = blockIdx.z;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __shared__ float tops[8], sums[8], merged[8][R];
    pdl_launch();
    pdl_wait();
    const int last = pos[t], n_kv = top_k && last >= 0 ? top_k : last + 1;
    const int length = (n_kv + gridDim.x - 1) / (int)gridDim.x;
    const int start = split * length, stop = min(start + length, n_kv);
    const long long at = (long long)t * gridDim.y + head;
    float ql[NR], qp[NP], o[NR], top = NONE, sum = 0.f;
#pragma unroll
    for (int i = 0; i < NR; i++) {
        ql[i] = lane + 32 * i < R ? rounded(q_lat[at * ld_lat + lane + 32 * i]) : 0.f;
        o[i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < NP; i++)
        qp[i] = lane + 32 * i < P ? rounded(q_pe[at * ld_pe + lane + 32 * i]) : 0.f;
    for (int j = start + warp; j < stop; j += 8) {
        const int row = top_k ? chosen[(long long)t * top_k + j] : j;
        if (row < 0 || row > last) continue;
        float c[NR], score = 0.f;
#pragma unroll
        for (int i = 0; i < NR; i++) {
            c[i] = lane + 32 * i < R ? rounded(get(cache, scales, row, lane + 32 * i)) : 0.f;
            score += ql[i] * c[i];
        }
#pragma unroll
        for (int i = 0; i < NP; i++)
            if (lane + 32 * i < P) score += qp[i] * rounded(get(cache, scales, row, R + lane + 32 * i));
        score = warp_sum(score) * scale;
        const float peak = fmaxf(top, score), keep = expf(top - peak), weight = expf(score - peak);
        sum = sum * keep + weight;
        const float w = rounded(weight);
#pragma unroll
        for (int i = 0; i < NR; i++) o[i] = o[i] * keep + w * c[i];
        top = peak;
    }
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
#pragma unroll
    for (int i = 0; i < NR; i++)
        if (lane + 32 * i < R) merged[warp][lane + 32 * i] = o[i];
    __syncthreads();
    float peak = NONE, total = 0.f;
    for (int w = 0; w < 8; w++) peak = fmaxf(peak, tops[w]);
    float* out = part + (at * gridDim.x + split) * (R + 2);
    for (int i = threadIdx.x; i < R; i += blockDim.x) {
        float v = 0.f;
        for (int w = 0; w < 8; w++)
            if (tops[w] > NONE) v += merged[w][i] * expf(tops[w] - peak);
        out[i] = v;
    }
    for (int w = 0; w < 8; w++)
        if (tops[w] > NONE) total += sums[w] * expf(tops[w] - peak);
    if (threadIdx.x == 0) out[R] = peak, out[R + 1] = total;
}
