// A lane's part of a weight tile as fragments of mma.m16n8k16, in one of two unpackings. The loads
// and what lies where: tile_layout.cuh.
//
// Exact: value = s * R + m with R the plain integers (or table values) in bfloat16, s and m in
// float32; bit-equal to gguf-py if computed in float32. F16 values are R + R' (exact_low()).
// Scaled: float16 of boost * value, as fma(R, s', m') with s' and m' = boost * s and boost * m
// rounded to float16. boost is the power of two that brings the bound in the weight's header into
// [2^13, 2^14); F16 stays as it is.
// Usual order: tile_view(), load_tile() of the next tile, then per group u of this one
// exact_scales() or half_scales(), per step j of the group a fragment.
// Sources: numbers in the mantissa of 1024 as in Marlin and FasterTransformer; code own.
// Tested by: tests/kernels/test_tiles.py.
#pragma once
#include "pairs.cuh"
#include "quants.cuh"
#include "tile_layout.cuh"

// ---------------------------------------------------------------- stored numbers ------------
// Bits of the h plane for register i of step j, moved to bit `to` of each half.
template <int QTYPE>
FORCE_INLINE unsigned high_bits(const TileData<QTYPE>& w, int j, int i, int to) {
    constexpr int n = Tile<QTYPE>::over_words;
    if constexpr (n == 0) {
        return 0;
    } else {
        const int from = n == 1 ? 4 * j + i : 8 * (j & 1) + 2 * i;
        const unsigned word = w.h[n == 1 ? 0 : j >> 1];
        const unsigned mask = (n == 1 ? 0x00010001u : 0x00030003u) << to;
        return (from > to ? word >> (from - to) : word << (to - from)) & mask;
    }
}

// The eight numbers of step j, or their low four bits, in nibbles.
template <int QTYPE>
FORCE_INLINE unsigned nibbles(const TileData<QTYPE>& w, int j) {
    using T = Tile<QTYPE>;
    if constexpr (!T::thin) {
        return w.q[j];
    } else {
        if constexpr (T::doubled)
            return ((j & 1 ? w.q[j >> 1] : w.q[j >> 1] << 2) & 0xCCCCCCCC) | (w.h[0] >> j & 0x11111111);
        unsigned x = w.q[j >> 1] >> 2 * (j & 1) & 0x33333333;
        if constexpr (T::h_words) x |= (j < 3 ? w.h[0] << (2 - j) : w.h[0] >> 1) & 0x44444444;
        return x;
    }
}

// Values + 128 of numbers 0 .. 15; where they are + 12, MXFP4's.
template <int QTYPE> struct NumberMap {
    static constexpr unsigned m0 = MAP_IQ4_0, m1 = MAP_IQ4_1, m2 = MAP_IQ4_2, m3 = MAP_IQ4_3;
};
template <> struct NumberMap<QT_MXFP4> {
    static constexpr unsigned m0 = MAP_MXFP4_0, m1 = MAP_MXFP4_1, m2 = MAP_MXFP4_2, m3 = MAP_MXFP4_3;
};
constexpr unsigned EVEN_128 = 0x80808080;
template <> struct NumberMap<QT_IQ3_XXS> {  // bit 3: minus
    static constexpr unsigned m0 = EVEN_128 + MAP_IQ3_XXS_0, m1 = EVEN_128 + MAP_IQ3_XXS_1;
    static constexpr unsigned m2 = EVEN_128 - MAP_IQ3_XXS_0, m3 = EVEN_128 - MAP_IQ3_XXS_1;
};
template <> struct NumberMap<QT_IQ3_S> {
    static constexpr unsigned m0 = EVEN_128 + MAP_IQ3_S_0, m1 = EVEN_128 + MAP_IQ3_S_1;
    static constexpr unsigned m2 = EVEN_128 - MAP_IQ3_S_0, m3 = EVEN_128 - MAP_IQ3_S_1;
};
struct MapIq2 {  // bit 2: minus
    static constexpr unsigned m0 = EVEN_128 + MAP_IQ2_0, m1 = EVEN_128 - MAP_IQ2_0, m2 = 0, m3 = 0;
};
template <> struct NumberMap<QT_IQ2_XXS> : MapIq2 {};
template <> struct NumberMap<QT_IQ2_XS> : MapIq2 {};
template <> struct NumberMap<QT_IQ2_S> : MapIq2 {};

