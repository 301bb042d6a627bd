// Op        experts_up_few: h[t][s] = silu(gate_e . x[t]) * (up_e . x[t]), e = ids[t][s], and behind
//           these the shared expert's; x normed as in matvec.cu
//           experts_down_few: y[t] (or y[t] +=) sum_s weights[t][s] down_e h[t][s] + shared_down h[t][K]
// Shapes    h [n, K f + fs], rows ldh apart: slot s at s f, the shared expert at K f; x [n, d], ids and
//           weights [n, K], y [n, d]; gate, up [E, f, d], down [E, d, f] in tiles (tiles.cuh), the shared expert's
//           [fs, d] and [d, fs]. fs 0: no shared expert. n <= 8
// Dtypes    gate WTYPE0, up WTYPE1, shared WTYPE2, WTYPE3; down WTYPE0, shared WTYPE1; the rest float32
// Grid      up (ceil(fs / 16) + K ceil(f / 16), n), down (ceil(d / 16), n); 32 N_WARPS threads
// Assumes   experts first .. first + held - 1 are here, other ids (also -1) add nothing: their h is not
//           written, nor read. K <= 32; n, f, fs even. In a merged weight [E, 2 f, d] up starts at row
//           up_row of each expert; AFTER_UP: the launch before this one is experts_up_few's
// Numerics  as matvec.cu; the slot's weight is put on h. NMSE to float64 <= 1e-9
// Bound by  bytes of the chosen experts
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_cta.cuh"

#ifdef EXPERTS_UP
// ---------------------------------------------------------------- up ------------------------
// 16 rows of gate and up of one expert. UNEVEN: its first up row is not the first of a tile, so that
// 16 rows lie in two tiles.
template <int QG, int QU, bool UNEVEN>
__device__ __forceinline__ void expert_up(
        FewSums<N_WARPS, UNEVEN ? 3 : 2, 1>& sums, float* h, const TileView<QG>& gate,
        const TileView<QU>& up, int gate_tile, int up_tile, int last_up_tile, int shift, int row_tile,
        int f, const FewIn& in, float eps) {
    if constexpr (UNEVEN) {
        FewTiles<N_AHEAD, QG, QU, QU> tiles;
        FewTiles<N_AHEAD, QU, QU>& of_up = tiles;
        FewTiles<N_AHEAD, QU>& of_next = of_up;
        tiles.view = gate, of_up.view = of_next.view = up;
        tiles.first = (long long)gate_tile * gate.n_col_tiles;
        of_up.first = (long long)up_tile * gate.n_col_tiles;
        of_next.first = (long long)min(up_tile + 1, last_up_tile) * gate.n_col_tiles;
        few_cta<N_WARPS, N_AHEAD, 0, WITH_NORM>(sums, tiles, in, gate.n_col_tiles);
    } else {
        FewTiles<N_AHEAD, QG, QU> tiles;
        FewTiles<N_AHEAD, QU>& of_up = tiles;
        tiles.view = gate, of_up.view = up;
        tiles.first = (long long)gate_tile * gate.n_col_tiles;
        of_up.first = (long long)up_tile * gate.n_col_tiles;
        few_cta<N_WARPS, N_AHEAD, 0, WITH_NORM>(sums, tiles, in, gate.n_col_tiles);
    }
    __syncthreads();
    const int row = threadIdx.x, o = 16 * row_tile + row;
    if (row >= 16 || o >= f) return;
    const float scale = WITH_NORM ? sums.norm(0, in.in, eps) : 1.f;
    const int at = row + (UNEVEN ? shift : 0);
    h[o] = few_swiglu(scale * sums.sum(0, 0, row), scale * sums.sum(1 + at / 16, 0, at % 16));
}

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
experts_up_few(float* h, const unsigned char* gate, const unsigned char* up,
               const unsigned char* shared_gate, const unsigned char* shared_up, const float* x,
               const float* norm, const int* ids, int n_used, int d, int f, int fs,
               int n_col_tiles, int gate_row_tiles, int up_row_tiles, int up_row, int first, int held,
               long long ldx, long long ldh, float eps) {
    constexpr bool UNEVEN = UP_SHIFT != 0;
    __shared__ union {
        FewSums<N_WARPS, UNEVEN ? 3 : 2, 1> routed;
        FewSums<N_WARPS, 2, 1> shared;
    } sums;
    const int shared_tiles = (fs + 15) / 16, row_tiles = (f + 15) / 16, token = blockIdx.y;
    const FewIn in = {x + token * ldx, norm, ldx, 1, d, 0};
    float* to = h + token * ldh;
    pdl_launch();
#if WTYPE2 >= 0
    if (blockIdx.x < shared_tiles)
        return expert_up<WTYPE2, WTYPE3, false>(
            sums.shared, to + n_used * f, tile_view<WTYPE2>(shared_gate, shared_tiles, n_col_tiles),
            tile_view<WTYPE3>(shared_up, shared_tiles, n_col_tiles), blockIdx.x, blockIdx.x, 0, 0,
            blockIdx.x, fs, in, eps);
#endif
    const int slot = (blockIdx.x - shared_tiles) / row_tiles;
    const int row_tile = (blockIdx.x - shared_tiles) % row_tiles;
    pdl_wait();
    const int e = ids[token * n_used + slot] - first;
    if (e < 0 || e >= held) return;
    const int up_tile = e * up_row_tiles + row_tile + up_row / 16;
    expert_up<WTYPE0, WTYPE1, UNEVEN>(
        sums.routed, to + slot * f,
        tile_view<WTYPE0>(gate, (long long)held * gate_row_tiles, n_col_tiles),
        tile_view<WTYPE1>(up, (long long)held * up_row_tiles, n_col_tiles),
        e * gate_row_tiles + row_tile, up_tile, (e + 1) * up_row_tiles - 1, UP_SHIFT, row_tile, f, in,
        eps);
}
#endif

