// Op        products: y_i[t][o] = s_t sum_c w_i[o][c] x[t][c] norm[c] for up to three weights i of one
//           x, s_t = 1 / sqrt(mean of x[t]^2 + eps); WITH_NORM=0: s and norm are 1. WITH_ADD: y_0 += it
//           SEND_TO=N: y_0, of one token, is sent to N GPUs instead (post.cuh)
//           gated: h[t][o] = silu(gate[o] . x[t]) * (up[o] . x[t]), x normed the same way
// Shapes    y_i [n, rows_i], h [n, rows], x [n, in], norm [in]; w_i in tiles (tiles.cuh) of N_COL_TILES
//           column tiles, n <= 8
// Dtypes    w_i of type WTYPEi (-1: absent), gate WTYPE0, up WTYPE1; x, norm, y, h, sums float32
// Grid      products (sum of ctas_i), gated (ctas); 32 N_WARPS threads, N_CTAS on an SM at least, no
//           dynamic shared memory. CTA c of a weight takes its row tiles c, c + ctas_i, .. (16 rows each),
//           at most N_ROWS. N_BLOCKS 0: one token; 1, 2: up to 4, 8, and then
//           N_ROWS is 1. N_AHEAD: tiles under way to a warp of each row tile. SEND_TO (left out: 0)
//           with N_BLOCKS 0 and WITH_ADD 0 alone
// Assumes   x, ldx and `in` even; with WITH_NORM skip 0. AT_EDGE 0: skip is 0 and `in` 64 N_COL_TILES
// Numerics  matvec.cuh; warps and steps in a fixed order. NMSE to float64 <= 1e-9
// Bound by  bytes of w; below about 4 MB by latency
// Variants  N_STAGES=2 N_ROWS=2 N_WARPS=8 N_CTAS=2 N_AHEAD=4 N_BLOCKS=0 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1
//           WITH_ADD=0 WTYPE0=12 WTYPE1=8 WTYPE2=7; N_STAGES=2 N_ROWS=1 N_WARPS=4 N_CTAS=2 N_AHEAD=2
//           N_BLOCKS=0 N_COL_TILES=172 AT_EDGE=1 WITH_NORM=0 WITH_ADD=1 WTYPE0=6 WTYPE1=-1 WTYPE2=-1;
//           N_STAGES=2 N_ROWS=1 N_WARPS=8 N_CTAS=1 N_AHEAD=4 N_BLOCKS=2 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1
//           WITH_ADD=0 WTYPE0=14 WTYPE1=-1 WTYPE2=-1; SEND_TO=2 N_STAGES=2 N_ROWS=1 N_WARPS=8 N_CTAS=1
//           N_AHEAD=4 N_BLOCKS=0 N_COL_TILES=16 AT_EDGE=0 WITH_NORM=0 WITH_ADD=0 WTYPE0=12 WTYPE1=-1
//           WTYPE2=-1; GATED=1 N_STAGES=2 N_ROWS=3 N_WARPS=8 N_CTAS=1 N_AHEAD=4
//           N_BLOCKS=0 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1 WTYPE0=12 WTYPE1=13; GATED=1 N_STAGES=2 N_ROWS=1 N_WARPS=8
//           N_CTAS=1 N_AHEAD=2 N_BLOCKS=1 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1 WTYPE0=23 WTYPE1=1;
//           N_STAGES=0 N_ROWS=4 N_WARPS=8 N_CTAS=1 N_AHEAD=4 N_BLOCKS=0 N_COL_TILES=32 AT_EDGE=0 WITH_NORM=1
//           WITH_ADD=0 WTYPE0=29 WTYPE1=19 WTYPE2=16
// Sources   own
// Needs     8.0
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_cta.cuh"
#include "matvec_rows.cuh"
#include "post.cuh"

#ifndef SEND_TO
#define SEND_TO 0
#endif

constexpr int TOKENS = N_BLOCKS ? 4 * N_BLOCKS : 1;
using Share = OneShare<N_COL_TILES, N_WARPS, N_AHEAD>;
template <int... Q>
using Streams = typename OnePick<(N_STAGES > 0 && OneStaged<N_COL_TILES>::fits), Share, Q...>::type;

#ifdef GATED
constexpr int STREAMS = 2;
#else
constexpr int STREAMS = 1;
#endif

// Shared memory of a CTA.
union Memory {
    struct {
        OneStaged<N_COL_TILES> staged;
        OneSums<N_WARPS, N_ROWS, STREAMS> sums;
    } one;
    FewSums<N_WARPS, STREAMS, TOKENS> few;
};