// Bytes of lo and hi by the four nibbles in the low half of x, whose top bits are 0. __byte_perm clears
// these itself.
FORCE_INLINE unsigned map8(unsigned x, unsigned lo, unsigned hi) {
#ifdef __CUDA_ARCH__
    unsigned r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(lo), "r"(hi), "r"(x));
    return r;
#else
    return __byte_perm(lo, hi, x);
#endif
}

// Bytes of the type's map, each ^ top, for the step's eight nibbles: of the low four, of the high four.
template <int QTYPE>
FORCE_INLINE void mapped(unsigned q, unsigned top, unsigned& lo, unsigned& hi) {
    using M = NumberMap<QTYPE>;
    if constexpr (Tile<QTYPE>::kind == TILE_MAP8) {
        lo = map8(q, M::m0 ^ top, M::m1 ^ top);
        hi = map8(q >> 16, M::m0 ^ top, M::m1 ^ top);
    } else {
        lo = map16(q, M::m0 ^ top, M::m1 ^ top, M::m2 ^ top, M::m3 ^ top);
        hi = map16(q >> 16, M::m0 ^ top, M::m1 ^ top, M::m2 ^ top, M::m3 ^ top);
    }
}

// A word whose bytes 0 and 2 are the stored numbers of register i of step j; the rest is anything.
// Types with numbers in bytes: Q8_0 and the maps.
template <int QTYPE>
FORCE_INLINE unsigned stored_bytes(const TileData<QTYPE>& w, int j, int i) {
    if constexpr (Tile<QTYPE>::q_bytes == 1024) {
        const unsigned word = w.q[2 * j + (i >> 1)];
        return i & 1 ? word >> 8 : word;
    } else {
        unsigned lo, hi;  // signed ones in two's complement: value + 128 with the top bit turned
        mapped<QTYPE>(nibbles(w, j), QTYPE == QT_MXFP4 ? 0 : 0x80808080, lo, hi);
        if constexpr (Tile<QTYPE>::kind == TILE_MAP8) return (i & 1 ? hi : lo) >> 8 * (i >> 1);
        return __byte_perm(lo, hi, 0x0400 | i | i << 8);
    }
}

// ---------------------------------------------------------------- exact ---------------------
// r = the integers of step j (a constant once unrolled) + Tile::offset, as bfloat16. Where offset
// is not 0, the caller subtracts offset * (sum of x) itself, or takes exact_fragment().
template <int QTYPE>
FORCE_INLINE void biased_fragment(const TileData<QTYPE>& w, int j, unsigned (&r)[4]) {
    using T = Tile<QTYPE>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (T::kind == TILE_SMALL) {
            const unsigned x = nibbles(w, j) >> 4 * i & 0x000F000F;
            r[i] = 0x43004300 | x << T::doubled | high_bits<QTYPE>(w, j, i, 4);
        } else if constexpr (T::kind == TILE_MAP_SMALL) {
            r[i] = 0x43004300 | (stored_bytes<QTYPE>(w, j, i) & 0x00FF00FF);
        } else if constexpr (T::kind == TILE_BF16) {
            r[i] = w.q[4 * j + i];
        } else if constexpr (T::kind == TILE_HALF) {  // rounded to zero; exact_low() has the rest
            const unsigned x = w.q[4 * j + i];
            r[i] = float_bits(half_bits_to_float(x & 0xFFFF)) >> 16 |
                   (float_bits(half_bits_to_float(x >> 16)) & 0xFFFF0000);
        } else {  // 128 + low bits, less 128 or 256: the top bit of a byte is next to the exponent
            const unsigned b = stored_bytes<QTYPE>(w, j, i);
            r[i] = bf16x2_add_exact(0x43004300 | (b & 0x007F007F), 0xC300C300 | (b & 0x00800080));
        }
    }
}

// As biased_fragment, without the offset.
template <int QTYPE>
FORCE_INLINE void exact_fragment(const TileData<QTYPE>& w, int j, unsigned (&r)[4]) {
    biased_fragment<QTYPE>(w, j, r);
    constexpr int offset = Tile<QTYPE>::offset;  // 128 to 160: one step of a bfloat16 is 1 there
    if constexpr (offset != 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            r[i] = bf16x2_add_exact(r[i], 0xC300C300 + 0x00010001u * (offset - 128));
    }
}

