// Partial sums of ranks as they travel: rounded to a type, added in rank order.
// REDUCE_TYPE: 0 float32, 1 float16, 8 q8_0, 30 bfloat16 (GGUF's numbers). q8_0 needs messages of
// whole blocks of 32, which then lie in eight neighbouring lanes. Sources: own.
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
#if REDUCE_TYPE == 8
    float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int offset = 4; offset; offset >>= 1)
        most = fmaxf(most, __shfl_xor_sync(0xffu << (threadIdx.x & 24), most, offset));
    const float d = most / 127.f, inverse = d == 0.f ? 0.f : 1.f / d;
    const float scale = __half2float(__float2half_rn(d));
    return make_float4(scale * roundf(v.x * inverse), scale * roundf(v.y * inverse),
                       scale * roundf(v.z * inverse), scale * roundf(v.w * inverse));
#endif
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
