// Unpacks GGUF weights: groups of 32 consecutive values of a row, float32 bit-equal to gguf-py.
//
// Every quantised type goes through one form: value i of a group is
//     d[i / 16] * (byte i of q - bias) - m[i / 16]
// load_bytes() gives q, d and m, load_group() the values. In all types the product is exact in
// float32 (at most 23 significant bits: 11 of the float16 scale, 12 of sub-scale times value), so
// only the subtraction of m rounds, and neither the order of factors nor FMA changes a bit.
// With -ftz=true (CuPy's default) an MXFP4 scale or product below 2^-126 becomes 0; nothing else
// differs.
// Reads stay inside the row. A row starts at a multiple of QuantTraits::align.
// Sources: layouts as gguf-py (llama.cpp's Python package, MIT) unpacks them; code own.
// Tested by: tests/kernels/test_quants.py.
#pragma once
#include "quant_tables.cuh"
#include "quant_traits.cuh"
#include "types.cuh"

// ---------------------------------------------------------------- helpers -------------------
// Four bits as the lowest bits of four bytes.
FORCE_INLINE unsigned spread4(unsigned bits) { return (bits & 15) * 0x00204081 & 0x01010101; }

// Byte j of a word, less bias, as float32: the byte goes into the mantissa of 2^23, which costs
// less than a conversion.
FORCE_INLINE float byte_to_float(unsigned word, int j, int bias) {
    return __uint_as_float(__byte_perm(word, 0x4B000000, 0x7540 | j)) - (float)(8388608 + bias);
}

// The float16 at p, which is at an even address.
FORCE_INLINE float load_half(const unsigned char* p) { return half_bits_to_float(load16(p)); }

// 16 bytes of nibbles: the low ones are values 0..15, the high ones 16..31.
template <int ALIGN>
FORCE_INLINE void load_nibbles(const unsigned char* p, unsigned (&q)[8]) {
    unsigned w[4];
    load_words<ALIGN>(p, w);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        q[k] = w[k] & 0x0F0F0F0F;
        q[k + 4] = w[k] >> 4 & 0x0F0F0F0F;
    }
}

// The same few bits of each of 32 bytes: byte i = p[i] >> shift & mask's byte.
template <int ALIGN>
FORCE_INLINE void load_planes(const unsigned char* p, int shift, unsigned mask, unsigned (&q)[8]) {
    load_words<ALIGN>(p, q);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] = q[k] >> shift & mask;
}

// Bytes of a 16-entry map for the four nibbles in the low half of x.
FORCE_INLINE unsigned map16(unsigned x, unsigned m0, unsigned m1, unsigned m2, unsigned m3) {
    const unsigned low = __byte_perm(m0, m1, x & 0x7777), high = __byte_perm(m2, m3, x & 0x7777);
    return __byte_perm(low, high, 0x3210 | (x & 0x8888) >> 1);  // bit 3 of a nibble picks `high`
}

// As load_nibbles, each nibble replaced by its byte in a 16-entry map.
template <int ALIGN>
FORCE_INLINE void load_mapped(
        const unsigned char* p, unsigned m0, unsigned m1, unsigned m2, unsigned m3,
        unsigned (&q)[8]) {
    unsigned w[4];
    load_words<ALIGN>(p, w);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned a = map16(w[k], m0, m1, m2, m3), b = map16(w[k] >> 16, m0, m1, m2, m3);
        q[k] = __byte_perm(a, b, 0x6420);
        q[k + 4] = __byte_perm(a, b, 0x7531);
    }
}

// 128 + or - each byte of b (1 to 127), minus where the byte's bit of `signs` is set.
FORCE_INLINE unsigned signed_bytes(unsigned b, unsigned signs) {
    const unsigned t = spread4(signs);
    return (b + 0x80808080 - t) ^ t * 255;  // 128 - b = ~(127 + b)
}

// Entry i of a codebook; a kernel that keeps a copy in shared memory says so before (raw_rows.cuh).
#ifndef CODEBOOK
#define CODEBOOK(table, i) table[i]
#endif

// Eight sizes of IQ2 out of a codebook entry.
FORCE_INLINE void iq2_sizes(unsigned entry, unsigned& q0, unsigned& q1) {
    q0 = __byte_perm(MAP_IQ2_0, 0, entry);
    q1 = __byte_perm(MAP_IQ2_0, 0, entry >> 16);
}

