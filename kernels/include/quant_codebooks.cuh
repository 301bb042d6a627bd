// The part of quants.cuh for types whose values are vectors of a codebook: IQ1, IQ2 and IQ3.
//
// Sources: as quants.cuh. Tested by: tests/kernels/test_quants.py.
#pragma once

// ---------------------------------------------------------------- helpers -------------------
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

// Four times eight sign bits from seven each: the eighth makes their number even.
FORCE_INLINE unsigned even_signs4(unsigned bits) {
    const unsigned s = (bits & 0x7F) | (bits << 1 & 0x7F00) | (bits << 2 & 0x7F0000) |
                       (bits << 3 & 0x7F000000);
    unsigned odd = s ^ (s >> 4);  // the low bits of a byte are its own
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return s | (odd << 7 & 0x80808080);
}

// Eight codebook values of IQ1, -1, 0 or 1, + or - 1/8: in eighths, + 16.
FORCE_INLINE void iq1_bytes(int index, bool minus, unsigned& q0, unsigned& q1) {
    const unsigned entry = CODEBOOK(grid_iq1, index), map = minus ? 0x00170F07 : 0x00191109;
    q0 = __byte_perm(map, 0, entry);
    q1 = __byte_perm(map, 0, entry >> 16);
}

// ---------------------------------------------------------------- one function per type -----
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
    signs = even_signs4(w[1]);
#pragma unroll
    for (int k = 0; k < 4; ++k)
        iq2_sizes(CODEBOOK(grid_iq2xxs, w[0] >> 8 * k & 255), q[2 * k], q[2 * k + 1]);
}

// IQ2_XS: d 2, per 8 values (9 bits of index, 7 signs) 64, a nibble of scale per 16 values 8
UNPACK_SIZES(QT_IQ2_XS) {
    const unsigned s = load8(b + 66 + g);
    const float scale = load_half(b);
    d[0] = scale * (0.5f + (float)(s & 15)) * 0.25f;
    d[1] = scale * (0.5f + (float)(s >> 4)) * 0.25f;
    unsigned w[2];
    load_words<2>(b + 2 + 8 * g, w);
#pragma unroll
    for (int k = 0; k < 4; ++k)
        iq2_sizes(CODEBOOK(grid_iq2xs, w[k >> 1] >> 16 * (k & 1) & 511), q[2 * k], q[2 * k + 1]);
    const unsigned low = (w[0] >> 9 & 0x7F) | (w[0] >> 18 & 0x3F80);  // twice seven bits
    const unsigned high = (w[1] >> 9 & 0x7F) | (w[1] >> 18 & 0x3F80);
    signs = even_signs4(low | high << 14);
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
    signs = even_signs4(s);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const unsigned entry = CODEBOOK(grid_iq3xxs, w[k >> 2] >> 8 * (k & 3) & 255);
        q[k] = __byte_perm(MAP_IQ3_XXS_0, MAP_IQ3_XXS_1, entry);
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
