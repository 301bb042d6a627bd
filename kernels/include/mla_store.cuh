// Writing one latent row into the cache, in the cache's type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "reduce.cuh"

// A warp writes block `b`, 32 values, of row `pos` of the cache; y: this lane's value, 0 beyond the
// row's width. KIND 0 float16, 1 bfloat16, 2 float32, 3 q8_0: int8 [n_ctx, 32 blocks] and float16
// scales [n_ctx, blocks] apart, as gguf-py quantises: scale = largest |y| / 127, halves rounded away
// from zero.
template <int KIND>
__device__ __forceinline__ void store_block(void* cache, __half* scales, long long pos, int b, float y,
                                            int width) {
    const int lane = threadIdx.x & 31, i = 32 * b + lane;
    const long long at = pos * width + i;
    if (KIND == 3) {
        const int blocks = (width + 31) / 32;
        const float most = warp_max(fabsf(y)), d = most / 127.f, inverse = d == 0.f ? 0.f : 1.f / d;
        ((signed char*)cache)[pos * 32 * blocks + i] = (signed char)(int)roundf(y * inverse);
        if (lane == 0) scales[pos * blocks + b] = __float2half_rn(d);
        return;
    }
    if (i >= width) return;
    if (KIND == 0) ((__half*)cache)[at] = __float2half_rn(y);
    if (KIND == 1) ((__nv_bfloat16*)cache)[at] = __float2bfloat16_rn(y);
    if (KIND == 2) ((float*)cache)[at] = y;
}
