// The instructions that matvec.cuh is made of: products of bfloat16, x split in two, loads of weights
// and of pairs of x that stay where they are written.
// Sources   own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "types.cuh"

constexpr float FEW_X = 0x1p64f, FEW_ONE = 0x1p-64f;

// ---------------------------------------------------------------- tensor cores --------------
#if defined(SIMT)
__device__ __forceinline__ void few_mma(
        float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    simt::mma_16816(d, a, b, simt::bf16);
}
__device__ __forceinline__ unsigned few_bf16x2(float lo, float hi) {
    const auto bits = [](float x) {
        unsigned u = __float_as_uint(x);
        return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    };
    return bits(lo) | bits(hi) << 16;
}
#elif __CUDA_ARCH__ >= 800
// d += a b, bfloat16, float32 sums.
__device__ __forceinline__ void few_mma(
        float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Two floats rounded to bfloat16.
__device__ __forceinline__ unsigned few_bf16x2(float lo, float hi) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
#else
// Compute capability 7.5 has no bfloat16: the same sums by shuffles and float32 FMA. Patterns below
// 256 are integers times 2^-133; the factor moves to b, where it is not subnormal.
__device__ __forceinline__ float few_value(unsigned bits) {
    const unsigned pattern = bits & 0xFFFF;
    return pattern < 256 ? (float)pattern * 0x1p-100f : __uint_as_float(pattern << 16) * 0x1p33f;
}
__device__ __forceinline__ void few_mma(
        float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll 1
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const unsigned w = __shfl_sync(~0u, a[2 * half + row], 4 * g + u);
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const unsigned x = __shfl_sync(~0u, b[half], 4 * (2 * t + c) + u);
                    const float lo = __uint_as_float(x << 16) * 0x1p-33f;
                    const float hi = __uint_as_float(x & 0xFFFF0000) * 0x1p-33f;
                    d[2 * row + c] += few_value(w) * lo + few_value(w >> 16) * hi;
                }
            }
}
__device__ __forceinline__ unsigned few_bf16x2(float lo, float hi) {
    const unsigned a = __float_as_uint(lo), b = __float_as_uint(hi);
    return (a + 0x7FFF + (a >> 16 & 1)) >> 16 | ((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000);
}
#endif

// Two bfloat16 times 2^64, exactly.
__device__ __forceinline__ unsigned few_times_x(unsigned a) {
#if !defined(SIMT) && __CUDA_ARCH__ >= 800
    unsigned r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x5F805F80), "r"(0x80008000));
    return r;
#else
    return few_bf16x2(__uint_as_float(a << 16) * FEW_X, __uint_as_float(a & 0xFFFF0000) * FEW_X);
#endif
}

// ---------------------------------------------------------------- loads ---------------------
// N words of a weight from p, or zeros. Volatile and not .nc: else ptxas moves pdl_wait() ahead of them.
template <int N>
__device__ __forceinline__ void few_load(const unsigned char* p, bool valid, unsigned* w) {
#ifdef SIMT
    for (int i = 0; i < N; i++) w[i] = valid ? ((const piece32*)p)[i] : 0;
#else
    if constexpr (N == 4)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; "
                     "mov.u32 %2, 0; mov.u32 %3, 0; "
                     "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p), "r"((int)valid));
    else if constexpr (N == 2)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; "
                     "@p ld.global.v2.u32 {%0, %1}, [%2]; }"
                     : "=r"(w[0]), "=r"(w[1]) : "l"(p), "r"((int)valid));
    else
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.u32 %0, 0; "
                     "@p ld.global.u32 %0, [%1]; }"
                     : "=r"(w[0]) : "l"(p), "r"((int)valid));
#endif
}

// Two floats of an activation from p, or zeros. GLOBAL: not from shared memory.
template <bool GLOBAL = false>
__device__ __forceinline__ void few_pair(const float* p, bool valid, float& a, float& b) {
#ifdef SIMT
    a = valid ? p[0] : 0.f, b = valid ? p[1] : 0.f;
#else
    if constexpr (GLOBAL)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.f32 %0, 0f00000000; "
                     "mov.f32 %1, 0f00000000; @p ld.global.v2.f32 {%0, %1}, [%2]; }"
                     : "=f"(a), "=f"(b) : "l"(p), "r"((int)valid) : "memory");
    else
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.f32 %0, 0f00000000; "
                     "mov.f32 %1, 0f00000000; @p ld.v2.f32 {%0, %1}, [%2]; }"
                     : "=f"(a), "=f"(b) : "l"(p), "r"((int)valid) : "memory");
#endif
}
