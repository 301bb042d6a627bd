// Products of few tokens with weights as GGUF stores them, on tensor cores: a CTA's loop over rows.
//
// A row tile (16 rows) is shared by some warps of a CTA, each of which takes every so-manieth span of 256
// columns, through a ring of stages of its own: rows' bytes come by cp.async, each row at its own address mod
// 16. Lane 4 g + t of a warp unpacks group t of four (32 columns each) of rows g and g + 8, and step s
// of eight products takes columns 4 s .. 4 s + 3 of all four groups, so that a lane's own bytes are its A
// fragment. Columns 2 t and 2 t + 1 of B hold group t's x as bfloat16 hi + lo, and zeros for the other
// groups: sums of a lane's own groups come back to it, where their scales are.
// Numbers enter as bit patterns, x times 2^64: see matvec.cuh. The codebook lies in shared memory.
// Numerics  x keeps 16 bits, weights are exact, sums float32: NMSE about 2e-11 to float64. |x| < 1e18.
// Sources   own. Tested by tests/kernels/test_raw.py, tests/gpu/test_cuda_raw.py
#pragma once
#define PADDED_ROWS  // words around a row may be read
#include "quant_tables.cuh"

template <int QTYPE> struct Codebook { static constexpr int size = 0; };
#define CODEBOOK_OF(QTYPE, TABLE, SIZE)                                          \
    template <> struct Codebook<QTYPE> {                                         \
        static constexpr int size = SIZE;                                        \
        __device__ static __forceinline__ unsigned at(int i) { return TABLE[i]; } \
    }
CODEBOOK_OF(QT_IQ2_XXS, grid_iq2xxs, 256);
CODEBOOK_OF(QT_IQ2_XS, grid_iq2xs, 512);
CODEBOOK_OF(QT_IQ2_S, grid_iq2s, 1024);
CODEBOOK_OF(QT_IQ3_XXS, grid_iq3xxs, 256);
CODEBOOK_OF(QT_IQ3_S, grid_iq3s, 512);
CODEBOOK_OF(QT_IQ1_S, grid_iq1, 2048);
CODEBOOK_OF(QT_IQ1_M, grid_iq1, 2048);
__shared__ unsigned staged_codebook[Codebook<WTYPE>::size ? Codebook<WTYPE>::size : 1];
#define CODEBOOK(table, i) staged_codebook[i]

#include "matvec.cuh"
#include "mma.cuh"
#include "quants.cuh"

constexpr int RAW_WARPS = N_WARPS, RAW_THREADS = 32 * RAW_WARPS;

template <int QTYPE>
struct RawSpan {  // 256 columns
    using Traits = QuantTraits<QTYPE>;
    static constexpr int groups = Traits::block / 32;  // of a block
    static constexpr int bytes = 256 / Traits::block * Traits::nbytes;
    static constexpr int bias = SignsApart<QTYPE>::yes ? 0 : Traits::bias;
    static constexpr bool sums = bias || Traits::has_min;  // needs sums of x
};

// ---------------------------------------------------------------- weights -------------------
// Eight numbers as pairs of bfloat16 patterns, their sizes in the bytes of lo and hi.
__device__ __forceinline__ void signed_pairs(unsigned lo, unsigned hi, unsigned signs, unsigned* a) {
    const unsigned both = (signs & 255) * 0x8001;  // number 2 i at bit 2 i, 2 i + 1 at 2 i + 16
    a[0] = __byte_perm(lo, 0, 0x4140) ^ (both << 15 & 0x80008000);
    a[1] = __byte_perm(lo, 0, 0x4342) ^ (both << 13 & 0x80008000);
    a[2] = __byte_perm(hi, 0, 0x4140) ^ (both << 11 & 0x80008000);
    a[3] = __byte_perm(hi, 0, 0x4342) ^ (both << 9 & 0x80008000);
}

