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

#include "quant_codebooks.cuh"
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
