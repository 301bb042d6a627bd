// Op        products: y_i[t][o] = s_t sum_c w_i[o][c] x[t][c] norm[c] for up to three weights i of one
//           x, s_t = 1 / sqrt(mean of x[t]^2 + eps); WITH_NORM=0: s and norm are 1. WITH_ADD: y_0 += it
//           gated: h[t][o] = silu(gate[o] . x[t]) * (up[o] . x[t]), x normed the same way
// Shapes    y_i [n, rows_i], h [n, rows], x [n, in], norm [in]; w_i in tiles (tiles.cuh) of N_COL_TILES
//           column tiles, n <= 8
// Dtypes    w_i of type WTYPEi (-1: absent), gate WTYPE0, up WTYPE1; x, norm, y, h, sums float32
// Grid      products (sum of ceil(rows_i / (16 N_ROW_TILES))), gated (ceil(rows / 16)); 32 N_WARPS
//           threads, N_CTAS on an SM at least, no dynamic shared memory. N_BLOCKS 0: one token; 1, 2: up
//           to 4, 8. N_AHEAD: tiles under way to a warp, per row tile
// Assumes   x, ldx and `in` even; with WITH_NORM skip 0. AT_EDGE 0: skip is 0 and `in` 64 N_COL_TILES
// Numerics  matvec.cuh; warps and steps in a fixed order. NMSE to float64 <= 1e-9
// Bound by  bytes of w; below about 4 MB by latency
// Variants  N_ROW_TILES=1 N_WARPS=8 N_CTAS=2 N_AHEAD=4 N_BLOCKS=0 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1
//           WITH_ADD=0 WTYPE0=12 WTYPE1=8 WTYPE2=7; N_ROW_TILES=2 N_WARPS=4 N_CTAS=2 N_AHEAD=2 N_BLOCKS=0
//           N_COL_TILES=22 AT_EDGE=1 WITH_NORM=0 WITH_ADD=1 WTYPE0=6 WTYPE1=-1 WTYPE2=-1; N_ROW_TILES=1
//           N_WARPS=8 N_CTAS=1 N_AHEAD=4 N_BLOCKS=2 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1 WITH_ADD=0
//           WTYPE0=14 WTYPE1=-1 WTYPE2=-1; GATED=1 N_WARPS=8 N_CTAS=1 N_AHEAD=2 N_BLOCKS=0 N_COL_TILES=32
//           AT_EDGE=0 WITH_NORM=1 WTYPE0=12 WTYPE1=13; GATED=1 N_WARPS=8 N_CTAS=1 N_AHEAD=2 N_BLOCKS=1
//           N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1 WTYPE0=23 WTYPE1=1
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_cta.cuh"
#include "matvec_one.cuh"

constexpr int TOKENS = N_BLOCKS ? 4 * N_BLOCKS : 1;
using Share = OneShare<N_COL_TILES, N_WARPS, N_AHEAD>;

// ---------------------------------------------------------------- device helpers ------------
// One token's product of a CTA: `streams` share x; the warps' sums are in `sums` after a barrier.
template <class SHARE, int... Q>
__device__ __forceinline__ void one_cta(
        FewSums<N_WARPS, sizeof...(Q), TOKENS>& sums, OneStreams<SHARE, Q...>& streams,
        const FewIn& in) {
    const int warp = threadIdx.x >> 5;
    float acc[sizeof...(Q)][2], squares = 0.f;
#pragma unroll
    for (int r = 0; r < sizeof...(Q); r++) acc[r][0] = acc[r][1] = 0.f;
    one_warp<WITH_NORM, AT_EDGE>(streams, warp, in.x, in.norm, in.in, in.skip, acc, squares);
    few_store(sums, acc);
    if constexpr (WITH_NORM) {
        squares = warp_sum(squares) * 0.5f;  // two lanes hold each value: for hi and for lo
        if ((threadIdx.x & 31) == 0) sums.squares[warp][0] = squares;
    }
}

#ifdef N_ROW_TILES
// Neighbouring row tiles from row_tile on; those past the end read the last one.
template <int DEPTH, int Q, int... REST>
__device__ __forceinline__ void neighbours(
        FewTiles<DEPTH, Q, REST...>& tiles, const TileView<Q>& view, int row_tile, int last) {
    tiles.view = view;
    tiles.first = (long long)min(row_tile, last) * N_COL_TILES;
    if constexpr (sizeof...(REST) > 0) {
        FewTiles<DEPTH, REST...>& others = tiles;
        neighbours(others, view, row_tile + 1, last);
    }
}
template <class SHARE, int Q, int... REST>
__device__ __forceinline__ void neighbours(
        OneStreams<SHARE, Q, REST...>& tiles, const TileView<Q>& view, int row_tile, int last) {
    tiles.start(view, (long long)min(row_tile, last) * N_COL_TILES, SHARE::from(threadIdx.x >> 5),
                threadIdx.x & 31);
    if constexpr (sizeof...(REST) > 0) {
        OneStreams<SHARE, REST...>& others = tiles;
        neighbours(others, view, row_tile + 1, last);
    }
}
template <int Q, int COUNT> struct Same;
template <int Q> struct Same<Q, 1> {
    using one = OneStreams<Share, Q>;
    using few = FewTiles<N_AHEAD, Q>;
};
template <int Q> struct Same<Q, 2> {
    using one = OneStreams<Share, Q, Q>;
    using few = FewTiles<N_AHEAD, Q, Q>;
};
template <int Q> struct Same<Q, 4> {
    using one = OneStreams<Share, Q, Q, Q, Q>;
    using few = FewTiles<N_AHEAD, Q, Q, Q, Q>;
};

