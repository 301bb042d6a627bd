// Op        repack_tiles: GGUF blocks of some row tiles of a weight -> tiles (tile_layout.cuh)
// Shapes    buffer: the weight [lead, rows, n_in] in tiles; raw [rows of the piece, row bytes]
// Dtypes    WTYPE, one of the types that have tiles
// Grid      (row tiles of the piece * ceil(n_col_tiles / 4)), 128 threads: a warp per tile
// Assumes   raw starts with the first row of row tile `first`, at a multiple of 16, its columns
//           `skip` before the weight's; the first word of the buffer is 0 at the first piece
// Numerics  exact: numbers and scales keep their bits; groups outside of the n_in columns, and
//           padding, get scale 0
// Bound by  bytes: each is read once and written once
// Sources   own
// Tested by tests/kernels/test_repack.py, tests/gpu/test_cuda_weights.py
// Variants  WTYPE=1; WTYPE=30; WTYPE=2; WTYPE=3; WTYPE=6; WTYPE=7; WTYPE=8; WTYPE=20; WTYPE=39;
//           WTYPE=12; WTYPE=13; WTYPE=14; WTYPE=23; WTYPE=10; WTYPE=11; WTYPE=16; WTYPE=17; WTYPE=18;
//           WTYPE=19; WTYPE=21; WTYPE=22; WTYPE=29
// Spills    none
#include "pdl.cuh"
#include "quants.cuh"
#include "reduce.cuh"
#include "tile_layout.cuh"

template <int QTYPE> struct Stored { typedef unsigned char Number; };
template <> struct Stored<QT_F16> { typedef unsigned short Number; };
template <> struct Stored<QT_BF16> { typedef unsigned short Number; };

// Largest |number - zero|, or map value.
template <int QTYPE>
FORCE_INLINE float largest_number() {
    using T = Tile<QTYPE>;
    if (QTYPE == QT_IQ3_XXS) return 62.f;
    if (QTYPE == QT_IQ3_S) return 15.f;
    if (QTYPE == QT_IQ1_S || QTYPE == QT_IQ1_M) return 9.f;  // eighths
    if (T::kind == TILE_MAP8) return 43.f;
    if (QTYPE == QT_Q2_K) return 3.f;
    if (T::kind == TILE_MAP_SIGNED) return 127.f;
    if (QTYPE == QT_MXFP4) return 12.f;
    if (QTYPE == QT_Q8_0) return 128.f;
    return T::zero ? (float)T::zero : T::h_bytes ? 31.f : 15.f;
}

// Scales' codes of a group of IQ1 to IQ3 as the planes have them: 1 + 2 code, of both halves.
template <int QTYPE>
FORCE_INLINE unsigned odd_scales(const unsigned char* b, int g) {
    unsigned first, last;
    if constexpr (QTYPE == QT_IQ2_XXS) {
        first = last = load32<2>(b + 6 + 8 * g) >> 28;
    } else if constexpr (QTYPE == QT_IQ3_XXS) {
        first = last = load32<2>(b + 66 + 4 * g) >> 28;
    } else if constexpr (QTYPE == QT_IQ3_S) {
        first = last = b[106 + (g >> 1)] >> 4 * (g & 1) & 15;
    } else if constexpr (QTYPE == QT_IQ1_S) {
        first = last = load16(b + 34 + 2 * g) >> 12 & 7;
    } else if constexpr (QTYPE == QT_IQ1_M) {
        const unsigned s = load16(b + 48 + (g >> 1 << 1)) >> 6 * (g & 1);
        first = s & 7, last = s >> 3 & 7;
    } else {
        const unsigned s = b[(QTYPE == QT_IQ2_XS ? 66 : 74) + g];
        first = s & 15, last = s >> 4;
    }
    return (1 + 2 * first) | (1 + 2 * last) << 8;
}

