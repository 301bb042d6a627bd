// Weights in tiles of 16 rows x 64 columns: where each plane lies, and a lane's loads.
//
// A repacked weight is one buffer: TILE_HEADER bytes (word 0: bits of a float32 that no finite
// |value| exceeds), then the planes q, h, s, m, d, each from a multiple of 256 bytes on. q, h, s, m
// hold [row tile][column tile][bytes of a tile], d holds [row tile][256 columns][bytes]. Leading
// axes (heads, experts) are outermost: row tile = lead * ceil(rows / 16) + row / 16. Columns are
// padded to Tile::edge; column c of x meets packed column c + skip. Padding and columns of other
// ranks have scale and minimum (16-bit types: value) 0.
//
// Lane 4 g + t of a warp holds for step j = 0..3 (16 columns each) the A fragment of mma.m16n8k16
// (also of wgmma m64k16 with A from registers): R0 = row g, columns 16 j + 2 t and + 1, the first
// in the low half; R1 = row g + 8, the same columns; R2 and R3 = 8 columns further.
//   q, 4 bits    16 bytes at 16 lane: word j; Ri's halves at bits 4 i and 16 + 4 i
//   q, 2 bits    8 bytes at 8 lane: word j / 2; from bit 2 (j % 2) of each nibble on. Nibbles as of
//                4 bits; IQ2: R0 and R2 low half, R0 and R2 high half, then R1 and R3
//   h, 3rd bit   of these: word at 4 lane: bit j of each nibble. IQ1_M: bit 0 of four, q bits 2 and 3
//   h, 5th bit   word at 4 lane: bits 4 j + i and 16 + 4 j + i
//   h, bits 5-6  8 bytes at 8 lane: word j / 2; from bits 8 (j % 2) + 2 i and 16 + that on
//   q, 8 bits    16 bytes at 512 u + 16 lane for steps 2 u, 2 u + 1: two words a step, of R0 and
//                R1, of R2 and R3; bytes Ra low half, Rb low half, Ra high half, Rb high half
//   q, 16 bits   16 bytes at 512 j + 16 lane: R0..R3
//   s, m         8 bytes at 8 g: word of row g, word of row g + 8. Block-32 types: group 0, group 1
//                as float16 (MXFP4: bfloat16 of half its scale). Q4_K, Q5_K: bytes scale 0,
//                scale 1, minimum 0, minimum 1. Q6_K, Q3_K, IQ1_M, IQ2: four int8 scales. IQ4_XS, IQ3:
//                int8 scale 0, scale 1, then 0, 0. Q2_K: four bytes scale + 16 minimum. IQ1 to IQ3:
//                1 + 2 * the scale's code. IQ1_S: as Q2_K, the minimum in eighths of the scale: 7 or 9
//   d, float16   Q2_K, Q4_K, Q5_K: 8 bytes at 8 g: d, dmin of row g, then of row g + 8;
//                others: word at 4 g: d of row g, of row g + 8
// Numbers of IQ2 and IQ3 are places in a map of their values (NumberMap in tiles.cuh). IQ1_S: the
// codebook's -1, 0, 1, + 1; IQ1_M: four times that, + 1 where delta is not negative.
// Sources: fragment layouts from the PTX manual; code own. Tested by: tests/kernels/test_tiles.py.
#pragma once
#include "types.cuh"

constexpr int TILE_ROWS = 16, TILE_COLS = 64, TILE_STEPS = 4;
constexpr int TILE_HEADER = 256;

// ---------------------------------------------------------------- what a type's tiles are ---
enum TileKind : int {
    TILE_SMALL,  // numbers of at most 7 bits
    TILE_SIGNED,  // int8
    TILE_MAP_SMALL, TILE_MAP_SIGNED,  // nibbles into a map of such
    TILE_MAP8,  // three bits into one of int8
    TILE_HALF, TILE_BF16
};

