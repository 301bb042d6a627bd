// Products of few tokens with tiled weights (tiles.cuh) on tensor cores, as device functions.
//
// A warp takes a row tile (16 rows) and some of its column tiles (64 columns); x is float32 and
// becomes two bfloat16, hi + lo, in two of the eight columns of mma.m16n8k16.
//   One token: columns 2 j and 2 j + 1 of B hold step j of the column tile and nothing else, so that
//   four products into one accumulator leave step t's sums in lane 4 g + t: each lane has one
//   scale to apply, and a product of the same fragment with ones gives the sums of x.
//   Up to eight: token c / 2 sits in columns c, c + 1 of a block of four tokens.
// The integers of a weight enter as bfloat16 bit patterns: patterns below 256 stand for n 2^-133,
// subnormal or not, so unpacking is masks and shifts alone. x enters times 2^64.
// Numerics  x keeps 16 bits, weights are exact, sums float32: NMSE about 2e-11 to float64. |x| < 1e18.
// Sources   own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "pdl.cuh"
#include "reduce.cuh"
#include "tiles.cuh"

#include "matvec_mma.cuh"

template <int QTYPE>
struct Few {
    using T = Tile<QTYPE>;
    static constexpr bool whole = T::has_scale;  // integers and scales; else bfloat16 or float16
    static constexpr bool mapped = T::kind == TILE_MAP_SIGNED || T::kind == TILE_MAP8;
    static constexpr bool is_signed = T::kind == TILE_SIGNED || mapped;
    static constexpr int zero = is_signed ? 128 : T::zero;  // in the numbers few_fragment() gives
    // 4-bit numbers of rows g + 8 come 16 times as large: that spares a shift.
    static constexpr bool sixteenfold = T::kind == TILE_SMALL && T::over_words == 0;
    static constexpr bool fourfold = T::thin && T::h_words == 0;  // those of odd steps: left in place
    static constexpr float unit = SCALE_UNIT<QTYPE>, of_result = T::doubled ? 2 * unit : unit;
    static constexpr float result = whole ? 0x1p69f * of_result : FEW_ONE;
    static constexpr float result8 = sixteenfold ? 0x1p65f * of_result : result;
};

// ---------------------------------------------------------------- weights -------------------
// A lane's part of tile `at` = row tile * column tiles + column tile; zeros when not valid.
template <int QTYPE>
__device__ __forceinline__ void few_tile(
        const TileView<QTYPE>& v, long long at, int lane, bool valid, TileData<QTYPE>& w) {
    using T = Tile<QTYPE>;
#pragma unroll
    for (int u = 0; u < T::q_words / 4; ++u)
        few_load<4>(v.q + at * T::q_bytes + 512 * u + 16 * lane, valid, w.q + 4 * u);
    if constexpr (T::thin) few_load<2>(v.q + at * T::q_bytes + 8 * lane, valid, w.q);
    if constexpr (T::h_words)
        few_load<T::h_words>(v.h + at * T::h_bytes + 4 * T::h_words * lane, valid, w.h);
    if constexpr (T::s_bytes) few_load<2>(v.s + at * T::s_bytes + 8 * (lane >> 2), valid, w.s);
    if constexpr (T::m_bytes) few_load<2>(v.m + at * T::m_bytes + 8 * (lane >> 2), valid, w.m);
    if constexpr (T::d_words)  // column tiles of these types come in fours
        few_load<T::d_words>(v.d + (at >> 2) * T::d_bytes + 4 * T::d_words * (lane >> 2), valid, w.d);
}