// A block's d as the plane has it, and where that is its bytes alone, dmin.
template <int QTYPE>
FORCE_INLINE unsigned block_scale(const unsigned char* b) {
    if constexpr (Tile<QTYPE>::d_words == 2) return load32<4>(b + (QTYPE == QT_Q2_K ? 80 : 0));
    if constexpr (QTYPE == QT_IQ1_M)  // a nibble each on top of four words
        return (load16(b + 48) >> 12) | (load16(b + 50) >> 12) << 4 | (load16(b + 52) >> 12) << 8 |
               (load16(b + 54) >> 12) << 12;
    return load16(b + (QTYPE == QT_Q6_K ? 208 : QTYPE == QT_Q3_K ? 108 : 0));
}

// Group g (32 columns) of the block at b: numbers as stored, and what the planes s and m keep.
// bound: raised to what no finite |value| of the group exceeds.
template <int QTYPE>
FORCE_INLINE void take_group(
        const unsigned char* b, int g, unsigned (&q)[8], unsigned& s, unsigned& m, float& bound) {
    using T = Tile<QTYPE>;
    float scale[2], minimum[2] = {0.f, 0.f};
    unsigned signs = 0;
    if constexpr (SignsApart<QTYPE>::yes)
        unpack_sizes<QTYPE>(b, g, q, signs, scale);
    else
        unpack<QTYPE>(b, g, q, scale, minimum);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const float most =
            __fmaf_rn(fabsf(scale[k]), largest_number<QTYPE>(), fabsf(minimum[k]));
        if (most < __uint_as_float(0x7F800000) && most > bound) bound = most;
    }
    if constexpr (QTYPE == QT_Q8_0) {
#pragma unroll
        for (int k = 0; k < 8; k++) q[k] ^= 0x80808080;  // two's complement again
        s = load16(b);
    } else if constexpr (QTYPE == QT_MXFP4) {
        load_nibbles<1>(b + 1, q);
        s = b[0] < 2 ? 0x20u << b[0] : (b[0] - 1u) << 7;  // bfloat16 of 2^(e - 128)
    } else if constexpr (QTYPE == QT_IQ4_XS) {
        load_nibbles<8>(b + 8 + 16 * g, q);
        const unsigned low = b[4 + g / 2] >> 4 * (g & 1) & 15, high = load16(b + 2) >> 2 * g & 3;
        s = ((low | high << 4) - 32) & 255;
    } else if constexpr (QTYPE == QT_Q6_K) {
        s = load16(b + 192 + 2 * g);
    } else if constexpr (QTYPE == QT_Q2_K) {
        s = load16(b + 2 * g);
    } else if constexpr (QTYPE == QT_Q3_K) {  // as unpack() has them
        const int at = 2 * g;
        const unsigned low = load16(b + 96 + (at & 7)) >> 4 * (at >> 3) & 0x0F0F;
        const unsigned high = load16(b + 104 + (at & 3)) >> 2 * (at >> 2) & 0x0303;
        const unsigned codes = low | high << 4;
        s = ((codes & 255) - 32 & 255) | ((codes >> 8) - 32 & 255) << 8;
    } else if constexpr (SignsApart<QTYPE>::yes) {  // places in a map: of the size, and its sign
        constexpr int shift = QTYPE == QT_IQ3_S ? 1 : QTYPE == QT_IQ3_XXS ? 3 : 4;
#pragma unroll
        for (int k = 0; k < 8; k++)
            q[k] = (q[k] >> shift & 0x07070707) | spread4(signs >> 4 * k) << (shift == 4 ? 2 : 3);
        s = odd_scales<QTYPE>(b, g) & (T::thin ? 0xFFFF : 0xFF);
    } else if constexpr (QTYPE == QT_IQ1_S || QTYPE == QT_IQ1_M) {  // 7, 15, 23 or 9, 17, 25
        const bool m_type = QTYPE == QT_IQ1_M;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const unsigned minus = q[k] >> 1 & 0x01010101, plus = 0x01010101 - minus;
            q[k] = (q[k] >> 3 & 0x03030303) - plus;
            if (m_type) q[k] = 4 * q[k] + plus;
        }
        s = odd_scales<QTYPE>(b, g);
        if (!m_type) s |= load16(b + 34 + 2 * g) >> 15 ? 0x9090 : 0x7070;
    } else if constexpr (T::d_words == 2) {  // Q4_K, Q5_K: see k_scales() of quants.cuh
        const unsigned a = b[4 + (g & 3)], c = b[8 + (g & 3)], e = b[12 + (g & 3)];
        s = g < 4 ? a & 63 : (e & 15) | (a >> 2 & 48);
        s |= (g < 4 ? c & 63 : e >> 4 | (c >> 2 & 48)) << 16;
    } else {
        if constexpr (QTYPE == QT_IQ4_NL) load_nibbles<2>(b + 2, q);
        s = load16(b);
        if constexpr (T::m_bytes != 0) m = load16(b + 2);
    }
}

