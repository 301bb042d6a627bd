// Arithmetic on two float16 or bfloat16 numbers in one register, on the device and in g++.
//
// Sources: own. Tested by: tests/kernels/test_tiles.py.
#pragma once
#include "types.cuh"

#ifndef __CUDA_ARCH__
#include <math.h>
#include <string.h>
#endif

#ifndef __CUDA_ARCH__
// Bits of x rounded to float16, ties to even; of a double, so that a fused multiply-add of small
// integers and float16 numbers rounds once.
inline unsigned half_bits_of(double x) {
    const unsigned sign = signbit(x) ? 0x8000 : 0;
    const double a = fabs(x);
    if (!(a < 65520)) return sign | (a != a ? 0x7E00 : 0x7C00);
    const int e = a < 0x1p-14 ? -14 : ilogb(a);
    return sign | (((unsigned)(e + 14) << 10) + (unsigned)nearbyint(ldexp(a, 10 - e)));
}
#endif

// float16 of lo and hi in one register.
FORCE_INLINE unsigned half2_of(float lo, float hi) {
    unsigned r;
#if !defined(__CUDA_ARCH__)
    r = half_bits_of(lo) | half_bits_of(hi) << 16;
#elif __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    unsigned short a, b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(a) : "f"(lo));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(hi));
    r = a | (unsigned)b << 16;
#endif
    return r;
}

// a * b + c of float16 pairs, rounded once.
FORCE_INLINE unsigned half2_fma(unsigned a, unsigned b, unsigned c) {
    unsigned r;
#ifdef __CUDA_ARCH__
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
#else
    r = 0;
    for (int k = 0; k < 32; k += 16) {
        const double x = half_bits_to_float(a >> k & 0xFFFF);
        const double y = half_bits_to_float(b >> k & 0xFFFF);
        r |= half_bits_of(x * y + half_bits_to_float(c >> k & 0xFFFF)) << k;
    }
#endif
    return r;
}

FORCE_INLINE unsigned half2_add(unsigned a, unsigned b) {
    unsigned r;
#ifdef __CUDA_ARCH__
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    r = half2_fma(a, 0x3C003C00, b);
#endif
    return r;
}

FORCE_INLINE unsigned half2_mul(unsigned a, unsigned b) {
    unsigned r;
#ifdef __CUDA_ARCH__
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
#else
    r = half2_fma(a, b, 0x80008000);  // -0 keeps the sign of a zero
#endif
    return r;
}

// Float16 bits of -n twice: n an integer of [1024, 2048), and of [64, 128).
FORCE_INLINE constexpr unsigned minus_half2(int n) { return 0x00010001u * (0xE000u + n); }
FORCE_INLINE constexpr unsigned minus_half2_small(int n) {
    return 0x00010001u * (0xD000u + 16 * n);
}

FORCE_INLINE unsigned float_bits(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
#endif
}

// a + b of bfloat16 pairs where the sum is exact.
FORCE_INLINE unsigned bf16x2_add_exact(unsigned a, unsigned b) {
    unsigned r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3F803F80u), "r"(b));
#else
    const float lo = __uint_as_float(a << 16) + __uint_as_float(b << 16);
    const float hi = __uint_as_float(a & 0xFFFF0000) + __uint_as_float(b & 0xFFFF0000);
    r = float_bits(lo) >> 16 | (float_bits(hi) & 0xFFFF0000);
#endif
    return r;
}

// a & MASK | bits and a & MASK ^ bits in one instruction: two constants would make it two.
template <unsigned MASK>
FORCE_INLINE unsigned and_or(unsigned a, unsigned bits) {
    unsigned r;
#ifdef __CUDA_ARCH__
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "n"(MASK), "r"(bits));
#else
    r = (a & MASK) | bits;
#endif
    return r;
}
template <unsigned MASK>
FORCE_INLINE unsigned and_xor(unsigned a, unsigned bits) {
    unsigned r;
#ifdef __CUDA_ARCH__
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(r) : "r"(a), "n"(MASK), "r"(bits));
#else
    r = (a & MASK) ^ bits;
#endif
    return r;
}
