// GGUF type ids, bit conversions and aligned loads, for NVRTC and (with a shim) for g++.
//
// No header is included on the device: NVRTC needs no include path for these files.
// Sources: own. Tested by: tests/kernels/test_quants.py.
#pragma once

// ---------------------------------------------------------------- shim for g++ --------------
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PIECE  // nvcc doesn't exploit strict aliasing
#define FORCE_INLINE __device__ __forceinline__
#else
#include <math.h>
#include <string.h>

#define PIECE __attribute__((may_alias))
#define FORCE_INLINE inline
#define __device__

struct PIECE __attribute__((aligned(8))) uint2 { unsigned x, y; };
struct PIECE __attribute__((aligned(16))) uint4 { unsigned x, y, z, w; };

FORCE_INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = a | (unsigned long long)b << 32;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i)
        r |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
FORCE_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
FORCE_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
FORCE_INLINE float __fmul_rn(float a, float b) { return a * b; }
FORCE_INLINE float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
#endif

// ---------------------------------------------------------------- types ---------------------
enum QuantType : int {  // GGUF's numbers
    QT_F32 = 0, QT_F16 = 1, QT_Q4_0 = 2, QT_Q4_1 = 3, QT_Q5_0 = 6, QT_Q5_1 = 7, QT_Q8_0 = 8,
    QT_Q2_K = 10, QT_Q3_K = 11, QT_Q4_K = 12, QT_Q5_K = 13, QT_Q6_K = 14, QT_IQ2_XXS = 16,
    QT_IQ2_XS = 17, QT_IQ3_XXS = 18, QT_IQ1_S = 19, QT_IQ4_NL = 20, QT_IQ3_S = 21,
    QT_IQ2_S = 22, QT_IQ4_XS = 23, QT_IQ1_M = 29, QT_BF16 = 30, QT_MXFP4 = 39
};

typedef unsigned short PIECE piece16;
typedef unsigned PIECE piece32;

// ---------------------------------------------------------------- conversions ---------------
// The float32 of a float16's bits; subnormals are kept (they are normal in float32).
FORCE_INLINE float half_bits_to_float(unsigned bits) {
#ifdef __CUDACC__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)bits));
    return f;
#else
    const unsigned sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | rest << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | rest << 13);
    return (sign ? -1.0f : 1.0f) * (float)rest * 0x1p-24f;
#endif
}

// The float32 of a bfloat16's bits.
FORCE_INLINE float bf16_bits_to_float(unsigned bits) { return __uint_as_float(bits << 16); }

// ---------------------------------------------------------------- loads ---------------------
FORCE_INLINE unsigned load8(const unsigned char* p) { return *p; }
FORCE_INLINE unsigned load16(const unsigned char* p) { return *(const piece16*)p; }

// w = N little-endian words from p, in the widest pieces that an alignment of ALIGN bytes allows.
// With PADDED_ROWS whole words around them may be read.
template <int ALIGN, int N>
FORCE_INLINE void load_words(const unsigned char* p, unsigned (&w)[N]) {
    if constexpr (ALIGN % 16 == 0 && N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 x = *(const uint4*)(p + 4 * i);
            w[i] = x.x, w[i + 1] = x.y, w[i + 2] = x.z, w[i + 3] = x.w;
        }
    } else if constexpr (ALIGN % 8 == 0 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const uint2 x = *(const uint2*)(p + 4 * i);
            w[i] = x.x, w[i + 1] = x.y;
        }
#ifdef PADDED_ROWS
    } else if constexpr (ALIGN % 2 == 0 && ALIGN % 4 != 0) {
        const bool odd = (unsigned long long)p & 2;
        const piece32* from = (const piece32*)(p - (odd ? 2 : 0));
        unsigned word = from[0];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const unsigned after = from[i + 1];
            w[i] = __byte_perm(word, after, odd ? 0x5432 : 0x3210);
            word = after;
        }
#endif
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const unsigned char* at = p + 4 * i;
            if constexpr (ALIGN % 4 == 0)
                w[i] = *(const piece32*)at;
            else if constexpr (ALIGN % 2 == 0)
                w[i] = load16(at) | load16(at + 2) << 16;
            else
                w[i] = load8(at) | load8(at + 1) << 8 | load8(at + 2) << 16 | load8(at + 3) << 24;
        }
    }
}

// One word from p.
template <int ALIGN>
FORCE_INLINE unsigned load32(const unsigned char* p) {
    unsigned w[1];
    load_words<ALIGN>(p, w);
    return w[0];
}