// The numbers of step j as bfloat16 patterns; see Few for what they are less and times.
template <int QTYPE>
__device__ __forceinline__ void few_fragment(const TileData<QTYPE>& w, int j, unsigned (&r)[4]) {
    using T = Tile<QTYPE>;
    if constexpr (!Few<QTYPE>::whole) {
        biased_fragment<QTYPE>(w, j, r);
    } else if constexpr (Few<QTYPE>::fourfold) {
        const unsigned first = w.q[j >> 1], q = first >> 8, mask = j & 1 ? 0x000C000C : 0x00030003;
        r[0] = first & mask, r[1] = first & mask << 4, r[2] = q & mask, r[3] = q & mask << 4;
    } else if constexpr (Few<QTYPE>::sixteenfold) {
        const unsigned first = nibbles(w, j), q = first >> 8;
        r[0] = first & 0x000F000F, r[1] = first & 0x00F000F0, r[2] = q & 0x000F000F, r[3] = q & 0x00F000F0;
    } else if constexpr (T::kind == TILE_SMALL) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            r[i] = (w.q[j] >> 4 * i & 0x000F000F) | high_bits<QTYPE>(w, j, i, 4);
    } else if constexpr (T::q_bytes == 1024) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const unsigned word = w.q[2 * j + (i >> 1)];
            r[i] = (word ^ 0x00800080) & 0x00FF00FF;
            r[i + 1] = (word >> 8 ^ 0x00800080) & 0x00FF00FF;
        }
    } else {
        unsigned lo, hi;
        mapped<QTYPE>(nibbles(w, j), 0, lo, hi);
        if constexpr (T::kind == TILE_MAP8) {
            r[0] = lo & 0x00FF00FF, r[2] = __byte_perm(lo, 0, 0x4341);
            r[1] = hi & 0x00FF00FF, r[3] = __byte_perm(hi, 0, 0x4341);
            return;
        }
        const unsigned first = __byte_perm(lo, hi, 0x5140), last = __byte_perm(lo, hi, 0x7362);
        r[0] = __byte_perm(first, 0, 0x4140), r[1] = __byte_perm(first, 0, 0x4342);
        r[2] = __byte_perm(last, 0, 0x4140), r[3] = __byte_perm(last, 0, 0x4342);
    }
}

// 2^15 + byte u of a word; select = 0x7604 | u << 4.
__device__ __forceinline__ float few_byte(unsigned word, unsigned select) {
    return __uint_as_float(__byte_perm(word, 0x47000000, select));
}

// acc[i] += scale * (sums - zero * sum of x) + minimum * sum of x, rows g and g + 8. c: an mma's sums; u: the
// group (any lane its own); ones: sum of x of the group, times 2^64. Scales of K types are
// (2^15 + n) d - 2^15 d, exact in one FMA; powers of two go to whatever is computed least often.
template <int QTYPE>
__device__ __forceinline__ void few_scaled(
        const TileData<QTYPE>& w, int u, const float (&c)[4], float ones, float* acc) {
    using F = Few<QTYPE>;
    using T = Tile<QTYPE>;
    constexpr float big = 32768.f;
    const unsigned select = 0x7604 | u << 4;
    const float sums[2] = {c[0] + c[1], c[2] + c[3]};
    const float x = ones * (F::zero ? -FEW_ONE * F::unit * F::zero : FEW_ONE);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float result = (i ? F::result8 : F::result) * (F::fourfold && u & 1 ? 0.25f : 1.f);
        if constexpr (!F::whole) {
            acc[i] = __fmaf_rn(sums[i], result, acc[i]);
        } else if constexpr (QTYPE == QT_IQ1_S) {  // 2^15 + scale, 2^15 + 16 * 8 minimum / scale
            const float d = half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF);
            const unsigned both = __byte_perm(w.s[i], 0x47000000, select);
            const float s = __fmaf_rn(__uint_as_float(both & 0xFFFF0FFF), d, -big * d);
            const float x8 = ones * (-FEW_ONE / 128), most = __uint_as_float(both & 0xFFFFF0FF) - big;
            acc[i] = __fmaf_rn(s, __fmaf_rn(most, x8, sums[i] * result), acc[i]);
        } else if constexpr (QTYPE == QT_Q2_K) {  // 2^15 + scale, 2^15 + 16 minimum
            const float d = half_bits_to_float(w.d[i] & 0xFFFF) * result;
            const float m = half_bits_to_float(w.d[i] >> 16) * (-FEW_ONE / 16);
            const unsigned both = __byte_perm(w.s[i], 0x47000000, select);
            const float s = __fmaf_rn(__uint_as_float(both & 0xFFFF0FFF), d, -big * d);
            acc[i] = __fmaf_rn(s, sums[i], acc[i]);
            acc[i] = __fmaf_rn(__fmaf_rn(__uint_as_float(both & 0xFFFFF0FF), m, -big * m), ones, acc[i]);
        } else if constexpr (T::d_words == 2) {
            const float d = half_bits_to_float(w.d[i] & 0xFFFF) * result;
            const float m = half_bits_to_float(w.d[i] >> 16) * -FEW_ONE;
            const float s = __fmaf_rn(few_byte(w.s[i], select), d, -big * d);
            acc[i] = __fmaf_rn(s, sums[i], acc[i]);
            const float minimum = __fmaf_rn(few_byte(w.s[i], select + 0x20), m, -big * m);
            acc[i] = __fmaf_rn(minimum, ones, acc[i]);
        } else {
            float s;
            if constexpr (T::d_words == 1) {
                const float d = half_bits_to_float(w.d[0] >> 16 * i & 0xFFFF);
                constexpr bool positive = ODD_SCALES<QTYPE>;  // others: the top bit turned
                s = __fmaf_rn(few_byte(positive ? w.s[i] : w.s[i] ^ 0x80808080, select), d,
                              -(positive ? big : big + 128) * d);
            } else if constexpr (QTYPE == QT_MXFP4) {
                s = bf16_bits_to_float(w.s[i] >> 16 * u & 0xFFFF);
            } else {
                s = half_bits_to_float(w.s[i] >> 16 * u & 0xFFFF);
            }
            const float v = F::zero ? __fmaf_rn(sums[i], result, x) : sums[i] * result;
            acc[i] = __fmaf_rn(s, v, acc[i]);
            if constexpr (T::has_min)
                acc[i] = __fmaf_rn(half_bits_to_float(w.m[i] >> 16 * u & 0xFFFF), x, acc[i]);
        }
    }
}