// Eight sign bits from seven: the eighth makes their number even.
FORCE_INLINE unsigned even_signs(unsigned seven) {
    return (seven & 127) | (__popc(seven & 127) & 1) << 7;
}

// Eight codebook values of IQ1, -1, 0 or 1, + or - 1/8: in eighths, + 16.
FORCE_INLINE void iq1_bytes(int index, bool minus, unsigned& q0, unsigned& q1) {
    const unsigned entry = CODEBOOK(grid_iq1, index), map = minus ? 0x00170F07 : 0x00191109;
    q0 = __byte_perm(map, 0, entry);
    q1 = __byte_perm(map, 0, entry >> 16);
}

// Scale and minimum of group g of Q4_K and Q5_K from the block's first four words: d and dmin,
// then 12 bytes of six-bit numbers. Groups 0..3: low six bits of bytes g and 4 + g; groups 4..7:
// the nibbles of byte 4 + g, under the top two bits of bytes g - 4 and g.
FORCE_INLINE void k_scales(const unsigned (&w)[4], int g, float (&d)[2], float (&m)[2]) {
    const int shift = 8 * (g & 3);
    const unsigned a = w[1] >> shift, b = w[2] >> shift, c = w[3] >> shift;
    const unsigned scale = g < 4 ? a & 63 : (c & 15) | (a >> 2 & 48);
    const unsigned minimum = g < 4 ? b & 63 : (c >> 4 & 15) | (b >> 2 & 48);
    d[0] = d[1] = half_bits_to_float(w[0] & 0xFFFF) * (float)scale;
    m[0] = m[1] = half_bits_to_float(w[0] >> 16) * (float)minimum;
}

// ---------------------------------------------------------------- one function per type -----
// unpack<T>(b, g, q, d, m): q, d (and m, if the type has one) of group g of the block at b.
// The comments give a block's fields in order, with their bytes.
template <int QTYPE>
FORCE_INLINE void unpack(
        const unsigned char* b, int g, unsigned (&q)[8], float (&d)[2], float (&m)[2]);

#define UNPACK(QTYPE)                    \
    template <>                          \
    FORCE_INLINE void unpack<QTYPE>(     \
            const unsigned char* b, int g, unsigned (&q)[8], float (&d)[2], float (&m)[2])

// Q4_0: d 2, nibbles 16
UNPACK(QT_Q4_0) {
    d[0] = d[1] = load_half(b);
    load_nibbles<2>(b + 2, q);
}

// Q4_1: d 2, m 2, nibbles 16
UNPACK(QT_Q4_1) {
    const unsigned dm = load32<4>(b);
    d[0] = d[1] = half_bits_to_float(dm & 0xFFFF);
    m[0] = m[1] = -half_bits_to_float(dm >> 16);
    load_nibbles<4>(b + 4, q);
}

// Q5_0: d 2, fifth bits 4, nibbles 16
UNPACK(QT_Q5_0) {
    d[0] = d[1] = load_half(b);
    const unsigned high = load32<2>(b + 2);
    load_nibbles<2>(b + 6, q);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] |= spread4(high >> 4 * k) << 4;
}

// Q5_1: d 2, m 2, fifth bits 4, nibbles 16
UNPACK(QT_Q5_1) {
    unsigned w[2];
    load_words<8>(b, w);
    d[0] = d[1] = half_bits_to_float(w[0] & 0xFFFF);
    m[0] = m[1] = -half_bits_to_float(w[0] >> 16);
    load_nibbles<8>(b + 8, q);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] |= spread4(w[1] >> 4 * k) << 4;
}

// Q8_0: d 2, int8 32
UNPACK(QT_Q8_0) {
    d[0] = d[1] = load_half(b);
    load_words<2>(b + 2, q);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] ^= 0x80808080;
}

// IQ4_NL: d 2, nibbles 16 into a map
UNPACK(QT_IQ4_NL) {
    d[0] = d[1] = load_half(b);
    load_mapped<2>(b + 2, MAP_IQ4_0, MAP_IQ4_1, MAP_IQ4_2, MAP_IQ4_3, q);
}

// MXFP4: exponent 1, nibbles 16 into a map of doubled values; d = 2^(exponent - 128)
UNPACK(QT_MXFP4) {
    const unsigned e = load8(b);
    d[0] = d[1] = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    load_mapped<1>(b + 1, MAP_MXFP4_0, MAP_MXFP4_1, MAP_MXFP4_2, MAP_MXFP4_3, q);
}

