// Writing one latent row into the cache, in the cache's type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Cell of a row of the cache, from the row's float32 values in shared memory: KIND 0 float16, 1
// bfloat16, 2 float32, 3 q8_0: int8 [n_ctx, 32 blocks] and float16 scales [n_ctx, blocks] apart, as
// gguf-py quantises: scale = largest |x| / 127, halves rounded away from zero.
// All threads of a CTA; `row` has zeros up to a multiple of 32.
template <int KIND>
__device__ __forceinline__ void store_row(void* cache, __half* scales, long long pos, const float* row,
                                          int width) {
    const int lane = threadIdx.x & 31;
    if (KIND < 3) {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const long long at = pos * width + i;
            if (KIND == 0) ((__half*)cache)[at] = __float2half_rn(row[i]);
            if (KIND == 1) ((__nv_bfloat16*)cache)[at] = __float2bfloat16_rn(row[i]);
            if (KIND == 2) ((float*)cache)[at] = row[i];
        }
        return;
    }
    const int blocks = (width + 31) / 32;
    for (int b = threadIdx.x >> 5; b < blocks; b += blockDim.x >> 5) {
        const float x = row[32 * b + lane];
        float most = fabsf(x);
#pragma unroll
        for (int offset = 16; offset; offset >>= 1)
            most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
        const float d = most / 127.f, inverse = d == 0.f ? 0.f : 1.f / d;
        ((signed char*)cache)[(pos * blocks + b) * 32 + lane] = (signed char)(int)roundf(x * inverse);
        if (lane == 0) scales[pos * blocks + b] = __float2half_rn(d);
    }
}