// The planes q and h of a tile whose numbers lie in shared memory.
template <int QTYPE, class Number>
FORCE_INLINE void write_numbers(
        unsigned char* q, unsigned char* h, const Number (*tile)[TILE_COLS + 4], int lane) {
    using T = Tile<QTYPE>;
    unsigned words[T::q_words] = {}, high[2] = {};
#pragma unroll
    for (int j = 0; j < TILE_STEPS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = (lane >> 2) + 8 * (i & 1);
            const Number* p = tile[row] + 16 * j + 2 * (lane & 3) + 8 * (i >> 1);
            const unsigned x = p[0] | (unsigned)p[1] << 16;
            if constexpr (T::q_bytes == 2048) words[4 * j + i] = x;
            if constexpr (T::q_bytes == 1024) words[2 * j + (i >> 1)] |= x << 8 * (i & 1);
            if constexpr (T::q_bytes == 512) words[j] |= (x & 0x000F000F) << 4 * i;
            if constexpr (T::kind == TILE_MAP8) {
                const unsigned two = (x | x >> 8) & 0xFFFF;  // halves in neighbouring bytes
                words[j >> 1] |= (two & 0x0303) << (16 * (i & 1) + 4 * (i >> 1) + 2 * (j & 1));
                high[0] |= (two >> 2 & 0x0101) << (16 * (i & 1) + 4 * (i >> 1) + j);
            } else if constexpr (T::doubled) {
                words[j >> 1] |= (x >> 2 & 0x00030003) << (4 * i + 2 * (j & 1));
                high[0] |= (x & 0x00010001) << (4 * i + j);
            } else if constexpr (T::thin) {
                words[j >> 1] |= (x & 0x00030003) << (4 * i + 2 * (j & 1));
                high[0] |= (x >> 2 & 0x00010001) << (4 * i + j);
            }
            if constexpr (T::over_words == 1) high[0] |= (x >> 4 & 0x00010001) << (4 * j + i);
            if constexpr (T::over_words == 2)
                high[j >> 1] |= (x >> 4 & 0x00030003) << (8 * (j & 1) + 2 * i);
        }
#pragma unroll
    for (int u = 0; u < T::q_words / 4; u++) {
        uint4 piece;
        piece.x = words[4 * u], piece.y = words[4 * u + 1];
        piece.z = words[4 * u + 2], piece.w = words[4 * u + 3];
        *(uint4*)(q + 512 * u + 16 * lane) = piece;
    }
    if constexpr (T::thin) *(uint2*)(q + 8 * lane) = make_uint2(words[0], words[1]);
#pragma unroll
    for (int u = 0; u < T::h_words; u++)
        *(piece32*)(h + 4 * T::h_words * lane + 4 * u) = high[u];
}

// Values of a 16-bit type: columns c .. c + 31 of a row of n_in.
template <int QTYPE>
FORCE_INLINE void take_values(
        const unsigned char* row, int c, int n_in, unsigned short* numbers, float& bound) {
    for (int k = 0; k < 32; k++) {
        const unsigned bits = c + k < n_in ? load16(row + 2 * (c + k)) : 0;
        const float size = fabsf(QTYPE == QT_F16 ? half_bits_to_float(bits)
                                                 : bf16_bits_to_float(bits));
        numbers[k] = (unsigned short)bits;
        if (size < __uint_as_float(0x7F800000) && size > bound) bound = size;
    }
}

