// Op        products_pieces: y_i[o] (+)= s sum_c w_i[o][c] x[c] norm[c] for up to two weights i of one x,
//           s = 1 / sqrt(mean of x^2 + eps); WITH_NORM=0: s and norm are 1; WITH_ADD: y_0 += it; SEND_TO=N: as in
//           matvec.cu
//           gated_pieces: h[o] = silu(gate[o] . x) * (up[o] . x), x normed the same way
//           One token; for wide weights, of which only memory counts
// Shapes    y_i [rows_i], h [rows], x [in], norm [in]; weights in tiles (tiles.cuh) of N_COL_TILES column tiles
// Dtypes    all w_i WTYPE0; gate WTYPE0, up WTYPE1; the rest float32
// Grid      (ctas), 32 (N_WARPS + 1) threads. CTA c takes row tiles c, c + ctas, .., at most N_ROWS, in N_PIECES
//           pieces. A warp of its own asks for pieces, N_STAGES at a time; the others have some of the columns
//           of each. Shared bytes: N_STAGES pieces
// Assumes   `in` is 64 N_COL_TILES, no columns of another rank; N_PIECES divides N_COL_TILES, into fours where 256
//           columns share a scale
// Numerics  matvec.cuh; warps in a fixed order. NMSE to float64 <= 1e-9
// Bound by  bytes of w
// Needs     9.0
// Variants  N_STAGES=6 N_PIECES=4 N_ROWS=5 N_WARPS=14 N_COL_TILES=112 WITH_NORM=1 GATED=1 WTYPE0=12 WTYPE1=12;
//           N_STAGES=6 N_PIECES=4 N_ROWS=4 N_WARPS=12 N_COL_TILES=144 WITH_NORM=0 WITH_ADD=1 WTYPE0=14;
//           SEND_TO=2 N_STAGES=2 N_PIECES=2 N_ROWS=4 N_WARPS=16 N_COL_TILES=128 WITH_NORM=0 WITH_ADD=0 WTYPE0=12;
//           N_STAGES=6 N_PIECES=4 N_ROWS=4 N_WARPS=12 N_COL_TILES=144 WITH_NORM=0 WITH_ADD=1 WTYPE0=16
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_pieces.cuh"
#include "post.cuh"

#ifndef SEND_TO
#define SEND_TO 0
#endif
constexpr bool SENDS = SEND_TO > 0;

constexpr int THREADS = 32 * N_WARPS + 32, WIDE = N_COL_TILES / N_PIECES;
static_assert(N_COL_TILES % N_PIECES == 0, "equal pieces");
#ifdef GATED
using Streams = RowStreams<WIDE, WTYPE0, WTYPE1>;
using X = OneXOf<2 * N_ROWS, WTYPE0, WTYPE1>;
#else
using Streams = RowStreams<WIDE, WTYPE0>;
using X = OneXOf<N_ROWS, WTYPE0>;
#endif
constexpr int NBYTES = Streams::nbytes, N_STREAMS = Streams::count;
using At = PieceAt<N_STAGES, NBYTES>;

struct Memory {
    float part[N_ROWS][N_WARPS][N_STREAMS][16], squared[N_WARPS];
    PieceRing<N_STAGES, NBYTES> ring;

    __device__ __forceinline__ float norm(int in, float eps) const {
        return row_norm(squared, in, eps);
    }
    __device__ __forceinline__ float sum(int k, int stream, int row) const {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum += part[k][w][stream][row];
        return sum;
    }
};

// What all warps but the one that asks do; n row tiles.
__device__ __forceinline__ void multiply(Memory& memory, int n, const float* x, const float* norm) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    PieceX<X, N_PIECES, WIDE, N_WARPS> in, weight;
    if (WITH_NORM) weight.template ask<true>(warp, norm, 64 * WIDE);
    pdl_wait();
    if (SENDS) pdl_launch();  // not earlier: reduce_sent relies on it
    in.template ask<false>(warp, x, 64 * WIDE);
    if (WITH_NORM) {
        const float squares = in.normed(weight);
        if (lane == 0) memory.squared[warp] = squares;
    }
    in.split();
    At at = {memory.ring, 0, 0, 0};
