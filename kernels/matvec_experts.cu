// Op        experts_up_few: h[t][s] = silu(gate_e . x[t]) * (up_e . x[t]), e = ids[t][s], and behind
//           these the shared expert's; x normed as in matvec.cu
//           experts_down_few: y[t] (or y[t] +=) sum_s weights[t][s] down_e h[t][s] + shared_down h[t][K].
//           SEND_TO=N (left out: 0): as in matvec.cu
// Shapes    h [n, K f + fs], rows ldh apart: slot s at s f, the shared expert at K f; x [n, d], ids and
//           weights [n, K], y [n, d]; gate, up [E, f, d], down [E, d, f] in tiles (tiles.cuh), the
//           shared expert's [fs, d] and [d, fs]. fs 0: no shared expert. n <= 8
// Dtypes    gate WTYPE0, up WTYPE1, shared WTYPE2, WTYPE3 (-1: none); down WTYPE0, shared WTYPE1; the
//           rest float32
// Grid      up (shared_ctas + others, n), 32 N_WARPS threads: the first take the shared expert's row
//           tiles, the others all slots', each at most N_ROWS; down (ceil(d / 16), n): N_PARTS
//           warps a slot, N_PARTS_SHARED for the shared expert. N_COL_TILES, N_COL_TILES_SHARED: column
//           tiles (up: one number); AT_EDGE as in matvec.cu
// Assumes   experts first .. first + held - 1 are here, other ids (also -1) add nothing: their h is not
//           written, nor read. d, f, fs even. In a merged weight [E, 2 f, d] up starts at row up_row
//           (UP_SHIFT: its remainder by 16). AFTER_UP: the launch before this is experts_up_few's
// Numerics  as matvec.cu; the slot's weight is put on its sums. NMSE to float64 <= 1e-9
// Bound by  bytes of the chosen experts
// Variants  EXPERTS_UP=1 N_STAGES=2 N_ROWS=3 N_WARPS=8 N_CTAS=1 N_AHEAD=2 N_COL_TILES=32 AT_EDGE=0 UP_SHIFT=0 WITH_NORM=1
//           WTYPE0=12 WTYPE1=12 WTYPE2=13 WTYPE3=8; EXPERTS_UP=1 N_STAGES=2 N_ROWS=1 N_WARPS=4 N_CTAS=1 N_AHEAD=2 N_COL_TILES=5
//           AT_EDGE=1 UP_SHIFT=8 WITH_NORM=0 WTYPE0=2 WTYPE1=2 WTYPE2=-1 WTYPE3=-1; EXPERTS_DOWN=1 N_USED=6
//           N_PARTS=2 N_PARTS_SHARED=4 N_CTAS=1 N_AHEAD=4 N_COL_TILES=22 N_COL_TILES_SHARED=44 AT_EDGE=0
//           AFTER_UP=1 WITH_ADD=1 WTYPE0=6 WTYPE1=14; SEND_TO=2 EXPERTS_DOWN=1 N_USED=6
//           N_PARTS=2 N_PARTS_SHARED=4 N_CTAS=1 N_AHEAD=4 N_COL_TILES=11 N_COL_TILES_SHARED=22 AT_EDGE=0
//           AFTER_UP=1 WITH_ADD=0 WTYPE0=12 WTYPE1=12; EXPERTS_DOWN=1 N_USED=8 N_PARTS=2 N_PARTS_SHARED=0
//           N_CTAS=1 N_AHEAD=4 N_COL_TILES=32 N_COL_TILES_SHARED=0 AT_EDGE=1 AFTER_UP=0 WITH_ADD=0
//           WTYPE0=14 WTYPE1=-1
// Sources   own
// Needs     8.0
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_cta.cuh"
#include "matvec_rows.cuh"
#include "post.cuh"

#ifndef SEND_TO
#define SEND_TO 0
#endif

#ifdef EXPERTS_UP
// ---------------------------------------------------------------- up ------------------------
constexpr bool UNEVEN = UP_SHIFT != 0;  // the first up row is not the first of a tile: 16 rows lie in two
constexpr int STREAMS = UNEVEN ? 3 : 2;
using Share = OneShare<N_COL_TILES, N_WARPS, N_AHEAD>;
template <int... Q>
using Streams = typename OnePick<(N_STAGES > 0 && OneStaged<N_COL_TILES>::fits), Share, Q...>::type;
using Sums = OneSums<N_WARPS, N_ROWS, STREAMS>;