// ---------------------------------------------------------------- kernels -------------------
#ifndef GATED
template <int Q>
__device__ __forceinline__ void segment(
        Memory& memory, float* y, long long ldy, const unsigned char* w, int rows, const FewIn& in,
        int cta, int ctas, float eps, const void* mail = nullptr) {
    const int row_tiles = (rows + 15) / 16, row = threadIdx.x & 15;
    const TileView<Q> view = tile_view<Q>(w, row_tiles, N_COL_TILES);
    static_assert(SEND_TO == 0 || (N_BLOCKS == 0 && !WITH_ADD), "one token's partial is sent");
    if constexpr (N_BLOCKS == 0) {
        auto& parts = memory.one.sums;
        Streams<Q> streams;
        const int n = (row_tiles - cta + ctas - 1) / ctas;
        const auto seek = [&](Streams<Q>& s, int k) {
            s.start(view, (long long)(cta + k * ctas) * N_COL_TILES,
                    Share::from(threadIdx.x >> 5), threadIdx.x & 31);
            return true;
        };
        one_cta<WITH_NORM, AT_EDGE, N_STAGES>(parts, memory.one.staged, streams, n, seek, in.x, in.norm, in.in,
                                    in.skip);
        const int mine = threadIdx.x >> 4;  // the first row tile that this thread adds up
        const int o = 16 * (cta + mine * ctas) + row;
        float old = 0.f;  // fetched while the other warps finish
        if (WITH_ADD && mine < n && o < rows) old = y[o];
        Post<SEND_TO> post;
        post.open(mail);
        __syncthreads();
        const float scale = WITH_NORM ? parts.norm(in.in, eps) : 1.f;
        for (int k = mine; k < n; k += 2 * N_WARPS) {
            const int at = 16 * (cta + k * ctas) + row;
            if (at >= rows) continue;
            float v = scale * parts.sum(k, 0, row);
            if constexpr (WITH_ADD) v += k == mine ? old : y[at];
            if constexpr (SEND_TO > 0) post.send(at, v);
            else y[at] = v;
        }
    } else {
        auto& sums = memory.few;
        FewTiles<N_AHEAD, Q> tiles;
        tiles.view = view;
        tiles.first = (long long)cta * N_COL_TILES;
        few_cta<N_WARPS, N_AHEAD, N_BLOCKS, WITH_NORM>(sums, tiles, in, N_COL_TILES);
        __syncthreads();
        const int o = 16 * cta + row;
        for (int token = threadIdx.x >> 4; token < in.n; token += 2 * N_WARPS) {
            if (o >= rows) continue;
            float v = sums.sum(0, token, row);
            if constexpr (WITH_NORM) v *= sums.norm(token, in.in, eps);
            if constexpr (WITH_ADD) v += y[token * ldy + o];
            y[token * ldy + o] = v;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
products_few(float* y0, float* y1, float* y2, const unsigned char* w0, const unsigned char* w1,
             const unsigned char* w2, const float* x, const float* norm, int n, int in, int skip,
             int rows0, int rows1, int rows2, int ctas0, int ctas1, int ctas2, long long ldx,
             long long ldy0, long long ldy1, long long ldy2, float eps, const void* mail) {
    __shared__ Memory memory;
    const FewIn from = {x, norm, ldx, n, in, skip};
    const int cta = blockIdx.x;
    if (SEND_TO == 0) pdl_launch();  // else behind pdl_wait(): reduce_sent relies on it
    if (cta < ctas0) return segment<WTYPE0>(memory, y0, ldy0, w0, rows0, from, cta, ctas0, eps, mail);
#if WTYPE1 >= 0
    if (cta < ctas0 + ctas1)
        return segment<WTYPE1>(memory, y1, ldy1, w1, rows1, from, cta - ctas0, ctas1, eps);
#endif
#if WTYPE2 >= 0
    segment<WTYPE2>(memory, y2, ldy2, w2, rows2, from, cta - ctas0 - ctas1, ctas2, eps);
#endif
}
#else
extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
gated_few(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
          const float* norm, int n, int in, int rows, long long ldx, long long ldh, float eps) {
    __shared__ Memory memory;
    const FewIn from = {x, norm, ldx, n, in, 0};
    const int row_tiles = (rows + 15) / 16, row = threadIdx.x & 15, cta = blockIdx.x;
    const auto of_gate = tile_view<WTYPE0>(gate, row_tiles, N_COL_TILES);
    const auto of_up = tile_view<WTYPE1>(up, row_tiles, N_COL_TILES);
    pdl_launch();
    if constexpr (N_BLOCKS == 0) {
        auto& parts = memory.one.sums;
        using Pair = Streams<WTYPE0, WTYPE1>;
        Pair streams;
        const int n_rows = (row_tiles - cta + gridDim.x - 1) / gridDim.x;
        const auto seek = [&](Pair& s, int k) {
            const int lane = threadIdx.x & 31, begin = Share::from(threadIdx.x >> 5);
            const long long first = (long long)(cta + k * (int)gridDim.x) * N_COL_TILES;
            Streams<WTYPE1>& second = s;
            s.start(of_gate, first, begin, lane);
            second.start(of_up, first, begin, lane);
            return true;
        };
        one_cta<WITH_NORM, AT_EDGE, N_STAGES>(parts, memory.one.staged, streams, n_rows, seek, x, norm, in, 0);
        __syncthreads();
        const float scale = WITH_NORM ? parts.norm(in, eps) : 1.f;
        for (int k = threadIdx.x >> 4; k < n_rows; k += 2 * N_WARPS) {
            const int o = 16 * (cta + k * gridDim.x) + row;
            if (o < rows) h[o] = few_swiglu(scale * parts.sum(k, 0, row), scale * parts.sum(k, 1, row));
        }
    } else {
        auto& sums = memory.few;
        FewTiles<N_AHEAD, WTYPE0, WTYPE1> tiles;
        FewTiles<N_AHEAD, WTYPE1>& second = tiles;
        tiles.view = of_gate, second.view = of_up;
        tiles.first = second.first = (long long)cta * N_COL_TILES;
        few_cta<N_WARPS, N_AHEAD, N_BLOCKS, WITH_NORM>(sums, tiles, from, N_COL_TILES);
        __syncthreads();
        const int o = 16 * cta + row;
        for (int token = threadIdx.x >> 4; token < n; token += 2 * N_WARPS) {
            if (o >= rows) continue;
            const float scale = WITH_NORM ? sums.norm(token, in, eps) : 1.f;
            h[token * ldh + o] = few_swiglu(scale * sums.sum(0, token, row),
                                            scale * sums.sum(1, token, row));
        }
    }
}
#endif