// ---------------------------------------------------------------- x -------------------------
// v[0..3] = columns c, c + 1, c + 8, c + 9 of a row of `in` floats, zeros outside of it. c and `in` are
// even, x is at a multiple of 8 bytes.
__device__ __forceinline__ void few_columns(const float* x, int c, int in, float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const int at = c + 4 * i;
        few_pair(x + at, at >= 0 && at < in, v[i], v[i + 1]);
    }
}

// hi (low_part 0) or lo (low_part ~0) of four floats as a B fragment.
__device__ __forceinline__ void few_split(const float (&v)[4], unsigned low_part, unsigned (&b)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned hi = few_bf16x2(v[2 * i], v[2 * i + 1]) & low_part;
        b[i] = few_bf16x2(v[2 * i] - __uint_as_float(hi << 16),
                          v[2 * i + 1] - __uint_as_float(hi & 0xFFFF0000));
    }
}

// The columns of x that meet a column tile. BLOCKS: blocks of four tokens, 0 for one token alone.
template <int BLOCKS>
struct FewX {
    unsigned b[BLOCKS][4][2];  // [step]
    float ones[BLOCKS][4];     // token t's sums of x, by step
};
template <>
struct FewX<0> {
    unsigned b[2];  // of step g / 2
    float ones;     // sum of x of step t, both parts
};

// x of one token from its four floats per lane: SCALED: they are times 2^64 already.
template <bool SCALED = true>
__device__ __forceinline__ FewX<0> few_x(const float (&v)[4], int lane) {
    FewX<0> x;
    few_split(v, lane & 4 ? ~0u : 0u, x.b);
    if constexpr (!SCALED) x.b[0] = few_times_x(x.b[0]), x.b[1] = few_times_x(x.b[1]);
    const unsigned a[4] = {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    few_mma(c, a, x.b);
    x.ones = c[0] + c[1];
    return x;
}

// acc[0..1] += rows g and g + 8 of the tile times x: step t's part in lane 4 g + t.
template <int QTYPE>
__device__ __forceinline__ void few_add(
        const TileData<QTYPE>& w, const FewX<0>& x, int lane, float* acc) {
    using T = Tile<QTYPE>;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const bool mine = lane >> 3 == j;
        const unsigned b[2] = {mine ? x.b[0] : 0, mine ? x.b[1] : 0};
        unsigned r[4];
        few_fragment<QTYPE>(w, j, r);
        few_mma(c, r, b);
        if constexpr (T::has_low) {
            exact_low(w, j, r);
            few_mma(c, r, b);
        }
    }
    few_scaled<QTYPE>(w, (lane & 3) / T::steps, c, x.ones, acc);
}