// silu(gate) * up of row tile k of the CTA.
__device__ __forceinline__ float swiglu(const Sums& sums, int k, int row, int shift, float scale) {
    const int at = row + shift;
    return few_swiglu(scale * sums.sum(k, 0, row), scale * sums.sum(k, 1 + at / 16, at % 16));
}

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
experts_up_few(float* h, const unsigned char* gate, const unsigned char* up,
               const unsigned char* shared_gate, const unsigned char* shared_up, const float* x,
               const float* norm, const int* ids, int n_used, int d, int f, int fs,
               int gate_row_tiles, int up_row_tiles, int up_row, int first, int held,
               int shared_ctas, long long ldx, long long ldh, float eps) {
    __shared__ OneStaged<N_COL_TILES> staged;
    __shared__ Sums sums;
    const int token = blockIdx.y, row = threadIdx.x & 15;
    const int lane = threadIdx.x & 31, begin = Share::from(threadIdx.x >> 5);
    h += token * ldh, x += token * ldx, ids += token * n_used;
#if WTYPE2 >= 0
    if (blockIdx.x < shared_ctas) {
        const int row_tiles = (fs + 15) / 16, cta = blockIdx.x;
        const auto of_gate = tile_view<WTYPE2>(shared_gate, row_tiles, N_COL_TILES);
        const auto of_up = tile_view<WTYPE3>(shared_up, row_tiles, N_COL_TILES);
        using Pair = Streams<WTYPE2, WTYPE3>;
        Pair streams;
        const auto seek = [&](Pair& s, int k) {
            const long long at = (long long)(cta + k * shared_ctas) * N_COL_TILES;
            Streams<WTYPE3>& second = s;
            s.start(of_gate, at, begin, lane);
            second.start(of_up, at, begin, lane);
            return true;
        };
        const int n = (row_tiles - cta + shared_ctas - 1) / shared_ctas;
        auto& pairs = reinterpret_cast<OneSums<N_WARPS, N_ROWS, 2>&>(sums);
        one_cta<WITH_NORM, AT_EDGE, N_STAGES>(pairs, staged, streams, n, seek, x, norm, d, 0);
        __syncthreads();
        const float scale = WITH_NORM ? pairs.norm(d, eps) : 1.f;
        for (int k = threadIdx.x >> 4; k < n; k += 2 * N_WARPS) {
            const int o = 16 * (cta + k * shared_ctas) + row;
            if (o < fs)
                h[n_used * f + o] = few_swiglu(scale * pairs.sum(k, 0, row), scale * pairs.sum(k, 1, row));
        }
        return;
    }
#endif
    const int row_tiles = (f + 15) / 16, cta = blockIdx.x - shared_ctas, ctas = gridDim.x - shared_ctas;
    const auto of_gate = tile_view<WTYPE0>(gate, (long long)held * gate_row_tiles, N_COL_TILES);
    const auto of_up = tile_view<WTYPE1>(up, (long long)held * up_row_tiles, N_COL_TILES);
    pdl_wait();
    pdl_launch();  // not earlier: experts_down_few with AFTER_UP relies on this launch having waited
    const auto expert = [&](int slot) {  // -1: not here
        const int e = ids[slot] - first;
        return e < held ? max(e, -1) : -1;
    };
#if UP_SHIFT
    using Pair = Streams<WTYPE0, WTYPE1, WTYPE1>;
#else
    using Pair = Streams<WTYPE0, WTYPE1>;
#endif
    Pair streams;
    const auto seek = [&](Pair& s, int k) {
        const int at = cta + k * ctas, slot = at / row_tiles, row_tile = at - slot * row_tiles;
        const int e = expert(slot);
        if (e < 0) return false;
        const int up_tile = e * up_row_tiles + row_tile + up_row / 16;
        s.start(of_gate, (long long)(e * gate_row_tiles + row_tile) * N_COL_TILES, begin, lane);
#if UP_SHIFT
        Streams<WTYPE1, WTYPE1>& second = s;
        Streams<WTYPE1>& third = second;
        const int next = min(up_tile + 1, (e + 1) * up_row_tiles - 1);
        third.start(of_up, (long long)next * N_COL_TILES, begin, lane);
#else
        Streams<WTYPE1>& second = s;
#endif
        second.start(of_up, (long long)up_tile * N_COL_TILES, begin, lane);
        return true;
    };
    const int n = (n_used * row_tiles - cta + ctas - 1) / ctas;
    one_cta<WITH_NORM, AT_EDGE, N_STAGES>(sums, staged, streams, n, seek, x, norm, d, 0);
    __syncthreads();
    const float scale = WITH_NORM ? sums.norm(d, eps) : 1.f;
    for (int k = threadIdx.x >> 4; k < n; k += 2 * N_WARPS) {
        const int at = cta + k * ctas, slot = at / row_tiles, o = 16 * (at - slot * row_tiles) + row;
        if (o < f && expert(slot) >= 0) h[slot * f + o] = swiglu(sums, k, row, UP_SHIFT, scale);
    }
}
#endif