#pragma unroll 1
    for (int k = 0; k < n; k++) {
        float acc[N_STREAMS][2] = {};
#pragma unroll
        for (int p = 0; p < N_PIECES; p++) {
            at.wait_full();
            in.template add<Streams>(p, warp, at.memory(), acc);
            at.leave();
            at.next();
        }
        few_rows(acc, memory.part[k][warp]);
    }
}

// ---------------------------------------------------------------- kernels -------------------
#ifdef GATED
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gated_pieces(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
             const float* norm, int rows, int in, float eps) {
    __shared__ Memory memory;
    const int row_tiles = (rows + 15) / 16, ctas = gridDim.x, n = (row_tiles - (int)blockIdx.x + ctas - 1) / ctas;
    if (threadIdx.x == 0) memory.ring.init(N_WARPS);
    __syncthreads();
    pdl_launch();
    if (threadIdx.x >= 32 * N_WARPS) {
        if (threadIdx.x == 32 * N_WARPS) {
            const auto of_gate = tile_view<WTYPE0>(gate, row_tiles, N_COL_TILES);
            const auto of_up = tile_view<WTYPE1>(up, row_tiles, N_COL_TILES);
            At at = {memory.ring, 0, 0, 0};
            for (int k = 0; k < n; k++)
                for (int p = 0; p < N_PIECES; p++, at.next()) {
                    const long long first = (long long)(blockIdx.x + k * ctas) * N_COL_TILES + p * WIDE;
                    Streams w;
                    RowStreams<WIDE, WTYPE1>& second = w;
                    w.start(of_gate, first, 0, 0), second.start(of_up, first, 0, 0);
                    at.wait_empty();
                    at.fetch(w);
                }
        }
        pdl_wait();
    } else {
        multiply(memory, n, x, norm);
    }
    __syncthreads();
    const float scale = WITH_NORM ? memory.norm(in, eps) : 1.f;
    for (int k = threadIdx.x >> 4; k < n; k += THREADS / 16) {
        const int row = threadIdx.x & 15, o = 16 * (blockIdx.x + k * ctas) + row;
        if (o < rows) h[o] = few_swiglu(scale * memory.sum(k, 0, row), scale * memory.sum(k, 1, row));
    }
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1)
products_pieces(float* y0, float* y1, const unsigned char* w0, const unsigned char* w1, const float* x,
                const float* norm, int rows0, int rows1, int in, float eps, const void* mail) {
    __shared__ Memory memory;
    const int tiles0 = (rows0 + 15) / 16, tiles1 = (rows1 + 15) / 16, ctas = gridDim.x;
    const int n = (tiles0 + tiles1 - (int)blockIdx.x + ctas - 1) / ctas;
    if (threadIdx.x == 0) memory.ring.init(N_WARPS);
    __syncthreads();
    if (!SENDS) pdl_launch();
    if (threadIdx.x >= 32 * N_WARPS) {
        if (threadIdx.x == 32 * N_WARPS) {
            const auto view0 = tile_view<WTYPE0>(w0, tiles0, N_COL_TILES);
            const auto view1 = tile_view<WTYPE0>(w1, tiles1, N_COL_TILES);
            At at = {memory.ring, 0, 0, 0};
            for (int k = 0; k < n; k++)
                for (int p = 0; p < N_PIECES; p++, at.next()) {
                    const int tile = blockIdx.x + k * ctas, other = tile - tiles0;
                    Streams w;
                    w.start(other < 0 ? view0 : view1,
                            (long long)(other < 0 ? tile : other) * N_COL_TILES + p * WIDE, 0, 0);
                    at.wait_empty();
                    at.fetch(w);
                }
        }
        pdl_wait();
        if (SENDS) pdl_launch();
    } else {
        multiply(memory, n, x, norm);
    }
    Post<SEND_TO> post;
    post.open(mail);
    __syncthreads();
    const float scale = WITH_NORM ? memory.norm(in, eps) : 1.f;
    for (int k = threadIdx.x >> 4; k < n; k += THREADS / 16) {
        const int tile = blockIdx.x + k * ctas, row = threadIdx.x & 15;
        const bool second = tile >= tiles0;
        const int o = 16 * (second ? tile - tiles0 : tile) + row;
        if (o >= (second ? rows1 : rows0)) continue;
        float* y = second ? y1 : y0;
        const float sum = scale * memory.sum(k, 0, row);
        if constexpr (SENDS) post.send(o, sum);
        else y[o] = WITH_ADD ? y[o] + sum : sum;
    }
}
#endif