template <int QTYPE>
FORCE_INLINE void repack(
        unsigned char* buffer, const unsigned char* raw, int first, int rows, int n_row_tiles,
        int n_in, int skip, int n_col_tiles, int row_bytes, int piece) {
    using T = Tile<QTYPE>;
    using Number = typename Stored<QTYPE>::Number;
    __align__(16) __shared__ Number numbers[4][TILE_ROWS][TILE_COLS + 4];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, r = lane & 15;
    const int col_blocks = (n_col_tiles + 3) >> 2, per_lead = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int row_tile = first + piece / col_blocks, col_tile = piece % col_blocks * 4 + warp;
    const int row = row_tile % per_lead * TILE_ROWS + r;  // of its leading index
    const long long first_row =
        (long long)(first / per_lead) * rows + first % per_lead * TILE_ROWS;
    const unsigned char* in =
        raw + ((long long)(row_tile / per_lead) * rows + row - first_row) * row_bytes;
    if (col_tile >= n_col_tiles) return;  // the whole warp

    const int c = TILE_COLS * col_tile + 32 * (lane >> 4);  // of the packed columns
    Number* mine = numbers[warp][r] + 32 * (lane >> 4);
    unsigned s = 0, m = 0;
    float bound = 0.f;
    if constexpr (T::q_bytes == 2048) {
        take_values<QTYPE>(in, c, row < rows ? n_in : 0, mine, bound);
    } else {
        constexpr int block = QuantTraits<QTYPE>::block, nbytes = QuantTraits<QTYPE>::nbytes;
        unsigned q[8] = {};
        if (row < rows && c / block * nbytes < row_bytes) {
            float size = 0.f;
            take_group<QTYPE>(in + c / block * nbytes, c % block / 32, q, s, m, size);
            if (c >= skip && c < skip + n_in)
                bound = size;
            else
                s = 0, m = 0;  // of another rank
        }
#pragma unroll
        for (int k = 0; k < 8; k++) ((piece32*)mine)[k] = q[k];
    }
    __syncwarp();

    const TileView<QTYPE> view = tile_view<QTYPE>(buffer, n_row_tiles, n_col_tiles);
    const long long tile = (long long)row_tile * n_col_tiles + col_tile;
    auto at = [&](const unsigned char* plane, long long offset) {
        return buffer + (plane - buffer) + offset;
    };
    write_numbers<QTYPE>(at(view.q, tile * T::q_bytes), at(view.h, tile * T::h_bytes),
                         numbers[warp], lane);
    // The second group's scale goes beside the first's.
    constexpr int shift = T::d_words == 0 || T::group == 16 ? 16 : 8;
    s |= __shfl_xor_sync(~0u, s, 16) << shift;
    m |= __shfl_xor_sync(~0u, m, 16) << shift;
    const int word = 2 * (r & 7) + (r >> 3);
    if (lane < 16) {
        if constexpr (T::s_bytes != 0) *(piece32*)at(view.s, tile * T::s_bytes + 4 * word) = s;
        if constexpr (T::m_bytes != 0) *(piece32*)at(view.m, tile * T::m_bytes + 4 * word) = m;
        if constexpr (T::d_words != 0) {
            const long long block = (long long)row_tile * (n_col_tiles >> 2) + (col_tile >> 2);
            const unsigned char* b = in + (col_tile >> 2) * QuantTraits<QTYPE>::nbytes;
            if (warp == 0 && T::d_words == 2)
                *(piece32*)at(view.d, block * 64 + 4 * word) = row < rows ? block_scale<QTYPE>(b) : 0;
            if (warp == 0 && T::d_words == 1)
                *(piece16*)at(view.d, block * 32 + 2 * word) =
                    row < rows ? block_scale<QTYPE>(b) : 0;
        }
    }
    bound = warp_max(bound);
    if (lane == 0) atomicMax((unsigned*)buffer, __float_as_uint(bound));  // of positive floats
}

extern "C" __global__ void __launch_bounds__(128)
repack_tiles(unsigned char* buffer, const unsigned char* raw, int first, int rows, int n_row_tiles,
             int n_in, int skip, int n_col_tiles, int row_bytes) {
    pdl_launch();
    pdl_wait();
    repack<WTYPE>(buffer, raw, first, rows, n_row_tiles, n_in, skip, n_col_tiles, row_bytes,
                  blockIdx.x);
}
