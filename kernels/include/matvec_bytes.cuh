// Products of ONE token with types of few bits as int8 on tensor cores: as matvec.cuh has it, with half the
// products and no number widened to 16 bits. Instructions are what these types wait for.
//
// x becomes integers of up to 22 bits and a sign, which count a power of two by the largest |x| of some tiles (what
// a warp fetches at once), in three signed digits: 65536 d0 + 256 d1 + d2. d0 and d1 of step j are columns 2 j and
// 2 j + 1 of B, as hi and lo are in matvec.cuh, d2 column 2 j of a second product of the same bytes of weights. A
// lane's four columns of a step are the four bytes of a register, in the order c, c + 8, c + 1, c + 9: as tiles have
// numbers of two and four bits. Products begin at BYTE_ZERO, so that a sum's bits are those of a float32.
// Numerics  x is rounded to 2^-22 of the largest of those, sums of a step are exact, the rest float32: NMSE about
//           1e-13 to float64. |x| < 1e34; x of which the largest is below 1e-32 becomes 0.
// Sources   own. Tested by tests/kernels/test_matvec_bytes.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec.cuh"

constexpr float BYTE_ZERO = 0x1.8p23f;
constexpr int BYTE_ROWS = 3;  // row tiles that must meet x for it to pay

// Whether products of one token take a type as bytes.
template <int QTYPE>
constexpr bool AS_BYTES = QTYPE == QT_IQ1_S || QTYPE == QT_IQ1_M || Tile<QTYPE>::kind == TILE_MAP8;