// Q2_K: per 16 values a nibble of scale and one of minimum 16, 2-bit planes 64, d 2, dmin 2
UNPACK(QT_Q2_K) {
    const unsigned dm = load32<4>(b + 80), s = load16(b + 2 * g);
    const float scale = half_bits_to_float(dm & 0xFFFF), minimum = half_bits_to_float(dm >> 16);
    d[0] = scale * (float)(s & 15);
    d[1] = scale * (float)(s >> 8 & 15);
    m[0] = minimum * (float)(s >> 4 & 15);
    m[1] = minimum * (float)(s >> 12);
    load_planes<4>(b + 16 + 32 * (g >> 2), 2 * (g & 3), 0x03030303, q);
}

// Q3_K: third-bit planes 32, 2-bit planes 64, scales' low nibbles 8, their top bits 4, d 2
UNPACK(QT_Q3_K) {
    const int at = 2 * g;  // of 16 scales
    const unsigned low = load16(b + 96 + (at & 7)) >> 4 * (at >> 3) & 0x0F0F;
    const unsigned high = load16(b + 104 + (at & 3)) >> 2 * (at >> 2) & 0x0303;
    const unsigned s = low | high << 4;
    const float scale = load_half(b + 108);
    d[0] = scale * (float)((int)(s & 255) - 32);
    d[1] = scale * (float)((int)(s >> 8) - 32);
    unsigned top[8];
    load_planes<2>(b + 32 + 32 * (g >> 2), 2 * (g & 3), 0x03030303, q);
    load_planes<2>(b, g, 0x01010101, top);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] |= top[k] << 2;
}

// Q4_K: d 2, dmin 2, scales and minima 12, nibble planes 128 (32 bytes hold two groups)
UNPACK(QT_Q4_K) {
    unsigned w[4];
    load_words<16>(b, w);
    k_scales(w, g, d, m);
    load_planes<16>(b + 16 + 32 * (g >> 1), 4 * (g & 1), 0x0F0F0F0F, q);
}

// Q5_K: d 2, dmin 2, scales and minima 12, fifth-bit planes 32, nibble planes 128
UNPACK(QT_Q5_K) {
    unsigned w[4], top[8];
    load_words<16>(b, w);
    k_scales(w, g, d, m);
    load_planes<16>(b + 48 + 32 * (g >> 1), 4 * (g & 1), 0x0F0F0F0F, q);
    load_planes<16>(b + 16, g, 0x01010101, top);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] |= top[k] << 4;
}

// Q6_K: nibble planes 128 (64 bytes hold groups 0, 1 low and 2, 3 high), top 2-bit planes 64,
// int8 scale per 16 values 16, d 2
UNPACK(QT_Q6_K) {
    const unsigned s = load16(b + 192 + 2 * g);
    const float scale = load_half(b + 208);
    d[0] = scale * (float)(signed char)s;
    d[1] = scale * (float)(signed char)(s >> 8);
    unsigned top[8];
    load_planes<2>(b + 64 * (g >> 2) + 32 * (g & 1), 4 * (g >> 1 & 1), 0x0F0F0F0F, q);
    load_planes<2>(b + 128 + 32 * (g >> 2), 2 * (g & 3), 0x03030303, top);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] |= top[k] << 4;
}

// IQ4_XS: d 2, scales' top bits 2, their low nibbles 4, per group nibbles 16 into IQ4_NL's map
UNPACK(QT_IQ4_XS) {
    unsigned w[2];
    load_words<8>(b, w);
    const unsigned s = (w[1] >> 4 * g & 15) | (w[0] >> (16 + 2 * g) & 3) << 4;
    d[0] = d[1] = half_bits_to_float(w[0] & 0xFFFF) * (float)((int)s - 32);
    load_mapped<8>(b + 8 + 16 * g, MAP_IQ4_0, MAP_IQ4_1, MAP_IQ4_2, MAP_IQ4_3, q);
}

// The codebook types with signs apart: unpack_sizes<T>(b, g, q, signs, d) gives sizes 1 to 127 as
// bytes, and bit i of `signs` where value i is negative.
template <int QTYPE>
FORCE_INLINE void unpack_sizes(
        const unsigned char* b, int g, unsigned (&q)[8], unsigned& signs, float (&d)[2]);

#define UNPACK_SIZES(QTYPE)              \
    template <>                          \
    FORCE_INLINE void unpack_sizes<QTYPE>( \
            const unsigned char* b, int g, unsigned (&q)[8], unsigned& signs, float (&d)[2])