template <int KIND, int Q, int H, int ZERO, int M, int D, int EDGE, int GROUP = 32>
struct TileLayout {
    static constexpr int kind = KIND;
    static constexpr bool has_scale = Q != 2048;
    static constexpr int q_bytes = Q, h_bytes = H, s_bytes = has_scale ? 64 : 0, m_bytes = M;
    static constexpr int d_bytes = D;     // of 256 columns; the others of a tile
    static constexpr int zero = ZERO;     // subtracted from the stored numbers
    static constexpr int edge = EDGE;     // columns are padded to a multiple of it
    static constexpr int group = GROUP;   // columns that share scale and minimum
    static constexpr int groups = TILE_COLS / GROUP, steps = GROUP / 16;  // in a tile; in a group
    static constexpr bool has_min = M != 0 || D == 64;
    static constexpr bool has_boost = KIND != TILE_HALF;
    static constexpr bool has_low = KIND == TILE_HALF;  // exact_low() gives a second term
    static constexpr int q_words = Q / 128, h_words = H / 128, d_words = D / 32;  // a lane's
    static constexpr bool thin = Q == 256;  // numbers of two or three bits: nibbles() puts them together
    static constexpr int over_words = thin ? 0 : h_words;  // bits above the nibbles
    static constexpr bool doubled = false;  // values are of twice the stored numbers
    // biased_fragment() gives R + offset; 0 where that saves nothing.
    static constexpr int offset = KIND == TILE_SMALL || KIND == TILE_MAP_SMALL ? 128 + ZERO : 0;
};
template <int QTYPE> struct Tile;
//                                               kind, q, h, zero, m, d, edge, group
template <> struct Tile<QT_F16> : TileLayout<TILE_HALF, 2048, 0, 0, 0, 0, 64> {};
template <> struct Tile<QT_BF16> : TileLayout<TILE_BF16, 2048, 0, 0, 0, 0, 64> {};
template <> struct Tile<QT_Q4_0> : TileLayout<TILE_SMALL, 512, 0, 8, 0, 0, 64> {};
template <> struct Tile<QT_Q4_1> : TileLayout<TILE_SMALL, 512, 0, 0, 64, 0, 64> {};
template <> struct Tile<QT_Q5_0> : TileLayout<TILE_SMALL, 512, 128, 16, 0, 0, 64> {};
template <> struct Tile<QT_Q5_1> : TileLayout<TILE_SMALL, 512, 128, 0, 64, 0, 64> {};
template <> struct Tile<QT_Q8_0> : TileLayout<TILE_SIGNED, 1024, 0, 0, 0, 0, 64> {};
template <> struct Tile<QT_IQ4_NL> : TileLayout<TILE_MAP_SIGNED, 512, 0, 0, 0, 0, 64> {};
template <> struct Tile<QT_MXFP4> : TileLayout<TILE_MAP_SMALL, 512, 0, 12, 0, 0, 64> {};
template <> struct Tile<QT_Q4_K> : TileLayout<TILE_SMALL, 512, 0, 0, 0, 64, 256> {};
template <> struct Tile<QT_Q5_K> : TileLayout<TILE_SMALL, 512, 128, 0, 0, 64, 256> {};
template <> struct Tile<QT_Q6_K> : TileLayout<TILE_SMALL, 512, 256, 32, 0, 32, 256, 16> {};
template <> struct Tile<QT_IQ4_XS> : TileLayout<TILE_MAP_SIGNED, 512, 0, 0, 0, 32, 256> {};
template <> struct Tile<QT_Q2_K> : TileLayout<TILE_SMALL, 256, 0, 0, 0, 64, 256, 16> {};
template <> struct Tile<QT_Q3_K> : TileLayout<TILE_SMALL, 256, 128, 4, 0, 32, 256, 16> {};
template <> struct Tile<QT_IQ3_XXS> : TileLayout<TILE_MAP_SIGNED, 512, 0, 0, 0, 32, 256> {};
template <> struct Tile<QT_IQ3_S> : TileLayout<TILE_MAP_SIGNED, 512, 0, 0, 0, 32, 256> {};
template <> struct Tile<QT_IQ2_XXS> : TileLayout<TILE_MAP8, 256, 128, 0, 0, 32, 256, 16> {};
template <> struct Tile<QT_IQ2_XS> : TileLayout<TILE_MAP8, 256, 128, 0, 0, 32, 256, 16> {};
template <> struct Tile<QT_IQ2_S> : TileLayout<TILE_MAP8, 256, 128, 0, 0, 32, 256, 16> {};
template <> struct Tile<QT_IQ1_S> : TileLayout<TILE_SMALL, 256, 0, 0, 0, 32, 256, 16> {
    static constexpr bool has_min = true;
};
template <> struct Tile<QT_IQ1_M> : TileLayout<TILE_SMALL, 256, 128, 9, 0, 32, 256, 16> {
    static constexpr bool doubled = true;
};

// Values = d * scale's int8 * SCALE_UNIT * number (or map's value).
template <int QTYPE>
constexpr float SCALE_UNIT = QTYPE == QT_IQ1_M || QTYPE == QT_IQ2_XXS || QTYPE == QT_IQ2_XS ||
                                     QTYPE == QT_IQ2_S
                                 ? 0.125f
                                 : QTYPE == QT_IQ3_XXS ? 0.25f : 1.f;
template <int QTYPE>
constexpr bool ODD_SCALES = SCALE_UNIT<QTYPE> != 1.f || QTYPE == QT_IQ3_S;  // 1 + 2 code

// ---------------------------------------------------------------- planes --------------------
// The planes of a weight. q (h, s, m) of a tile starts at (row_tile * n_col_tiles + col_tile) *
// q_bytes, d of 256 columns at (row_tile * (n_col_tiles / 4) + col_tile / 4) * d_bytes.
template <int QTYPE>
struct TileView {
    const unsigned char *q, *h, *s, *m, *d;
    int n_col_tiles;
};

FORCE_INLINE long long tile_aligned(long long nbytes) { return (nbytes + 255) / 256 * 256; }

