// Op        products: y_i[t][o] = s_t sum_c w_i[o][c] x[t][c] norm[c] for up to three weights i of one
//           x, s_t = 1 / sqrt(mean of x[t]^2 + eps); without WITH_NORM s and norm are 1. WITH_ADD: y_0 += it
//           gated: h[t][o] = silu(gate[o] . x[t]) * (up[o] . x[t]), x normed the same way
// Shapes    y_i [n, rows_i], h [n, rows], x [n, in], norm [in]; w_i in tiles (tiles.cuh), n <= 8
// Dtypes    w_i of type WTYPEi (-1: absent), gate WTYPE0, up WTYPE1; x, norm, y, h, sums float32
// Grid      products (sum of ceil(rows_i / (16 N_ROW_TILES))), gated (ceil(rows / 16)); 32 N_WARPS threads,
//           N_CTAS on an SM at least, no dynamic shared memory. N_BLOCKS 0: one token; 1, 2: up to 4, 8. N_AHEAD: tiles under way
// Assumes   x and ldx even in floats; with WITH_NORM `in` even; column tiles of gate and up alike
// Numerics  matvec.cuh; warps and steps in a fixed order. NMSE to float64 <= 1e-9
// Bound by  bytes of w; below about 4 MB by latency
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_cta.cuh"

// ---------------------------------------------------------------- device helpers ------------
// ROW_TILES neighbouring row tiles from row_tile on; those past the end read the last one.
template <int DEPTH, int Q, int... REST>
__device__ __forceinline__ void few_neighbours(
        FewTiles<DEPTH, Q, REST...>& tiles, const TileView<Q>& view, int row_tile, int last) {
    tiles.view = view;
    tiles.first = (long long)min(row_tile, last) * view.n_col_tiles;
    if constexpr (sizeof...(REST) > 0) {
        FewTiles<DEPTH, REST...>& others = tiles;
        few_neighbours(others, view, row_tile + 1, last);
    }
}
template <int DEPTH, int Q, int COUNT>
struct FewSame;
template <int DEPTH, int Q> struct FewSame<DEPTH, Q, 1> { using type = FewTiles<DEPTH, Q>; };
template <int DEPTH, int Q> struct FewSame<DEPTH, Q, 2> { using type = FewTiles<DEPTH, Q, Q>; };
template <int DEPTH, int Q> struct FewSame<DEPTH, Q, 4> {
    using type = FewTiles<DEPTH, Q, Q, Q, Q>;
};

// ---------------------------------------------------------------- kernels -------------------
#ifdef N_ROW_TILES
constexpr int TOKENS = N_BLOCKS ? 4 * N_BLOCKS : 1;

template <int Q>
__device__ __forceinline__ void segment(
        FewSums<N_WARPS, N_ROW_TILES, TOKENS>& sums, float* y, long long ldy, const unsigned char* w,
        int rows, int n_col_tiles, const FewIn& in, int row_tile, float eps) {
    typename FewSame<N_AHEAD, Q, N_ROW_TILES>::type tiles;
    const int last = (rows + 15) / 16 - 1;
    few_neighbours(tiles, tile_view<Q>(w, last + 1, n_col_tiles), row_tile, last);
    few_cta<N_WARPS, N_AHEAD, N_BLOCKS, WITH_NORM>(sums, tiles, in, n_col_tiles);
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
             int rows0, int rows1, int rows2, int n_col_tiles0, int n_col_tiles1, int n_col_tiles2,
             long long ldx, long long ldy0, long long ldy1, long long ldy2, float eps) {
    __shared__ FewSums<N_WARPS, N_ROW_TILES, TOKENS> sums;
    const FewIn from = {x, norm, ldx, n, in, skip};
    pdl_launch();
    int cta = blockIdx.x;
    const int ctas0 = (rows0 + 16 * N_ROW_TILES - 1) / (16 * N_ROW_TILES);
    if (cta < ctas0)
        return segment<WTYPE0>(sums, y0, ldy0, w0, rows0, n_col_tiles0, from, cta * N_ROW_TILES, eps);
    cta -= ctas0;
#if WTYPE1 >= 0
    const int ctas1 = (rows1 + 16 * N_ROW_TILES - 1) / (16 * N_ROW_TILES);
    if (cta < ctas1)
        return segment<WTYPE1>(sums, y1, ldy1, w1, rows1, n_col_tiles1, from, cta * N_ROW_TILES, eps);
    cta -= ctas1;
#endif
#if WTYPE2 >= 0
    segment<WTYPE2>(sums, y2, ldy2, w2, rows2, n_col_tiles2, from, cta * N_ROW_TILES, eps);
#endif
}
#endif

#ifdef GATED
extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
gated_few(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
          const float* norm, int n, int in, int rows, int n_col_tiles, long long ldx,
          long long ldh, float eps) {
    constexpr int TOKENS = N_BLOCKS ? 4 * N_BLOCKS : 1;
    __shared__ FewSums<N_WARPS, 2, TOKENS> sums;
    const FewIn from = {x, norm, ldx, n, in, 0};
    pdl_launch();
    FewTiles<N_AHEAD, WTYPE0, WTYPE1> tiles;
    FewTiles<N_AHEAD, WTYPE1>& of_up = tiles;
    const int n_row_tiles = (rows + 15) / 16;
    tiles.view = tile_view<WTYPE0>(gate, n_row_tiles, n_col_tiles);
    of_up.view = tile_view<WTYPE1>(up, n_row_tiles, n_col_tiles);
    tiles.first = of_up.first = (long long)blockIdx.x * n_col_tiles;
    few_cta<N_WARPS, N_AHEAD, N_BLOCKS, WITH_NORM>(sums, tiles, from, n_col_tiles);
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