// IQ2_XXS: d 2, per group four codebook indices 4 and (four times 7 signs, 4 bits of scale) 4
UNPACK_SIZES(QT_IQ2_XXS) {
    unsigned w[2];
    load_words<2>(b + 2 + 8 * g, w);
    d[0] = d[1] = load_half(b) * (0.5f + (float)(w[1] >> 28)) * 0.25f;
    signs = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        iq2_sizes(CODEBOOK(grid_iq2xxs, w[0] >> 8 * k & 255), q[2 * k], q[2 * k + 1]);
        signs |= even_signs(w[1] >> 7 * k) << 8 * k;
    }
}

// IQ2_XS: d 2, per 8 values (9 bits of index, 7 signs) 64, a nibble of scale per 16 values 8
UNPACK_SIZES(QT_IQ2_XS) {
    const unsigned s = load8(b + 66 + g);
    const float scale = load_half(b);
    d[0] = scale * (0.5f + (float)(s & 15)) * 0.25f;
    d[1] = scale * (0.5f + (float)(s >> 4)) * 0.25f;
    signs = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned x = load16(b + 2 + 8 * g + 2 * k);
        iq2_sizes(CODEBOOK(grid_iq2xs, x & 511), q[2 * k], q[2 * k + 1]);
        signs |= even_signs(x >> 9) << 8 * k;
    }
}

// IQ2_S: d 2, indices' low bytes 32, signs 32, indices' top 2 bits 8, a nibble of scale per 16 8
UNPACK_SIZES(QT_IQ2_S) {
    const unsigned low = load32<2>(b + 2 + 4 * g);
    const unsigned top = load8(b + 66 + g), s = load8(b + 74 + g);
    const float scale = load_half(b);
    d[0] = scale * (0.5f + (float)(s & 15)) * 0.25f;
    d[1] = scale * (0.5f + (float)(s >> 4)) * 0.25f;
    signs = load32<2>(b + 34 + 4 * g);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned index = (low >> 8 * k & 255) | (top >> 2 * k & 3) << 8;
        iq2_sizes(CODEBOOK(grid_iq2s, index), q[2 * k], q[2 * k + 1]);
    }
}

// IQ3_XXS: d 2, codebook indices per 4 values 64, per group (four times 7 signs, 4 bits of scale) 4
UNPACK_SIZES(QT_IQ3_XXS) {
    unsigned w[2];
    load_words<2>(b + 2 + 8 * g, w);
    const unsigned s = load32<2>(b + 66 + 4 * g);
    d[0] = d[1] = load_half(b) * (0.5f + (float)(s >> 28)) * 0.5f;
    signs = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const unsigned entry = CODEBOOK(grid_iq3xxs, w[k >> 2] >> 8 * (k & 3) & 255);
        q[k] = __byte_perm(MAP_IQ3_XXS_0, MAP_IQ3_XXS_1, entry);
        if (k < 4) signs |= even_signs(s >> 7 * k) << 8 * k;
    }
}

// IQ3_S: d 2, indices' low bytes 64, their top bits 8, signs 32, a nibble of scale per group 4
UNPACK_SIZES(QT_IQ3_S) {
    unsigned w[2];
    load_words<2>(b + 2 + 8 * g, w);
    const unsigned top = load8(b + 66 + g);
    const unsigned s = load8(b + 106 + (g >> 1)) >> 4 * (g & 1) & 15;
    d[0] = d[1] = load_half(b) * (float)(1 + 2 * s);
    signs = load32<2>(b + 74 + 4 * g);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const unsigned index = (w[k >> 2] >> 8 * (k & 3) & 255) | (top >> k & 1) << 8;
        q[k] = __byte_perm(MAP_IQ3_S_0, MAP_IQ3_S_1, CODEBOOK(grid_iq3s, index));
    }
}
#undef UNPACK_SIZES

template <int QTYPE>
struct SignsApart {
    static constexpr bool yes = QTYPE == QT_IQ2_XXS || QTYPE == QT_IQ2_XS || QTYPE == QT_IQ2_S ||
                                QTYPE == QT_IQ3_XXS || QTYPE == QT_IQ3_S;
};

// Any of them: 128 + or - the sizes.
template <int QTYPE>
FORCE_INLINE void unpack(
        const unsigned char* b, int g, unsigned (&q)[8], float (&d)[2], float (&m)[2]) {
    static_assert(SignsApart<QTYPE>::yes, "the other types have an unpack() of their own");
    unsigned signs;
    unpack_sizes<QTYPE>(b, g, q, signs, d);
#pragma unroll
    for (int k = 0; k < 8; ++k) q[k] = signed_bytes(q[k], signs >> 4 * k);
}