// As above for blocks of four tokens: acc[2 k .. 2 k + 1] is token 4 k + t, rows g and g + 8.
template <int QTYPE, int BLOCKS>
__device__ __forceinline__ void few_add(
        const TileData<QTYPE>& w, const FewX<BLOCKS>& x, int lane, float* acc) {
    using T = Tile<QTYPE>;
    constexpr int steps = T::has_scale ? T::steps : 4;
#pragma unroll
    for (int u = 0; u < 4 / steps; u++) {
        float c[BLOCKS][4], ones[BLOCKS];
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) c[k][0] = c[k][1] = c[k][2] = c[k][3] = ones[k] = 0.f;
#pragma unroll
        for (int j = u * steps; j < (u + 1) * steps; j++) {
            unsigned r[4], low[4];
            few_fragment<QTYPE>(w, j, r);
            if constexpr (T::has_low) exact_low(w, j, low);
#pragma unroll
            for (int k = 0; k < BLOCKS; k++) {
                few_mma(c[k], r, x.b[k][j]);
                if constexpr (T::has_low) few_mma(c[k], low, x.b[k][j]);
                ones[k] += x.ones[k][j];
            }
        }
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) few_scaled<QTYPE>(w, u, c[k], ones[k], acc + 2 * k);
    }
}

// ---------------------------------------------------------------- for other kernels ---------
// acc += row tile `row_tile` times x over column tiles from..to-1 of a whole warp, one token; x (global
// or shared memory, at a multiple of 8 bytes) has `in` floats, an even number, and meets packed columns from `skip`
// on. DEPTH tiles are under way at once. Call few_rows() afterwards.
template <int QTYPE, int DEPTH = 2>
__device__ __forceinline__ void few_product(
        const TileView<QTYPE>& v, long long row_tile, int from, int to, const float* x, int in,
        int skip, float (&acc)[2]) {
    const int lane = threadIdx.x & 31;
    const int column = 16 * (lane >> 3) + 2 * (lane & 3) - skip;
    const long long first = row_tile * v.n_col_tiles;
    TileData<QTYPE> w[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) few_tile<QTYPE>(v, first + from + i, lane, from + i < to, w[i]);
    for (int at = from; at < to; at += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            float in_four[4];
            few_columns(x, 64 * (at + i) + column, at + i < to ? in : 0, in_four);
#pragma unroll
            for (int k = 0; k < 4; k++) in_four[k] *= FEW_X;
            few_add<QTYPE>(w[i], few_x(in_four, lane), lane, acc);
            const int next = at + i + DEPTH;
            few_tile<QTYPE>(v, first + next, lane, next < to, w[i]);
        }
    }
}

// The four lanes of a row put together: acc[0] = row g, acc[1] = row g + 8 in each of them.
__device__ __forceinline__ void few_rows(float (&acc)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        acc[i] += __shfl_xor_sync(~0u, acc[i], 1);
        acc[i] += __shfl_xor_sync(~0u, acc[i], 2);
    }
}

// The same of several row tiles, into out[row tile][row].
template <int STREAMS>
__device__ __forceinline__ void few_rows(float (&acc)[STREAMS][2], float (*out)[16]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < STREAMS; i++) {
        few_rows(acc[i]);
        if ((lane & 3) == 0) out[i][lane >> 2] = acc[i][0], out[i][8 + (lane >> 2)] = acc[i][1];
    }
}

// silu(gate) * up
__device__ __forceinline__ float few_swiglu(float gate, float up) {
    return gate / (1.f + __expf(-gate)) * up;
}