// Where Tile::has_low (F16): what exact_fragment() left of the values, as bfloat16.
template <int QTYPE>
FORCE_INLINE void exact_low(const TileData<QTYPE>& w, int j, unsigned (&r)[4]) {
    if constexpr (!Tile<QTYPE>::has_low) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float lo = half_bits_to_float(w.q[4 * j + i] & 0xFFFF);
        const float hi = half_bits_to_float(w.q[4 * j + i] >> 16);
        const float lo_rest = lo - __uint_as_float(float_bits(lo) & 0xFFFF0000);
        const float hi_rest = hi - __uint_as_float(float_bits(hi) & 0xFFFF0000);
        r[i] = float_bits(lo_rest) >> 16 | (float_bits(hi_rest) & 0xFFFF0000);
    }
}

// Scales and minima of group u of the tile (Tile::group columns, Tile::steps steps): of row g, of
// row g + 8.
// value = s * R + m. Types without scale or minimum give 1 and 0.
template <int QTYPE>
FORCE_INLINE void exact_scales(
        const TileData<QTYPE>& w, int u, float (&s)[2], float (&m)[2]) {
    using T = Tile<QTYPE>;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // row g + 8 i
        m[i] = 0;
        if constexpr (!T::has_scale) {
            s[i] = 1;
        } else if constexpr (QTYPE == QT_IQ1_S) {
            s[i] = half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF) * (float)(w.s[i] >> 8 * u & 15);
            m[i] = s[i] * -0.125f * (float)(w.s[i] >> (8 * u + 4) & 15);
        } else if constexpr (QTYPE == QT_Q2_K) {
            s[i] = half_bits_to_float(w.d[i] & 0xFFFF) * (float)(w.s[i] >> 8 * u & 15);
            m[i] = half_bits_to_float(w.d[i] >> 16) * -(float)(w.s[i] >> (8 * u + 4) & 15);
        } else if constexpr (T::d_words == 2) {  // Q4_K, Q5_K
            s[i] = half_bits_to_float(w.d[i] & 0xFFFF) * (float)(w.s[i] >> 8 * u & 255);
            m[i] = half_bits_to_float(w.d[i] >> 16) * -(float)(w.s[i] >> (8 * u + 16) & 255);
        } else if constexpr (T::d_words == 1) {
            const float d = half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF) * SCALE_UNIT<QTYPE>;
            s[i] = d * (float)(signed char)(w.s[i] >> 8 * u);
        } else if constexpr (QTYPE == QT_MXFP4) {
            s[i] = bf16_bits_to_float(w.s[i] >> 16 * u & 0xFFFF);
        } else {
            s[i] = half_bits_to_float(w.s[i] >> 16 * u & 0xFFFF);
            if constexpr (T::has_min) m[i] = half_bits_to_float(w.m[i] >> 16 * u & 0xFFFF);
        }
    }
}

// ---------------------------------------------------------------- scaled --------------------
// Boosted float16 scales and minima of a group, twice each: [row g, row g + 8].
struct HalfScales {
    unsigned s[2], m[2];
};

// Bytes `pick` (two, as in a selector of __byte_perm) of w, less `zero` (128: two's complement with
// the top bit turned), as float16.
FORCE_INLINE unsigned half_bytes(unsigned w, unsigned pick, int zero) {
    const unsigned pair = __byte_perm(w, 0x64646464, 0x4040 | (pick & 15) | (pick >> 4) << 8);
    return half2_add(pair, minus_half2(1024 + zero));
}
FORCE_INLINE unsigned twice(unsigned pair, int which) {
#ifdef __CUDA_ARCH__
    unsigned r;  // as halves: the compiler folds it into the operand of the next instruction
    if (which)
        asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 %0, {hi, hi};}" : "=r"(r) : "r"(pair));
    else
        asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 %0, {lo, lo};}" : "=r"(r) : "r"(pair));
    return r;
#else
    return __byte_perm(pair, 0, which ? 0x3232 : 0x1010);
#endif
}