// Group g of the block at b as 16 pairs of patterns: (number + bias) 2^-133, and its scales.
template <int QTYPE>
__device__ __forceinline__ void raw_pairs(
        const unsigned char* b, int g, unsigned (&a)[16], float (&d)[2], float (&m)[2]) {
    unsigned q[8];
    if constexpr (SignsApart<QTYPE>::yes) {
        unsigned signs;
        unpack_sizes<QTYPE>(b, g, q, signs, d);
#pragma unroll
        for (int k = 0; k < 4; k++) signed_pairs(q[2 * k], q[2 * k + 1], signs >> 8 * k, a + 4 * k);
    } else {
        unpack<QTYPE>(b, g, q, d, m);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            a[2 * k] = __byte_perm(q[k], 0, 0x4140);
            a[2 * k + 1] = __byte_perm(q[k], 0, 0x4342);
        }
    }
}

// ---------------------------------------------------------------- x -------------------------
// Staged x: per vector and 128 columns 32 pieces of 8 columns, piece 8 i + 4 part + t columns
// 32 t + 8 i on, part 0 hi and 1 lo; and 8 sums, of columns 32 t + 16 half on at 2 t + half.
struct RawX {
    uint4* pieces;
    float* sums;
    int n_chunks;  // of a vector

    // Vector v from `in` floats at x, packed columns before `skip` and after are 0. The whole CTA.
    __device__ __forceinline__ void put(int v, const float* x, int in, int skip, float factor = 1.f) {
        for (int u = threadIdx.x; u < 16 * n_chunks; u += RAW_THREADS) {
            const int chunk = u >> 4, t = u >> 2 & 3, i = u & 3, c = 8 * u - skip;
            unsigned hi[4], lo[4];
            float sum = 0.f;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int at = c + 2 * k;
                const float a = at >= 0 && at < in ? x[at] * factor * FEW_X : 0.f;
                const float b = at >= 0 && at + 1 < in ? x[at + 1] * factor * FEW_X : 0.f;
                hi[k] = few_bf16x2(a, b);
                const float ha = __uint_as_float(hi[k] << 16);
                const float hb = __uint_as_float(hi[k] & 0xFFFF0000);
                lo[k] = few_bf16x2(a - ha, b - hb);
                sum += (ha + __uint_as_float(lo[k] << 16)) +
                       (hb + __uint_as_float(lo[k] & 0xFFFF0000));
            }
            uint4* to = pieces + ((long long)v * n_chunks + chunk) * 32 + 8 * i + t;
            to[0] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
            to[4] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
            sum += __shfl_xor_sync(~0u, sum, 1);
            if (!(i & 1)) sums[(v * n_chunks + chunk) * 8 + 2 * t + (i >> 1)] = sum * FEW_ONE;
        }
    }
};

// acc[token][0 .. 1] += rows g and g + 8 times 128 columns of x; group `rest` of the blocks at lo and hi is
// this lane's of the rows, there or not. `vector` of x: the first token's.
template <int QTYPE, int TOKENS_>
__device__ __forceinline__ void raw_add(
        const unsigned char* lo, const unsigned char* hi, int rest, bool there, const RawX& x,
        int vector, int chunk, float (&acc)[TOKENS_][2]) {
    using Span = RawSpan<QTYPE>;
    const int lane = threadIdx.x & 31, t = lane & 3;
    const bool own = lane >> 3 == t;
    unsigned a[2][16];
    float d[2][2], m[2][2];
    raw_pairs<QTYPE>(lo, rest, a[0], d[0], m[0]);
    raw_pairs<QTYPE>(hi, rest, a[1], d[1], m[1]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float c[TOKENS_][4], e[TOKENS_][4];  // apart: one product needn't wait for the other
#pragma unroll
        for (int k = 0; k < TOKENS_; k++)
#pragma unroll
            for (int r = 0; r < 4; r++) c[k][r] = e[k][r] = 0.f;
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++)
#pragma unroll
            for (int k = 0; k < TOKENS_; k++) {
                uint4 b = make_uint4(0, 0, 0, 0);
                if (own)
                    b = x.pieces[((vector + k) * x.n_chunks + chunk) * 32 + 8 * i + (lane & 4) + t];
                const unsigned a0[4] = {a[0][4 * i], a[1][4 * i], a[0][4 * i + 1], a[1][4 * i + 1]};
                const unsigned a1[4] = {a[0][4 * i + 2], a[1][4 * i + 2], a[0][4 * i + 3],
                                        a[1][4 * i + 3]};
                const unsigned b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
                few_mma(c[k], a0, b0);
                few_mma(e[k], a1, b1);
            }
#pragma unroll
        for (int k = 0; k < TOKENS_; k++) {
            float sum = 0.f;
            if constexpr (Span::sums)
                sum = x.sums[((vector + k) * x.n_chunks + chunk) * 8 + 2 * t + half];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float v = ((c[k][2 * r] + e[k][2 * r]) + (c[k][2 * r + 1] + e[k][2 * r + 1])) * 0x1p69f;
                if constexpr (Span::bias != 0) v = __fmaf_rn(sum, -(float)Span::bias, v);
                v *= d[r][half];
                if constexpr (Span::Traits::has_min) v = __fmaf_rn(-m[r][half], sum, v);
                if (there) acc[k][r] += v;
            }
        }
    }
}

