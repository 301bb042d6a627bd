// Op        store: cache row pos[t] = c_kv[t], then k_pe[t]
// Shapes    cache [n_ctx, r + p], c_kv [n, r] and k_pe [n, p] dense, pos [n]
// Dtypes    float32 in; CACHE = float, __half or __nv_bfloat16 stored, round to nearest even
// Grid      (n), 256 threads
// Numerics  one rounding
// Bound by  launch latency
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pdl.cuh"

__device__ __forceinline__ void put(float* at, float v) { *at = v; }
__device__ __forceinline__ void put(__half* at, float v) { *at = __float2half_rn(v); }
__device__ __forceinline__ void put(__nv_bfloat16* at, float v) { *at = __float2bfloat16_rn(v); }

extern "C" __global__ void store(CACHE* cache, const float* c_kv, const float* k_pe,
                                 const int* pos, int r, int p) {
    pdl_launch();
    pdl_wait();
    const int t = blockIdx.x;
    CACHE* row = cache + (long long)pos[t] * (r + p);
    for (int i = threadIdx.x; i < r + p; i += blockDim.x)
        put(row + i, i < r ? c_kv[(long long)t * r + i] : k_pe[(long long)t * p + i - r]);
}