#ifdef EXPERTS_DOWN
// ---------------------------------------------------------------- down ----------------------
// The slots' tiles as one list: the expert's tile and its place in x behind each entry.
struct Slots {
    int expert;      // lane s: of slot s, -1 if not here
    float weight;    // lane s: of slot s
    int slot, tile;  // the next entry

    __device__ __forceinline__ void start(int at, int n_col_tiles) {
        slot = at / n_col_tiles, tile = at % n_col_tiles;
    }
    __device__ __forceinline__ void next(int n_col_tiles) {
        if (++tile == n_col_tiles) tile = 0, slot++;
    }
};

extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
experts_down_few(float* y, const unsigned char* down, const unsigned char* shared_down,
                 const float* h, const int* ids, const float* weights, int n_used, int d, int f,
                 int fs, int n_col_tiles, int shared_col_tiles, int skip, int shared_skip, int first,
                 int held, long long ldh, long long ldy) {
    __shared__ FewSums<N_WARPS, 1, 1> sums;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.y;
    const int row_tiles = (d + 15) / 16;
    const float* x = h + token * ldh;
    float acc[1][2] = {{0.f, 0.f}};
    pdl_launch();

    // Whatever doesn't depend on the choice of experts goes first.
#if WTYPE1 >= 0
    const FewIn shared_in = {x + n_used * f, nullptr, 0, 1, fs, shared_skip};
    FewTiles<N_AHEAD_SHARED, WTYPE1> shared;
    FewReader<N_AHEAD_SHARED, 0, false> shared_x;
    shared.view = tile_view<WTYPE1>(shared_down, row_tiles, shared_col_tiles);
    shared.first = (long long)blockIdx.x * shared_col_tiles;
    const int other = N_WARPS - 1 - warp;  // evens out who has a tile more
    const int shared_from = shared_col_tiles * other / N_WARPS;
    const int shared_to = shared_col_tiles * (other + 1) / N_WARPS;
#pragma unroll
    for (int i = 0; i < N_AHEAD_SHARED; i++)
        shared.load(i, shared_from + i, lane, shared_from + i < shared_to);
#endif
#if !AFTER_UP
    pdl_wait();
#endif
    // AFTER_UP: experts_up_few starts this launch only when all of it has waited for the choice.
    Slots ahead, now;
    ahead.expert = lane < n_used ? ids[token * n_used + lane] - first : -1;
    if (ahead.expert >= held) ahead.expert = -1;
    ahead.weight = ahead.expert >= 0 ? weights[token * n_used + lane] : 0.f;
    const TileView<WTYPE0> view = tile_view<WTYPE0>(down, (long long)held * row_tiles, n_col_tiles);
    const int all = n_used * n_col_tiles, from = all * warp / N_WARPS, to = all * (warp + 1) / N_WARPS;
    ahead.start(from, n_col_tiles);
    now = ahead;
    TileData<WTYPE0> w[N_AHEAD];
    float v[N_AHEAD][4];
    const auto load = [&](int i, int at) {
        const int e = __shfl_sync(~0u, ahead.expert, ahead.slot);
        const long long tile = (e * row_tiles + (int)blockIdx.x) * (long long)n_col_tiles + ahead.tile;
        few_tile<WTYPE0>(view, tile, lane, at < to && e >= 0, w[i]);
        ahead.next(n_col_tiles);
    };
    const auto fetch = [&](int i, int at) {  // x times the slot's weight
        const int e = __shfl_sync(~0u, now.expert, now.slot);
        const float weight = __shfl_sync(~0u, now.weight, now.slot) * FEW_X;
        few_columns(x + now.slot * f, 64 * now.tile + 16 * (lane >> 3) + 2 * (lane & 3) - skip,
                    at < to && e >= 0 ? f : 0, v[i]);
#pragma unroll
        for (int k = 0; k < 4; k++) v[i][k] *= weight;
        now.next(n_col_tiles);
    };
#pragma unroll
    for (int i = 0; i < N_AHEAD; i++) load(i, from + i);
#if AFTER_UP
    pdl_wait();
#endif
#pragma unroll
    for (int i = 0; i < N_AHEAD; i++) fetch(i, from + i);

#if WTYPE1 >= 0
#pragma unroll
    for (int i = 0; i < N_AHEAD_SHARED; i++)
        shared_x.fetch(shared_in, i, shared_from + i, lane, shared_from + i < shared_to);
    for (int at = shared_from; at < shared_to; at += N_AHEAD_SHARED) {
#pragma unroll
        for (int i = 0; i < N_AHEAD_SHARED; i++) {
            const int next = at + i + N_AHEAD_SHARED;
            shared.add(i, shared_x.fragment(shared_in, i, at + i, lane, true), lane, acc);
            shared.load(i, next, lane, next < shared_to);
            shared_x.fetch(shared_in, i, next, lane, next < shared_to);
        }
    }
#endif
    for (int at = from; at < to; at += N_AHEAD) {
#pragma unroll
        for (int i = 0; i < N_AHEAD; i++) {
            few_add<WTYPE0>(w[i], few_x(v[i], lane), lane, acc[0]);
            load(i, at + i + N_AHEAD);
            fetch(i, at + i + N_AHEAD);
        }
    }
    few_store(sums, acc);
    const int row = threadIdx.x, o = 16 * blockIdx.x + row;
    float old = 0.f;
    if (WITH_ADD && row < 16 && o < d) old = y[token * ldy + o];
    __syncthreads();
    if (row < 16 && o < d) y[token * ldy + o] = old + sums.sum(0, 0, row);
}
#endif