// ---------------------------------------------------------------- rows ----------------------
// What a CTA multiplies: `out` rows of `n_groups` groups; weights of all segments end at `end`. `share` warps
// have a row tile together; a row's span lies in `slot` bytes of a stage.
struct RawShape {
    int out, n_groups, share, slot;
    long long row_bytes;
    const unsigned char* end;
};

// Sixteen bytes into shared memory, of which `n` (1 to 16) are there.
__device__ __forceinline__ void raw_copy16(void* shared, const unsigned char* from, int n) {
#ifdef SIMT
    memset(shared, 0, 16);
    memcpy(shared, from, n);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(from), "r"(n) : "memory");
#endif
}

// Rows of `n_segments` weights (base(i): the first row) times x: segment i meets x's vector i, or with
// PARTS 2 both meet the same. store(row, token, sums [PARTS]) gets the sums over all segments, of
// PARTS 2 of the first and of the second. ready(): called once copies are under way; stages x.
template <int QTYPE, int TOKENS_, int PARTS, class Base, class Ready, class Store>
__device__ __forceinline__ void raw_rows(
        const RawShape& shape, const RawX& x, int n_segments, float* sums, unsigned char* ring,
        Base base, Ready ready, Store store) {
    using Span = RawSpan<QTYPE>;
    constexpr int n_pieces = (Span::bytes + 30) / 16;  // of a row's span, wherever it begins
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int own = warp % shape.share, team = warp / shape.share, n_teams = RAW_WARPS / shape.share;
    const int n_spans = (shape.n_groups + 7) / 8, n_tiles = (shape.out + 15) / 16;
    const int all_teams = n_teams * (int)gridDim.x;
    const int rounds = max(0, n_tiles - n_teams * (int)blockIdx.x + all_teams - 1) / all_teams;
    const int row_bytes = (int)shape.row_bytes;
    ring += warp * STAGES * 16 * shape.slot;
    for (int i = threadIdx.x; i < Codebook<QTYPE>::size; i += RAW_THREADS)
        if constexpr (Codebook<QTYPE>::size != 0) staged_codebook[i] = Codebook<QTYPE>::at(i);

    struct At { int round, segment, span; };
    auto settle = [&](At& at) {
        while (at.span >= n_spans && at.round < rounds) {
            at.span -= n_spans;
            if (++at.segment == n_segments) at.segment = 0, at.span = own, at.round++;
        }
    };
    auto first_row = [&](const At& at) {
        return 16 * ((at.round * (int)gridDim.x + (int)blockIdx.x) * n_teams + team);
    };
    auto start = [&](const At& at) {  // address of the first byte
        return base(at.segment) + (long long)first_row(at) * shape.row_bytes + at.span * Span::bytes;
    };
    auto copy = [&](const At& at, int stage) {  // two lanes a row
        if (at.round >= rounds) return;
        const int r = lane >> 1, side = 16 * (lane & 1);
        if (first_row(at) + r >= shape.out) return;
        const unsigned char* row = start(at) + (long long)r * row_bytes;
        const int before = (int)((unsigned long long)row & 15);
        const int nbytes = before + min(Span::bytes, row_bytes - at.span * Span::bytes);
        const int left = (int)min((long long)(shape.end - (row - before)), 65536LL);
        unsigned char* to = ring + (stage * 16 + r) * shape.slot + side;
#pragma unroll
        for (int p = 0; p < 16 * n_pieces; p += 32)
            if (p + side < nbytes)
                raw_copy16(to + p, row - before + side + p, min(16, left - p - side));
    };

    // A warp that no round has a span for (few experts may be here) sits all of them out.
    At ahead = {own < n_spans * n_segments ? 0 : rounds, 0, own};
    settle(ahead);
    At at = ahead;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        copy(ahead, i);
        cp_async_commit();
        ahead.span += shape.share;
        settle(ahead);
    }
    ready();
    __syncthreads();
    float acc[TOKENS_][2] = {}, first[TOKENS_][2] = {};
    int stage = 0, ahead_stage = STAGES - 1;
    for (int round = 0; round < rounds; round++) {
        bool second = false;
        while (at.round == round) {
            cp_async_wait<STAGES - 2>();
            __syncwarp();  // this stage is there, and the one before has been read
            copy(ahead, ahead_stage);
            cp_async_commit();
            ahead.span += shape.share;
            settle(ahead);
            if (PARTS == 2 && at.segment == 1 && !second) {
                second = true;
#pragma unroll
                for (int k = 0; k < TOKENS_; k++)
#pragma unroll
                    for (int r = 0; r < 2; r++) first[k][r] = acc[k][r], acc[k][r] = 0.f;
            }
            const unsigned low = (unsigned)(unsigned long long)start(at) + g * (unsigned)row_bytes;
            const unsigned char* rows = ring + (stage * 16 + g) * shape.slot;
            const unsigned char* lo = rows + (low & 15);
            const unsigned char* hi =
                rows + 8 * shape.slot + ((low + 8 * (unsigned)row_bytes) & 15);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int group = 4 * half + t;  // of its span
                const int block = group / Span::groups * Span::Traits::nbytes;
                raw_add<QTYPE, TOKENS_>(
                    lo + block, hi + block, group % Span::groups,
                    8 * at.span + group < shape.n_groups, x, PARTS == 2 ? 0 : at.segment,
                    2 * at.span + half, acc);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
            at.span += shape.share;
            settle(at);
        }
        if (PARTS == 2 && !second) {  // nothing of the second here
#pragma unroll
            for (int k = 0; k < TOKENS_; k++)
#pragma unroll
                for (int r = 0; r < 2; r++) first[k][r] = acc[k][r], acc[k][r] = 0.f;
        }
        // sums[round's parity][warp][part][token][row]
        float* to = sums + ((round & 1) * RAW_WARPS + warp) * PARTS * TOKENS_ * 16;
#pragma unroll
        for (int k = 0; k < TOKENS_; k++) {
            few_rows(acc[k]);
            if (PARTS == 2) few_rows(first[k]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (t == 0) to[((PARTS - 1) * TOKENS_ + k) * 16 + g + 8 * r] = acc[k][r];
                if (t == 0 && PARTS == 2) to[k * 16 + g + 8 * r] = first[k][r];
                acc[k][r] = first[k][r] = 0.f;
            }
        }
        if (shape.share > 1) __syncthreads();
        else __syncwarp();
        const int row0 = first_row({round, 0, 0});
        for (int u = 32 * own + lane; u < 16 * TOKENS_; u += 32 * shape.share) {
            float total[PARTS];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                total[part] = 0.f;
                for (int w = 0; w < shape.share; w++)
                    total[part] += sums[(((round & 1) * RAW_WARPS + team * shape.share + w) * PARTS + part) *
                                            TOKENS_ * 16 + u];
            }
            if (row0 + (u & 15) < shape.out) store(row0 + (u & 15), u >> 4, total);
        }
    }
}
