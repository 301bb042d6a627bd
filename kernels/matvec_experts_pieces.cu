// Op        experts_up_pieces, experts_down_pieces: as experts_up_few and experts_down_few of matvec_experts.cu, for
//           one token and wide weights, of which only memory counts
// Shapes    h [K f + fs], ids and weights [K], x and y [d]; gate, up [E, f, d], down [E, d, f] in tiles (tiles.cuh),
//           the shared expert's [fs, d] and [d, fs]. fs 0: no shared expert
// Dtypes    gate WTYPE0, up WTYPE1, shared WTYPE2, WTYPE3 (-1: none); down WTYPE0, shared WTYPE1; the rest
//           float32
// Grid      (ctas), 32 (N_WARPS + 1) threads. CTA c takes row tiles c, c + ctas, .., at most N_ROWS: of up those of the
//           shared expert, then of all slots, in N_PIECES pieces; of down those of y, a slot's N_COL_TILES column
//           tiles a piece, then N_SHARED pieces of as many of the shared expert. A warp of its own asks for
//           pieces, N_STAGES at a time; the others have some of the columns of each. Shared bytes: N_STAGES pieces
// Assumes   as there; d is 64 N_COL_TILES (up), f is (down); N_PIECES divides N_COL_TILES, into fours where 256
//           columns share a scale; up begins at a row tile of a merged weight; K <= 32
// Numerics  as there; a slot's weight is put on its x. NMSE to float64 <= 1e-9
// Bound by  bytes of the chosen experts
// Needs     9.0
// Variants  EXPERTS_UP=1 N_STAGES=6 N_PIECES=4 N_ROWS=5 N_WARPS=14 N_COL_TILES=112 WITH_NORM=1 WTYPE0=12 WTYPE1=12
//           WTYPE2=12 WTYPE3=12; EXPERTS_DOWN=1 N_USED=8 N_SHARED=1 N_STAGES=12 N_ROWS=4 N_WARPS=8 N_COL_TILES=16
//           WITH_ADD=0 AFTER_UP=1 WTYPE0=14 WTYPE1=14; SEND_TO=2 EXPERTS_DOWN=1 N_USED=8
//           N_SHARED=1 N_STAGES=7 N_ROWS=4 N_WARPS=8 N_COL_TILES=16 WITH_ADD=0 AFTER_UP=1 WTYPE0=14 WTYPE1=14; EXPERTS_UP=1 N_STAGES=4 N_PIECES=4 N_ROWS=2 N_WARPS=8
//           N_COL_TILES=96 WITH_NORM=1 WTYPE0=12 WTYPE1=12 WTYPE2=13 WTYPE3=8
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_pieces.cuh"
#include "post.cuh"

#ifndef SEND_TO
#define SEND_TO 0
#endif

constexpr int THREADS = 32 * N_WARPS + 32;

#ifdef EXPERTS_UP
// ---------------------------------------------------------------- up ------------------------
constexpr int WIDE = N_COL_TILES / N_PIECES;
constexpr bool SHARED = WTYPE2 >= 0, ALIKE = WTYPE0 == WTYPE2 && WTYPE1 == WTYPE3;
using Routed = RowStreams<WIDE, WTYPE0, WTYPE1>;
using Beside = RowStreams<WIDE, (SHARED ? WTYPE2 : WTYPE0), (SHARED ? WTYPE3 : WTYPE1)>;
using X = OneXOf<2 * N_ROWS, WTYPE0, WTYPE1, (SHARED ? WTYPE2 : WTYPE0), (SHARED ? WTYPE3 : WTYPE1)>;
constexpr int NBYTES = Routed::nbytes > Beside::nbytes ? Routed::nbytes : Beside::nbytes;
using At = PieceAt<N_STAGES, NBYTES>;
static_assert(N_COL_TILES % N_PIECES == 0, "equal pieces");