// IQ1_S: d 2, indices' low bytes 32, per group (four times 3 top bits, 3 of scale, delta's sign) 2
UNPACK(QT_IQ1_S) {
    const unsigned low = load32<2>(b + 2 + 4 * g), h = load16(b + 34 + 2 * g);
    d[0] = d[1] = load_half(b) * (float)(2 * (h >> 12 & 7) + 1) * 0.125f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned index = (low >> 8 * k & 255) | (h >> 3 * k & 7) << 8;
        iq1_bytes(index, h >> 15, q[2 * k], q[2 * k + 1]);
    }
}

// IQ1_M: indices' low bytes 32, per 8 values (3 top bits, delta's sign) 16, four words of (four
// 3-bit scales per 16 values, a nibble of d) 8
UNPACK(QT_IQ1_M) {
    unsigned w[2];
    load_words<8>(b + 48, w);
    const unsigned low_half = (w[0] >> 12 & 0xF) | (w[0] >> 24 & 0xF0);
    const unsigned bits = low_half | (w[1] >> 4 & 0xF00) | (w[1] >> 16 & 0xF000);
    const unsigned s = (g < 4 ? w[0] : w[1]) >> (16 * (g >> 1 & 1) + 6 * (g & 1));
    const float scale = half_bits_to_float(bits);
    d[0] = scale * (float)(2 * (s & 7) + 1) * 0.125f;
    d[1] = scale * (float)(2 * (s >> 3 & 7) + 1) * 0.125f;
    const unsigned low = load32<4>(b + 4 * g), h = load16(b + 32 + 2 * g);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned x = h >> 4 * k;
        iq1_bytes((low >> 8 * k & 255) | (x & 7) << 8, x & 8, q[2 * k], q[2 * k + 1]);
    }
}
#undef UNPACK

// ---------------------------------------------------------------- entry points --------------
// Group g of a row as bytes, scales and minima: see the top. Quantised types only.
template <int QTYPE>
FORCE_INLINE void load_bytes(
        const unsigned char* row, int g, unsigned (&q)[8], float (&d)[2], float (&m)[2]) {
    constexpr int groups = QuantTraits<QTYPE>::block / 32;  // in a block
    const int block = (unsigned)g / groups, rest = (unsigned)g % groups;
    unpack<QTYPE>(row + (long long)block * QuantTraits<QTYPE>::nbytes, rest, q, d, m);
}

// Value i of an F32, F16 or BF16 row.
template <int QTYPE>
FORCE_INLINE float load_float(const unsigned char* row, long long i) {
    if constexpr (QTYPE == QT_F32) return __uint_as_float(*((const piece32*)row + i));
    if constexpr (QTYPE == QT_F16) return half_bits_to_float(load16(row + 2 * i));
    if constexpr (QTYPE == QT_BF16) return bf16_bits_to_float(load16(row + 2 * i));
}

// v = group g of a row, values 32 g .. 32 g + 31, all of which the row has.
template <int QTYPE>
FORCE_INLINE void load_group(const unsigned char* row, int g, float (&v)[32]) {
    if constexpr (QuantTraits<QTYPE>::block == 1) {
#pragma unroll
        for (int i = 0; i < 32; ++i) v[i] = load_float<QTYPE>(row, 32LL * g + i);
    } else {
        unsigned q[8];
        float d[2], m[2];
        load_bytes<QTYPE>(row, g, q, d, m);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const float x = byte_to_float(q[i / 4], i % 4, QuantTraits<QTYPE>::bias);
            if constexpr (QuantTraits<QTYPE>::has_min)
                v[i] = __fmaf_rn(d[i / 16], x, -m[i / 16]);
            else
                v[i] = __fmul_rn(d[i / 16], x);
        }
    }
}

// As load_group for a row of n values: nothing past the row is read, values past it are 0.
// Rows of quantised types hold whole groups.
template <int QTYPE>
FORCE_INLINE void load_group_tail(const unsigned char* row, int g, int n, float (&v)[32]) {
    if (32LL * g + 32 <= n) return load_group<QTYPE>(row, g, v);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        v[i] = 0;
        if constexpr (QuantTraits<QTYPE>::block == 1)
            if (32LL * g + i < n) v[i] = load_float<QTYPE>(row, 32LL * g + i);
    }
}
