// Op        absorbed attention of one token and head over a range of latent rows (split-KV):
//           score_j = scale * q . row_j, weights = softmax, o = sum_j weight_j row_j[:r]
// Shapes    part [n, h, splits, r + 2] (unnormalised o, maximum, sum), q_lat [n, h, r],
//           q_pe [n, h, p], cache [n_ctx, r + p], pos [n]
// Dtypes    cache CACHE (float, __half, __nv_bfloat16); all else float32; HALF 1 rounds query, row
//           and probability to float16 (-gap f16), sums stay float32
// Grid      (splits, h, n), 256 threads: 8 warps take rows in turn, merged at the end
// Assumes   R = r, P = p at compile time; rows up to pos[t] are written
// Numerics  online softmax per warp, warps merged in order; an empty range gives sum 0
// Bound by  bytes of the cache times h (heads don't share reads yet)
// Sources   online softmax: arXiv 1805.02867; own
// Tested by tests/gpu/test_cuda_models.py
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pdl.cuh"
#include "reduce.cuh"

#define NR ((R + 31) / 32)
#define NP ((P + 31) / 32)
#define NONE __int_as_float(0xff800000)  // -inf

__device__ __forceinline__ float get(float v) { return v; }
__device__ __forceinline__ float get(__half v) { return __half2float(v); }
__device__ __forceinline__ float get(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float rounded(float v) {
    return HALF ? __half2float(__float2half_rn(v)) : v;
}

extern "C" __global__ void __launch_bounds__(256)
mla_decode_split(float* part, const float* q_lat, const float* q_pe, const CACHE* cache,
                 const int* pos, float scale) {
    const int split = blockIdx.x, head = blockIdx.y, t = blockIdx.z;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __shared__ float tops[8], sums[8], merged[8][R];
    pdl_launch();
    pdl_wait();
    const int n_kv = pos[t] + 1, length = (n_kv + gridDim.x - 1) / gridDim.x;
    const int start = split * length, stop = min(start + length, n_kv);
    const long long at = (long long)t * gridDim.y + head;
    float ql[NR], qp[NP], o[NR], top = NONE, sum = 0.f;
#pragma unroll
    for (int i = 0; i < NR; i++) {
        ql[i] = lane + 32 * i < R ? rounded(q_lat[at * R + lane + 32 * i]) : 0.f;
        o[i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < NP; i++)
        qp[i] = lane + 32 * i < P ? rounded(q_pe[at * P + lane + 32 * i]) : 0.f;
    for (int j = start + warp; j < stop; j += 8) {
        const CACHE* row = cache + (long long)j * (R + P);
        float c[NR], score = 0.f;
#pragma unroll
        for (int i = 0; i < NR; i++) {
            c[i] = lane + 32 * i < R ? rounded(get(row[lane + 32 * i])) : 0.f;
            score += ql[i] * c[i];
        }
#pragma unroll
        for (int i = 0; i < NP; i++)
            if (lane + 32 * i < P) score += qp[i] * rounded(get(row[R + lane + 32 * i]));
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