// For types with scales of scales: boost * d is rounded to float16, which changes nothing unless
// it is below 2^-14, then its product with the integer. Groups of a tile share most of the work.
template <int QTYPE>
FORCE_INLINE HalfScales half_scales(const TileData<QTYPE>& w, int u, float boost) {
    using T = Tile<QTYPE>;
    HalfScales out;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if constexpr (QTYPE == QT_IQ1_S) {
            const float d = half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF) * boost;
            const unsigned code = w.s[i] >> 8 * u & 15, least = w.s[i] >> (8 * u + 4) & 15;
            const unsigned codes = code | code * least << 16 | 0x64006400;
            const unsigned pair =
                half2_mul(half2_add(codes, minus_half2(1024)), half2_of(d, d * -0.125f));
            out.s[i] = twice(pair, 0), out.m[i] = twice(pair, 1);
        } else if constexpr (QTYPE == QT_Q2_K) {
            const unsigned d = half2_of(half_bits_to_float(w.d[i] & 0xFFFF) * boost,
                                        half_bits_to_float(w.d[i] >> 16) * -boost);
            const unsigned both = w.s[i] >> 8 * u;
            const unsigned codes = (both & 15) | (both & 240) << 12 | 0x64006400;
            const unsigned pair = half2_mul(half2_add(codes, minus_half2(1024)), d);
            out.s[i] = twice(pair, 0), out.m[i] = twice(pair, 1);
        } else if constexpr (T::d_words == 2) {  // Q4_K, Q5_K
            const unsigned d = half2_of(half_bits_to_float(w.d[i] & 0xFFFF) * boost,
                                        half_bits_to_float(w.d[i] >> 16) * -boost);
            out.s[i] = twice(half2_mul(half_bytes(w.s[i], 0x10, 0), twice(d, 0)), u);
            out.m[i] = twice(half2_mul(half_bytes(w.s[i], 0x32, 0), twice(d, 1)), u);
        } else if constexpr (T::d_words == 1) {
            const float d =
                half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF) * (boost * SCALE_UNIT<QTYPE>);
            const unsigned pair = half_bytes(w.s[i] ^ 0x80808080, u < 2 ? 0x10 : 0x32, 128);
            out.s[i] = twice(half2_mul(pair, half2_of(d, d)), u & 1);
        } else if constexpr (T::kind == TILE_BF16) {
            out.s[i] = float_bits(boost);
        } else {
            float s[2], m[2];
            exact_scales<QTYPE>(w, u, s, m);
            out.s[i] = half2_of(s[i] * boost, s[i] * boost);
            out.m[i] = half2_of(m[i] * boost, m[i] * boost);
        }
    }
    return out;
}

// The integers of register i of step j as float16.
template <int QTYPE>
FORCE_INLINE unsigned half_integers(const TileData<QTYPE>& w, int j, int i) {
    using T = Tile<QTYPE>;
    if constexpr (T::kind == TILE_SMALL) {
        const unsigned q = nibbles(w, j) >> (i & 2 ? 8 : 0);
        if constexpr (T::doubled) {  // 128 + 2 n out of 1024 + 16 n, or 1024 + 2 n
            if (i & 1)
                return half2_fma(and_or<0x00F000F0>(q, 0x64006400), 0x30003000, 0xD848D848);  // - 137
            return half2_add(and_or<0x001E001E>(q << 1, 0x64006400), minus_half2(1024 + T::zero));
        }
        if (i & 1) {  // 1024 + 16 n, times 1/16: spares the shift
            const unsigned x = and_or<0x00F000F0>(q, 0x64006400) | high_bits<QTYPE>(w, j, i, 8);
            return half2_fma(x, 0x2C002C00, minus_half2_small(64 + T::zero));
        }
        const unsigned x = and_or<0x000F000F>(q, 0x64006400) | high_bits<QTYPE>(w, j, i, 4);
        return half2_add(x, minus_half2(1024 + T::zero));
    } else if constexpr (T::kind == TILE_MAP_SMALL) {
        const unsigned x = and_or<0x00FF00FF>(stored_bytes<QTYPE>(w, j, i), 0x64006400);
        return half2_add(x, minus_half2(1024 + T::zero));
    } else {  // 1024 + 128 + n: the top bit of two's complement turned
        const unsigned x = and_xor<0x00FF00FF>(stored_bytes<QTYPE>(w, j, i), 0x64806480);
        return half2_add(x, minus_half2(1024 + 128));
    }
}

// r = float16 of boost * value, step j. scales: half_scales() of group j / Tile::steps.
template <int QTYPE>
FORCE_INLINE void scaled_fragment(
        const TileData<QTYPE>& w, int j, const HalfScales& scales, unsigned (&r)[4]) {
    using T = Tile<QTYPE>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (T::kind == TILE_HALF) {
            r[i] = w.q[4 * j + i];
        } else if constexpr (T::kind == TILE_BF16) {
            const unsigned pair = w.q[4 * j + i];
            const float boost = __uint_as_float(scales.s[0]);
            r[i] = half2_of(__uint_as_float(pair << 16) * boost,
                            __uint_as_float(pair & 0xFFFF0000) * boost);
        } else {
            const unsigned x = half_integers<QTYPE>(w, j, i);
            if constexpr (T::has_min)
                r[i] = half2_fma(x, scales.s[i & 1], scales.m[i & 1]);
            else
                r[i] = half2_mul(x, scales.s[i & 1]);
        }
    }
}