template <int Q>
__device__ __forceinline__ void segment(
        FewSums<N_WARPS, N_ROW_TILES, TOKENS>& sums, float* y, long long ldy,
        const unsigned char* w, int rows, const FewIn& in, int row_tile, float eps) {
    const int last = (rows + 15) / 16 - 1;
    const TileView<Q> view = tile_view<Q>(w, last + 1, N_COL_TILES);
    if constexpr (N_BLOCKS == 0) {
        typename Same<Q, N_ROW_TILES>::one tiles;
        neighbours(tiles, view, row_tile, last);
        one_cta(sums, tiles, in);
    } else {
        typename Same<Q, N_ROW_TILES>::few tiles;
        neighbours(tiles, view, row_tile, last);
        few_cta<N_WARPS, N_AHEAD, N_BLOCKS, WITH_NORM>(sums, tiles, in, N_COL_TILES);
    }
    const int row = 16 * row_tile + (threadIdx.x & 15), tile = threadIdx.x >> 4;
    float old = 0.f;  // fetched while the other warps finish
    if constexpr (WITH_ADD)
        if (tile < TOKENS && tile < in.n && row < rows) old = y[tile * ldy + row];
    __syncthreads();
    for (int i = tile; i < N_ROW_TILES * TOKENS; i += 2 * N_WARPS) {
        const int token = i % TOKENS, o = row + 16 * (i / TOKENS);
        if (token >= in.n || o >= rows) continue;
        float v = sums.sum(i / TOKENS, token, threadIdx.x & 15);
        if constexpr (WITH_NORM) v *= sums.norm(token, in.in, eps);
        if constexpr (WITH_ADD) v += i == tile && i < TOKENS ? old : y[token * ldy + o];
        y[token * ldy + o] = v;
    }
}

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
products_few(float* y0, float* y1, float* y2, const unsigned char* w0, const unsigned char* w1,
             const unsigned char* w2, const float* x, const float* norm, int n, int in, int skip,
             int rows0, int rows1, int rows2, long long ldx, long long ldy0, long long ldy1,
             long long ldy2, float eps) {
    __shared__ FewSums<N_WARPS, N_ROW_TILES, TOKENS> sums;
    const FewIn from = {x, norm, ldx, n, in, skip};
    pdl_launch();
    int cta = blockIdx.x;
    const int ctas0 = (rows0 + 16 * N_ROW_TILES - 1) / (16 * N_ROW_TILES);
    if (cta < ctas0)
        return segment<WTYPE0>(sums, y0, ldy0, w0, rows0, from, cta * N_ROW_TILES, eps);
    cta -= ctas0;
#if WTYPE1 >= 0
    const int ctas1 = (rows1 + 16 * N_ROW_TILES - 1) / (16 * N_ROW_TILES);
    if (cta < ctas1)
        return segment<WTYPE1>(sums, y1, ldy1, w1, rows1, from, cta * N_ROW_TILES, eps);
    cta -= ctas1;
#endif
#if WTYPE2 >= 0
    segment<WTYPE2>(sums, y2, ldy2, w2, rows2, from, cta * N_ROW_TILES, eps);
#endif
}
#endif

#ifdef GATED
extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
gated_few(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
          const float* norm, int n, int in, int rows, long long ldx, long long ldh, float eps) {
    __shared__ FewSums<N_WARPS, 2, TOKENS> sums;
    const FewIn from = {x, norm, ldx, n, in, 0};
    pdl_launch();
    const int n_row_tiles = (rows + 15) / 16;
    const auto of_gate = tile_view<WTYPE0>(gate, n_row_tiles, N_COL_TILES);
    const auto of_up = tile_view<WTYPE1>(up, n_row_tiles, N_COL_TILES);
    const long long first = (long long)blockIdx.x * N_COL_TILES;
    if constexpr (N_BLOCKS == 0) {
        OneStreams<Share, WTYPE0, WTYPE1> tiles;
        OneStreams<Share, WTYPE1>& second = tiles;
        const int lane = threadIdx.x & 31, begin = Share::from(threadIdx.x >> 5);
        tiles.start(of_gate, first, begin, lane);
        second.start(of_up, first, begin, lane);
        one_cta(sums, tiles, from);
    } else {
        FewTiles<N_AHEAD, WTYPE0, WTYPE1> tiles;
        FewTiles<N_AHEAD, WTYPE1>& second = tiles;
        tiles.view = of_gate, second.view = of_up;
        tiles.first = second.first = first;
        few_cta<N_WARPS, N_AHEAD, N_BLOCKS, WITH_NORM>(sums, tiles, from, N_COL_TILES);
    }
    __syncthreads();
    const int row = threadIdx.x & 15, o = 16 * blockIdx.x + row;
    for (int token = threadIdx.x >> 4; token < n; token += 2 * N_WARPS) {
        if (o >= rows) continue;
        const float scale = WITH_NORM ? sums.norm(token, in, eps) : 1.f;
        h[token * ldh + o] = few_swiglu(scale * sums.sum(0, token, row),
                                        scale * sums.sum(1, token, row));
    }
}
#endif