// n_row_tiles counts all leading axes.
template <int QTYPE>
FORCE_INLINE TileView<QTYPE> tile_view(
        const unsigned char* buffer, long long n_row_tiles, int n_col_tiles) {
    using T = Tile<QTYPE>;
    const long long n = n_row_tiles * n_col_tiles;
    TileView<QTYPE> v;
    v.q = buffer + TILE_HEADER;
    v.h = v.q + tile_aligned(n * T::q_bytes);
    v.s = v.h + tile_aligned(n * T::h_bytes);
    v.m = v.s + tile_aligned(n * T::s_bytes);
    v.d = v.m + tile_aligned(n * T::m_bytes);
    v.n_col_tiles = n_col_tiles;
    return v;
}

// Exponent field of boost, from the header's bound. Both boost and 1 / boost are normal float32.
FORCE_INLINE unsigned tile_boost_exponent(const unsigned char* buffer) {
    const int e = 267 - (int)(*(const piece32*)buffer >> 23 & 255);
    return e < 14 ? 14 : e > 240 ? 240 : e;
}
template <int QTYPE>
FORCE_INLINE float tile_boost(const unsigned char* buffer) {
    return Tile<QTYPE>::has_boost ? __uint_as_float(tile_boost_exponent(buffer) << 23) : 1.0f;
}
template <int QTYPE>
FORCE_INLINE float tile_unboost(const unsigned char* buffer) {  // 1 / boost
    if (!Tile<QTYPE>::has_boost) return 1.0f;
    return __uint_as_float((254 - tile_boost_exponent(buffer)) << 23);
}

// ---------------------------------------------------------------- loads ---------------------
// N = 1, 2 or 4 words from p. STREAM: global memory that nothing writes any more and that this
// launch reads once; otherwise any memory, shared too.
template <bool STREAM, int N>
FORCE_INLINE void tile_words(const unsigned char* p, unsigned* w) {
#ifdef __CUDA_ARCH__
    if constexpr (STREAM && N == 4) {
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
        return;
    }
    if constexpr (STREAM && N == 2) {
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
        return;
    }
    if constexpr (STREAM && N == 1) {
        asm("ld.global.nc.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
        return;
    }
#endif
    if constexpr (N == 4) {
        const uint4 x = *(const uint4*)p;
        w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    } else if constexpr (N == 2) {
        const uint2 x = *(const uint2*)p;
        w[0] = x.x, w[1] = x.y;
    } else {
        w[0] = *(const piece32*)p;
    }
}

// A lane's part of a tile, as loaded. [2]: row g, row g + 8.
template <int QTYPE>
struct TileData {
    unsigned q[Tile<QTYPE>::q_words];
    unsigned h[2];  // what a type doesn't use takes no register
    unsigned s[2], m[2], d[2];
};

// The numbers. q, h: this tile's bytes in the planes, or copies of them in shared memory.
template <int QTYPE, bool STREAM>
FORCE_INLINE void load_numbers(
        const unsigned char* q, const unsigned char* h, int lane, TileData<QTYPE>& w) {
    using T = Tile<QTYPE>;
#pragma unroll
    for (int u = 0; u < T::q_words / 4; ++u)
        tile_words<STREAM, 4>(q + 512 * u + 16 * lane, w.q + 4 * u);
    if constexpr (T::thin) tile_words<STREAM, 2>(q + 8 * lane, w.q);
    if constexpr (T::h_words) tile_words<STREAM, T::h_words>(h + 4 * T::h_words * lane, w.h);
}

// The scales (and minima) of the tile; s, m: its bytes.
template <int QTYPE, bool STREAM>
FORCE_INLINE void load_scales(
        const unsigned char* s, const unsigned char* m, int lane, TileData<QTYPE>& w) {
    using T = Tile<QTYPE>;
    if constexpr (T::s_bytes) tile_words<STREAM, 2>(s + 8 * (lane >> 2), w.s);
    if constexpr (T::m_bytes) tile_words<STREAM, 2>(m + 8 * (lane >> 2), w.m);
}

// The scales that the four tiles of 256 columns share; d: their bytes.
template <int QTYPE, bool STREAM>
FORCE_INLINE void load_block_scales(const unsigned char* d, int lane, TileData<QTYPE>& w) {
    constexpr int n = Tile<QTYPE>::d_words;
    if constexpr (n) tile_words<STREAM, n>(d + 4 * n * (lane >> 2), w.d);
}

// All of a tile, from global memory. With the d of a tile before it in the same 256 columns
// already in w, pass with_d = false.
template <int QTYPE>
FORCE_INLINE void load_tile(
        const TileView<QTYPE>& v, long long row_tile, int col_tile, int lane, TileData<QTYPE>& w,
        bool with_d = true) {
    using T = Tile<QTYPE>;
    const long long at = row_tile * v.n_col_tiles + col_tile;
    load_numbers<QTYPE, true>(v.q + at * T::q_bytes, v.h + at * T::h_bytes, lane, w);
    load_scales<QTYPE, true>(v.s + at * T::s_bytes, v.m + at * T::m_bytes, lane, w);
    if (T::d_words && with_d) {
        const long long block = row_tile * (v.n_col_tiles >> 2) + (col_tile >> 2);
        load_block_scales<QTYPE, true>(v.d + block * T::d_bytes, lane, w);
    }
}