// ---------------------------------------------------------------- instructions --------------
#if defined(SIMT)
template <bool SIGNED>
__device__ __forceinline__ void byte_mma(unsigned (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    simt::mma_16832(d, a, b, SIGNED);
}
__device__ __forceinline__ float byte_max(float a, float b) { return a > b || a != a ? a : b; }
#else
// d += a b; a int8 or unsigned, b int8, int32 sums.
template <bool SIGNED>
__device__ __forceinline__ void byte_mma(unsigned (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (SIGNED)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// NaN if one is.
__device__ __forceinline__ float byte_max(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
#endif

// What a lane gets of step t's products: of digits 0 and 1, and of digit 2 and of nothing.
struct ByteSums {
    unsigned upper[4], last[4];

    __device__ __forceinline__ ByteSums() {
#pragma unroll
        for (int i = 0; i < 4; i++) upper[i] = last[i] = __float_as_uint(BYTE_ZERO);
    }
    // Of row g + 8 i: what integers of x give, + BYTE_ZERO.
    __device__ __forceinline__ float sum(int i) const {
        const float first = __uint_as_float(upper[2 * i]) - BYTE_ZERO;
        const float second = __uint_as_float(upper[2 * i + 1]) - BYTE_ZERO;
        return __fmaf_rn(__fmaf_rn(first, 256.f, second), 256.f, __uint_as_float(last[2 * i]));
    }
};

// ---------------------------------------------------------------- x -------------------------
// x as two bfloat16, by the names of ByteX.
struct PairX : FewX<0> {
    struct Scale {};  // none: each number has its own exponent
    static constexpr bool scales = false;
    template <int N>
    __device__ __forceinline__ static Scale scale(const float (&)[N][4]) { return {}; }
    __device__ __forceinline__ static PairX of(const float (&v)[4], int lane, Scale) {
        return {few_x<false>(v, lane)};
    }
    __device__ __forceinline__ uint2 words(int) const { return make_uint2(b[0], b[1]); }
    __device__ __forceinline__ static PairX from(
            const uint2 (&words)[32], const float (&ones)[4], int lane) {
        const uint2 own = words[lane];
        return {{{own.x, own.y}, ones[lane & 3]}};
    }
};

// x as bytes: the columns that meet a column tile.
struct ByteX {
    unsigned b;     // of step g / 2, four columns: digit 0 where g is even, 1 where it is odd
    unsigned last;  // digit 2 where g is even, else anything
    float unit;     // what the integers count: a power of two, or no number
    float ones;     // sum of x of step t

    // What makes integers of all these columns, of a whole warp.
    struct Scale {
        float in, unit;
    };
    static constexpr bool scales = true;
    template <int N>
    __device__ __forceinline__ static Scale scale(const float (&v)[N][4]) {
        float most = fabsf(v[0][0]);
#pragma unroll
        for (int i = 1; i < 4 * N; i++) most = byte_max(most, fabsf(v[i / 4][i % 4]));
#pragma unroll
        for (int i = 1; i < 32; i *= i == 2 ? 4 : 2) most = byte_max(most, __shfl_xor_sync(~0u, most, i));
        const unsigned e = max(__float_as_uint(most) & 0x7F800000u, 22u << 23);
        return {__uint_as_float((275u << 23) - e),  // integers up to 2^22
                e == 0x7F800000u ? most : __uint_as_float(e - (21u << 23))};
    }
    // From a lane's columns c, c + 1, c + 8, c + 9.
    __device__ __forceinline__ static ByteX of(const float (&v)[4], int lane, Scale scale) {
        ByteX x;
        x.unit = scale.unit;
        // The top digit is byte 2 of the integer + 0x8080, the next byte 1 of it + 0x80, the last byte 0.
        const unsigned more = lane & 4 ? 0x80 : 0x8080 - 0x400000, pick = lane & 4 ? 0x0051 : 0x0062;
        unsigned bits[4];
#pragma unroll
        for (int k = 0; k < 4; k++) bits[k] = __float_as_uint(__fmaf_rn(v[k], scale.in, BYTE_ZERO));
        x.last = __byte_perm(__byte_perm(bits[0], bits[2], 0x0040), __byte_perm(bits[1], bits[3], 0x0040), 0x5410);
#pragma unroll
        for (int k = 0; k < 4; k++) bits[k] += more;
        x.b = __byte_perm(__byte_perm(bits[0], bits[2], pick), __byte_perm(bits[1], bits[3], pick), 0x5410);
        ByteSums c;
        const unsigned a[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
        const unsigned b[2] = {x.b, 0}, last[2] = {lane & 4 ? 0 : x.last, 0};
        byte_mma<false>(c.upper, a, b), byte_mma<false>(c.last, a, last);
        x.ones = (c.sum(0) - BYTE_ZERO) * x.unit;
        return x;
    }
    // As shared memory keeps it: of each lane, and of odd g the unit where `last` is nothing.
    __device__ __forceinline__ uint2 words(int lane) const {
        return make_uint2(b, lane & 4 ? __float_as_uint(unit) : last);
    }
    __device__ __forceinline__ static ByteX from(
            const uint2 (&words)[32], const float (&ones)[4], int lane) {
        const uint2 own = words[lane];
        return {own.x, own.y, __uint_as_float(words[4].y), ones[lane & 3]};
    }
    // What meets steps 2 u and 2 u + 1.
    __device__ __forceinline__ void meets(int u, int lane, unsigned (&upper)[2], unsigned (&lower)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            upper[i] = lane >> 3 == 2 * u + i ? b : 0;
            lower[i] = lane >> 2 == 4 * u + 2 * i ? last : 0;
        }
    }
};

// The same for many row tiles: chosen once, in registers.
struct ByteHeld {
    unsigned upper[2][2], lower[2][2];
    float unit, ones;

    __device__ __forceinline__ static ByteHeld of(const ByteX& x, int lane) {
        ByteHeld out;
        out.unit = x.unit, out.ones = x.ones;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            x.meets(u, lane, out.upper[u], out.lower[u]);
#ifndef SIMT  // else the compiler chooses anew for every row tile
#pragma unroll
            for (int i = 0; i < 2; i++) asm volatile("" : "+r"(out.upper[u][i]), "+r"(out.lower[u][i]));
#endif
        }
        return out;
    }
    __device__ __forceinline__ void meets(int u, int, unsigned (&up)[2], unsigned (&low)[2]) const {
        up[0] = upper[u][0], up[1] = upper[u][1], low[0] = lower[u][0], low[1] = lower[u][1];
    }
};

// ---------------------------------------------------------------- weights -------------------
// The numbers of steps 2 u and 2 u + 1 as bytes. Of two bits: odd steps' 4 times as large; not of the maps: rows
// g + 8's 16 times.
template <int QTYPE>
__device__ __forceinline__ void byte_fragment(const TileData<QTYPE>& w, int u, unsigned (&r)[4]) {
    if constexpr (Few<QTYPE>::fourfold) {
        const unsigned q = w.q[u];
        r[0] = q & 0x03030303, r[1] = q & 0x30303030, r[2] = q & 0x0C0C0C0C, r[3] = q & 0xC0C0C0C0;
    } else if constexpr (Tile<QTYPE>::kind == TILE_MAP8) {
        mapped<QTYPE>(nibbles(w, 2 * u), 0x80808080, r[0], r[1]);
        mapped<QTYPE>(nibbles(w, 2 * u + 1), 0x80808080, r[2], r[3]);
    } else {
        const unsigned even = nibbles(w, 2 * u), odd = nibbles(w, 2 * u + 1);
        r[0] = even & 0x0F0F0F0F, r[1] = even & 0xF0F0F0F0, r[2] = odd & 0x0F0F0F0F, r[3] = odd & 0xF0F0F0F0;
    }
}

// acc[0..1] += rows g and g + 8 of the tile times x: step t's part in lane 4 g + t. As few_scaled().
template <int QTYPE, class X>
__device__ __forceinline__ void byte_add(const TileData<QTYPE>& w, const X& x, int lane, float* acc) {
    using F = Few<QTYPE>;
    constexpr bool map = Tile<QTYPE>::kind == TILE_MAP8;
    constexpr float big = 32768.f, less = map ? 0.f : Tile<QTYPE>::zero * F::unit;
    ByteSums c;
#pragma unroll
    for (int u = 0; u < 2; u++) {
        unsigned r[4];
        byte_fragment<QTYPE>(w, u, r);
        unsigned upper[2], lower[2];
        x.meets(u, lane, upper, lower);
        byte_mma<map>(c.upper, r, upper);
        byte_mma<map>(c.last, r, lower);
    }
    const int t = lane & 3;
    const unsigned select = 0x7604 | t << 4;
    const float one = x.unit * (F::fourfold && t & 1 ? 0.25f * F::of_result : F::of_result);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float unit = i && !map ? one * 0.0625f : one;
        const float nothing = less ? __fmaf_rn(unit, -BYTE_ZERO, x.ones * -less) : unit * -BYTE_ZERO;
        float v = __fmaf_rn(c.sum(i), unit, nothing), s;
        const float d = half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF);
        if constexpr (QTYPE == QT_IQ1_S) {  // 2^15 + scale, 2^15 + 16 * 8 minimum / scale
            const unsigned both = __byte_perm(w.s[i], 0x47000000, select);
            s = __fmaf_rn(__uint_as_float(both & 0xFFFF0FFF), d, -big * d);
            v = __fmaf_rn(__uint_as_float(both & 0xFFFFF0FF) - big, x.ones * (-1.f / 128), v);
        } else {
            s = __fmaf_rn(few_byte(w.s[i], select), d, -big * d);
        }
        acc[i] = __fmaf_rn(s, v, acc[i]);
    }
}
template <int QTYPE>
__device__ __forceinline__ void few_add(const TileData<QTYPE>& w, const ByteX& x, int lane, float* acc) {
    byte_add<QTYPE>(w, x, lane, acc);
}
template <int QTYPE>
__device__ __forceinline__ void few_add(const TileData<QTYPE>& w, const ByteHeld& x, int lane, float* acc) {
    byte_add<QTYPE>(w, x, lane, acc);
}

// x as products of one token with all of these types want it, where ROWS row tiles of each meet it: to make bytes of
// x takes longer than to make two bfloat16.
template <bool BYTES>
struct OnePicked {
    using type = PairX;
};
template <>
struct OnePicked<true> {
    using type = ByteX;
};
template <int ROWS, int... Q>
using OneXOf = typename OnePicked<(AS_BYTES<Q> && ...) && ROWS >= BYTE_ROWS>::type;