// Asks for pieces of row tiles of gate and up.
template <int GATE, int UP>
__device__ __forceinline__ void ask(const At& at, const TileView<GATE>& gate, long long gate_tile,
                                    const TileView<UP>& up, long long up_tile, int piece) {
    RowStreams<WIDE, GATE, UP> w;
    RowStreams<WIDE, UP>& second = w;
    w.start(gate, gate_tile * N_COL_TILES + piece * WIDE, 0, 0);
    second.start(up, up_tile * N_COL_TILES + piece * WIDE, 0, 0);
    at.fetch(w);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
experts_up_pieces(float* h, const unsigned char* gate, const unsigned char* up,
                  const unsigned char* shared_gate, const unsigned char* shared_up, const float* x,
                  const float* norm, const int* ids, int n_used, int d, int f, int fs,
                  int gate_row_tiles, int up_row_tiles, int up_row, int first, int held, float eps) {
    __shared__ float part[N_ROWS][N_WARPS][2][16], squared[N_WARPS];
    __shared__ PieceRing<N_STAGES, NBYTES> pieces;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, ctas = gridDim.x;
    const int row_tiles = (f + 15) / 16, shared_tiles = SHARED ? (fs + 15) / 16 : 0;
    const int n = (shared_tiles + n_used * row_tiles - (int)blockIdx.x + ctas - 1) / ctas;
    if (threadIdx.x == 0) pieces.init(N_WARPS);
    __syncthreads();
    const auto expert = [&](int slot) {  // -1: not here
        const int e = ids[slot] - first;
        return e < held ? max(e, -1) : -1;
    };
    At at = {pieces, 0, 0, 0};
    if (warp == N_WARPS) {
        bool waited = false;
        if (lane == 0) {
            for (int k = 0; k < n; k++) {
                const int tile = blockIdx.x + k * ctas, routed = tile - shared_tiles;
                if (routed >= 0 && !waited) pdl_wait(), waited = true;
                const int slot = max(routed, 0) / row_tiles, row_tile = routed - slot * row_tiles;
                const int e = routed >= 0 ? expert(slot) : 0;
                for (int p = 0; p < N_PIECES; p++, at.next()) {
                    at.wait_empty();
                    if (e < 0) {
                        row_arrive(at.full());
                    } else if (routed >= 0) {
                        ask(at, tile_view<WTYPE0>(gate, (long long)held * gate_row_tiles, N_COL_TILES),
                            (long long)e * gate_row_tiles + row_tile,
                            tile_view<WTYPE1>(up, (long long)held * up_row_tiles, N_COL_TILES),
                            (long long)e * up_row_tiles + row_tile + up_row / 16, p);
                    }
#if WTYPE2 >= 0
                    else {
                        ask(at, tile_view<WTYPE2>(shared_gate, shared_tiles, N_COL_TILES), tile,
                            tile_view<WTYPE3>(shared_up, shared_tiles, N_COL_TILES), tile, p);
                    }
#endif
                }
            }
        }
        if (!waited) pdl_wait();
        pdl_launch();  // not earlier: experts_down_pieces with AFTER_UP relies on this launch having waited
    } else {
        PieceX<X, N_PIECES, WIDE, N_WARPS> in, weight;
        if (WITH_NORM) weight.template ask<true>(warp, norm, 64 * WIDE);
        pdl_wait();
        pdl_launch();
        in.template ask<false>(warp, x, 64 * WIDE);
        const int mine = lane < n_used ? expert(lane) : -1;
        if (WITH_NORM) {
            const float squares = in.normed(weight);
            if (lane == 0) squared[warp] = squares;
        }
        in.split();
#pragma unroll 1
        for (int k = 0; k < n; k++) {
            const int routed = blockIdx.x + k * ctas - shared_tiles;
            const bool there = routed < 0 || __shfl_sync(~0u, mine, max(routed, 0) / row_tiles) >= 0;
            float acc[2][2] = {};
#pragma unroll
            for (int p = 0; p < N_PIECES; p++) {
                at.wait_full();
                if (there) {
                    if (ALIKE || routed >= 0)
                        in.template add<Routed>(p, warp, at.memory(), acc);
                    else
                        in.template add<Beside>(p, warp, at.memory(), acc);
                }
                at.leave();
                at.next();
            }
            few_rows(acc, part[k][warp]);
        }
    }
    __syncthreads();
    const float scale = WITH_NORM ? row_norm(squared, d, eps) : 1.f;
    for (int k = threadIdx.x >> 4; k < n; k += THREADS / 16) {
        const int row = threadIdx.x & 15, tile = blockIdx.x + k * ctas, routed = tile - shared_tiles;
        const int slot = max(routed, 0) / row_tiles, o = 16 * (routed < 0 ? tile : routed - slot * row_tiles) + row;
        if (o >= (routed < 0 ? fs : f) || (routed >= 0 && expert(slot) < 0)) continue;
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum[0] += part[k][w][0][row], sum[1] += part[k][w][1][row];
        h[(routed < 0 ? n_used : slot) * f + o] = few_swiglu(scale * sum[0], scale * sum[1]);
    }
}
#endif

#ifdef EXPERTS_DOWN
// ---------------------------------------------------------------- down ----------------------
constexpr int N_PIECES = N_USED + N_SHARED;
using Routed = RowStreams<N_COL_TILES, WTYPE0>;
using Beside = RowStreams<N_COL_TILES, (N_SHARED ? WTYPE1 : WTYPE0)>;
using X = OneXOf<N_ROWS, WTYPE0, (N_SHARED ? WTYPE1 : WTYPE0)>;
constexpr int NBYTES = Routed::nbytes > Beside::nbytes ? Routed::nbytes : Beside::nbytes;
using At = PieceAt<N_STAGES, NBYTES>;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
experts_down_pieces(float* y, const unsigned char* down, const unsigned char* shared_down,
                    const float* h, const int* ids, const float* weights, int d, int first, int held,
                    const void* mail) {
    __shared__ float part[N_ROWS][N_WARPS][1][16];
    __shared__ PieceRing<N_STAGES, NBYTES> pieces;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, ctas = gridDim.x;
    const int row_tiles = (d + 15) / 16, n = (row_tiles - (int)blockIdx.x + ctas - 1) / ctas;
    if (threadIdx.x == 0) pieces.init(N_WARPS);
    __syncthreads();
    constexpr bool SENDS = SEND_TO > 0;
    if (!SENDS) pdl_launch();  // else behind pdl_wait(): reduce_sent relies on it
    // AFTER_UP: experts_up_pieces starts this launch only when all of it has waited for the choice.
    if (!AFTER_UP) pdl_wait();
    int mine = -1;  // lane s: the expert of slot s, -1: not here
    float weight = 0.f;
    if (lane < N_USED) {
        mine = ids[lane] - first;
        if (mine >= held) mine = -1;
        weight = weights[lane];
    }
    At at = {pieces, 0, 0, 0};
    if (warp == N_WARPS) {
        const auto of_routed = tile_view<WTYPE0>(down, (long long)held * row_tiles, N_COL_TILES);
        for (int k = 0; k < n; k++)
            for (int p = 0; p < N_PIECES; p++, at.next()) {
                const int e = __shfl_sync(~0u, mine, min(p, N_USED - 1)), tile = blockIdx.x + k * ctas;
                if (lane) continue;
                at.wait_empty();
                if (p < N_USED && e < 0) {
                    row_arrive(at.full());
                } else if (p < N_USED) {
                    Routed w;
                    w.start(of_routed, ((long long)e * row_tiles + tile) * N_COL_TILES, 0, 0);
                    at.fetch(w);
                }
#if N_SHARED
                else {
                    Beside w;
                    w.start(tile_view<WTYPE1>(shared_down, row_tiles, N_SHARED * N_COL_TILES),
                            ((long long)tile * N_SHARED + p - N_USED) * N_COL_TILES, 0, 0);
                    at.fetch(w);
                }
#endif
            }
        __syncwarp();
        if (AFTER_UP) pdl_wait();
        if (SENDS) pdl_launch();
    } else {
        if (AFTER_UP) pdl_wait();
        if (SENDS) pdl_launch();
        PieceX<X, N_PIECES, N_COL_TILES, N_WARPS> in;
        in.template ask<false>(warp, h, 64 * N_COL_TILES);
#pragma unroll
        for (int p = 0; p < N_USED; p++) in.scale(p, __shfl_sync(~0u, weight, p));
        in.split();
        unsigned there = __ballot_sync(~0u, mine >= 0);
#pragma unroll 1
        for (int k = 0; k < n; k++) {
            float acc[1][2] = {};
#pragma unroll
            for (int p = 0; p < N_PIECES; p++) {
                at.wait_full();
                if (p >= N_USED)
                    in.template add<Beside>(p, warp, at.memory(), acc);
                else if (there >> p & 1)
                    in.template add<Routed>(p, warp, at.memory(), acc);
                at.leave();
                at.next();
            }
            few_rows(acc, part[k][warp]);
        }
    }
    Post<SEND_TO> post;
    post.open(mail);
    __syncthreads();
    for (int k = threadIdx.x >> 4; k < n; k += THREADS / 16) {
        const int row = threadIdx.x & 15, o = 16 * (blockIdx.x + k * ctas) + row;
        if (o >= d) continue;
        const float old = WITH_ADD ? y[o] : 0.f;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum += part[k][w][0][row];
        if constexpr (SENDS) post.send(o, sum);
        else y[o] = old + sum;
    }
}
#endif