#ifdef EXPERTS_DOWN
// ---------------------------------------------------------------- down ----------------------
constexpr int ROUTED_WARPS = N_USED * N_PARTS, N_WARPS = ROUTED_WARPS + N_PARTS_SHARED;

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
experts_down_few(float* y, const unsigned char* down, const unsigned char* shared_down,
                 const float* h, const int* ids, const float* weights, int d, int f, int fs, int skip,
                 int shared_skip, int first, int held, long long ldh, long long ldy, const void* mail) {
    __shared__ FewSums<N_WARPS, 1, 1> sums;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.y;
    const int row_tiles = (d + 15) / 16;
    const float* x = h + token * ldh;
    static_assert(SEND_TO == 0 || !WITH_ADD, "a partial is sent");
    if (SEND_TO == 0) pdl_launch();  // else behind pdl_wait(): reduce_sent relies on it
    float acc[1][2] = {}, squares = 0.f;
    if (warp < ROUTED_WARPS) {
        using Share = OneShare<N_COL_TILES, N_PARTS, N_AHEAD>;
        const int slot = warp / N_PARTS, part = warp % N_PARTS;
        const auto view = tile_view<WTYPE0>(down, (long long)held * row_tiles, N_COL_TILES);
        OneStreams<Share, WTYPE0> tiles;
        // AFTER_UP: experts_up_few starts this launch only when all of it has waited for the choice.
        if constexpr (!AFTER_UP) pdl_wait();
        const int e = ids[token * N_USED + slot] - first;
        if (e >= 0 && e < held) {
            const float weight = weights[token * N_USED + slot];
            const long long row_tile = (long long)e * row_tiles + blockIdx.x;
            tiles.start(view, row_tile * N_COL_TILES, Share::from(part), lane);
            one_warp<false, AT_EDGE, AFTER_UP>(tiles, part, x + slot * f, nullptr, f, skip, acc,
                                              squares);
            acc[0][0] *= weight, acc[0][1] *= weight;
        } else if constexpr (AFTER_UP) {
            pdl_wait();
        }
    }
#if WTYPE1 >= 0
    else {
        using Share = OneShare<N_COL_TILES_SHARED, N_PARTS_SHARED, N_AHEAD>;
        const int part = warp - ROUTED_WARPS;
        OneStreams<Share, WTYPE1> tiles;
        tiles.start(tile_view<WTYPE1>(shared_down, row_tiles, N_COL_TILES_SHARED),
                    (long long)blockIdx.x * N_COL_TILES_SHARED, Share::from(part), lane);
        one_warp<false, AT_EDGE>(tiles, part, x + N_USED * f, nullptr, fs, shared_skip, acc, squares);
    }
#endif
    few_store(sums, acc);
    const int row = threadIdx.x, o = 16 * blockIdx.x + row;
    float old = 0.f;  // fetched while the other warps finish
    if (WITH_ADD && row < 16 && o < d) old = y[token * ldy + o];
    Post<SEND_TO> post;
    if (row < 16) post.open(mail);
    __syncthreads();
    if (row >= 16 || o >= d) return;
    const float sum = old + sums.sum(0, 0, row);
    if constexpr (SEND_TO > 0) post.send(o, sum);
    else y[token * ldy + o] = sum;
}
#endif
