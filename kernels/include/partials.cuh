// Partial sums of ranks as they travel: rounded to a type, added in rank order.
// REDUCE_TYPE: 0 float32, 1 float16, 30 bfloat16 (GGUF's numbers). Sources: own.
#pragma once
#include <cuda_fp16.h>

__device__ __forceinline__ float rounded(float v) {
#if REDUCE_TYPE == 1
    return __half2float(__float2half_rn(v));
#elif REDUCE_TYPE == 30
    const unsigned u = __float_as_uint(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return v;  // NaN
    return __uint_as_float((u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u);
#else
    return v;
#endif
}
__device__ __forceinline__ float4 rounded(float4 v) {
    v.x = rounded(v.x), v.y = rounded(v.y), v.z = rounded(v.z), v.w = rounded(v.w);
    return v;
}
__device__ __forceinline__ void add_to(float4& a, float4 b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

// The residual streams of a GPU's ranks; those beyond N_MINE are null.
struct Streams {
    float* at[8];
};
