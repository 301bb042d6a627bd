// Op        experts_up_bulk: h[t][s] = silu(gate_e . x[t]) * (up_e . x[t]), e = ids[t][s], x normed as in
//           matvec.cu; ids and weights are chosen of `scores` as in route.cu, by every CTA for itself; and beside it beside[t] = shared_down h[t][K]
//           experts_down_bulk: y[t] (or y[t] +=: WITH_ADD) beside[t] + sum_s weights[t][s] down_e h[t][s]
// Shapes    h [n, K f + fs], rows ldh apart: slot s at s f, the shared expert's at K f (matvec_route.cu writes
//           it); x, y [n, d], beside [n, d], scores [n, E], bias [E] or
//           null, pos [n] or null, imposed [n, K] or null; gate, up [E, f, d], down [E, d, f],
//           shared_down [d, fs] in tiles (tiles.cuh). n <= 8
// Dtypes    gate WTYPE0, up WTYPE1, shared_down WTYPE2; down WTYPE0; the rest float32
// Grid      up (ceil(d / 16) + K ceil(f / 16), n), N_WARPS warps: first row tiles of shared_down, then the slots';
//           down (ceil(d / 16), n), K N_PARTS warps. Dynamic shared memory: the row tiles of a CTA
// Assumes   the launch before up is scores_gated, which lets it start once x is complete; the launch before down
//           is up, which lets it start once scores are. E = N_EXPERTS, K <= 32, groups <= 64. d, f, fs are whole column tiles:
//           64 N_COL_TILES(_SHARED). Experts first .. first + held - 1 are here, others add nothing
// Numerics  as matvec.cu. NMSE to float64 <= 1e-9
// Bound by  bytes of the chosen experts
// Needs     9.0
// Variants  EXPERTS_UP=1 N_WARPS=4 N_CTAS=5 N_COL_TILES=32 N_COL_TILES_SHARED=44 WTYPE0=12 WTYPE1=12 WTYPE2=14 N_EXPERTS=64;
//           EXPERTS_UP=1 N_WARPS=8 N_CTAS=2 N_COL_TILES=5 N_COL_TILES_SHARED=7 WTYPE0=8 WTYPE1=7 WTYPE2=1 N_EXPERTS=160;
//           EXPERTS_DOWN=1 N_USED=6 N_PARTS=4 N_COL_TILES=22 WITH_ADD=1 WTYPE0=6 N_EXPERTS=64;
//           EXPERTS_DOWN=1 N_USED=4 N_PARTS=4 N_COL_TILES=24 WITH_ADD=0 WTYPE0=14 N_EXPERTS=64
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_bulk.cuh"
#include "mla_splits.cuh"
#include "route.cuh"

#ifdef SIMT
extern thread_local unsigned char ring[];
#else
__align__(128) extern __shared__ unsigned char ring[];
#endif

// A token's choice in shared memory, by the first warp.
struct Chosen {
    int ids[32];
    float weights[32], score[N_EXPERTS], group[64];

    __device__ __forceinline__ void make(int token, const float* scores, const float* bias, const int* pos,
                                         const int* imposed, const Choice& how) {
        choose(ids, weights, scores + token * N_EXPERTS, bias,
               imposed ? imposed + token * how.n_used : nullptr, pos && position(pos, token) < 0, how, score, group);
    }
};

#ifdef EXPERTS_UP
// ---------------------------------------------------------------- up ------------------------
extern "C" __global__ void __launch_bounds__(32 * N_WARPS, N_CTAS)
experts_up_bulk(float* h, float* beside, const unsigned char* gate, const unsigned char* up,
                const unsigned char* shared_down, const float* x, const float* norm,
                const float* scores, const float* bias, const int* pos, const int* imposed, int n_used,
                int n_groups, int n_groups_used, int sigmoid, int renormalise, int d, int f,
                int gate_row_tiles, int up_row_tiles, int up_row, int first, int held, long long ldx,
                long long ldh, float eps) {
    __shared__ float part[2][N_WARPS][16], squared[N_WARPS];
    __shared__ RowBarrier bar;
    __shared__ Chosen chosen;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.y;
    const int down_tiles = (d + 15) / 16;
    h += token * ldh, x += token * ldx;
    float squares = 0.f;
    if (threadIdx.x == 0) row_init(&bar, 1);
    if (blockIdx.x < down_tiles) {
        using Streams = RowStreams<N_COL_TILES_SHARED, WTYPE2>;
        if (threadIdx.x == 0) {
            Streams w;
            w.start(tile_view<WTYPE2>(shared_down, down_tiles, N_COL_TILES_SHARED),
                    (long long)blockIdx.x * N_COL_TILES_SHARED, 0, 0);
            row_expect(&bar, Streams::nbytes);
            row_fetch(w, ring, &bar);
        }
        __syncthreads();
        RowX<N_COL_TILES_SHARED, N_WARPS> in;
        pdl_wait();
        pdl_launch();  // not earlier: see Assumes
        in.template take<false>(warp, h + n_used * f, nullptr, squares);
        row_wait(&bar);
        float acc[1][2];
        in.template product<Streams>(warp, ring, acc);
        if ((lane & 3) == 0)
            part[0][warp][lane >> 2] = acc[0][0], part[0][warp][8 + (lane >> 2)] = acc[0][1];
        __syncthreads();
        const int o = 16 * blockIdx.x + threadIdx.x;
        if (threadIdx.x < 16 && o < d) {
            float sum = part[0][0][threadIdx.x];
#pragma unroll
            for (int w = 1; w < N_WARPS; w++) sum += part[0][w][threadIdx.x];
            beside[(long long)token * d + o] = sum;
        }
        return;
    }
    using Streams = RowStreams<N_COL_TILES, WTYPE0, WTYPE1>;
    const int row_tiles = (f + 15) / 16, item = blockIdx.x - down_tiles, slot = item / row_tiles;
    const int row_tile = item - slot * row_tiles;
    __syncthreads();
    RowX<N_COL_TILES, N_WARPS> in;
    in.template take<true>(warp, x, norm, squares);
    pdl_wait();
    pdl_launch();  // not earlier: see Assumes
    const Choice how = {n_used, n_groups, n_groups_used, sigmoid, renormalise, 1.f};
    if (warp == 0) chosen.make(token, scores, bias, pos, imposed, how);
    __syncthreads();
    const int e = chosen.ids[slot] - first;
    if (e < 0 || e >= held) return;  // the whole CTA
    if (threadIdx.x == 0) {
        Streams w;
        RowStreams<N_COL_TILES, WTYPE1>& second = w;
        w.start(tile_view<WTYPE0>(gate, (long long)held * gate_row_tiles, N_COL_TILES),
                ((long long)e * gate_row_tiles + row_tile) * N_COL_TILES, 0, 0);
        second.start(tile_view<WTYPE1>(up, (long long)held * up_row_tiles, N_COL_TILES),
                     ((long long)e * up_row_tiles + row_tile + up_row / 16) * N_COL_TILES, 0, 0);
        row_expect(&bar, Streams::nbytes);
        row_fetch(w, ring, &bar);
    }
    squares = warp_sum(squares) * 0.5f;  // two lanes hold each value: for hi and for lo
    if (lane == 0) squared[warp] = squares;
    row_wait(&bar);
    float acc[2][2];
    in.template product<Streams>(warp, ring, acc);
    if ((lane & 3) == 0) {
#pragma unroll
        for (int k = 0; k < 2; k++)
            part[k][warp][lane >> 2] = acc[k][0], part[k][warp][8 + (lane >> 2)] = acc[k][1];
    }
    __syncthreads();
    const int o = 16 * row_tile + threadIdx.x;
    if (threadIdx.x < 16 && o < f) {
        float sum[2] = {0.f, 0.f}, square = 0.f;
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) {
            sum[0] += part[0][w][threadIdx.x], sum[1] += part[1][w][threadIdx.x];
            square += squared[w];
        }
        const float scale = rsqrtf(square / d + eps);
        h[slot * f + o] = few_swiglu(scale * sum[0], scale * sum[1]);
    }
}
#endif

#ifdef EXPERTS_DOWN
// ---------------------------------------------------------------- down ----------------------
constexpr int N_WARPS = N_USED * N_PARTS;

extern "C" __global__ void __launch_bounds__(32 * N_WARPS)
experts_down_bulk(float* y, const unsigned char* down, const float* beside, const float* h,
                  const float* scores, const float* bias, const int* pos, const int* imposed,
                  int n_groups, int n_groups_used, int sigmoid, int renormalise, int d, int f, int first,
                  int held, long long ldh, long long ldy, float scale) {
    using Streams = RowStreams<N_COL_TILES, WTYPE0>;
    __shared__ float parts[N_WARPS][16];
    __shared__ RowBarrier bars[N_USED];
    __shared__ Chosen chosen;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, token = blockIdx.y;
    const int slot = warp / N_PARTS, part = warp % N_PARTS, row_tiles = (d + 15) / 16;
    unsigned char* stage = ring + slot * Streams::nbytes;
    if (part == 0 && lane == 0) row_init(bars + slot, 1);
    pdl_launch();
    const Choice how = {N_USED, n_groups, n_groups_used, sigmoid, renormalise, scale};
    if (warp == 0) chosen.make(token, scores, bias, pos, imposed, how);
    __syncthreads();
    const int e = chosen.ids[slot] - first;
    const bool there = e >= 0 && e < held;
    const float weight = chosen.weights[slot];
    if (part == 0 && lane == 0) {
        row_expect(bars + slot, there ? Streams::nbytes : 0);
        if (there) {
            Streams w;
            w.start(tile_view<WTYPE0>(down, (long long)held * row_tiles, N_COL_TILES),
                    ((long long)e * row_tiles + blockIdx.x) * N_COL_TILES, 0, 0);
            row_fetch(w, stage, bars + slot);
        }
    }
    const int o = 16 * blockIdx.x + threadIdx.x;
    float old = 0.f;  // nobody writes y while up runs
    if (WITH_ADD && threadIdx.x < 16 && o < d) old = y[token * ldy + o];
    pdl_wait();
    RowX<N_COL_TILES, N_PARTS> in;
    float acc[1][2] = {}, squares = 0.f;
    if (there) in.template take<false>(part, h + token * ldh + slot * f, nullptr, squares);
    if (threadIdx.x < 16 && o < d) old += beside[(long long)token * d + o];
    row_wait(bars + slot);
    if (there) in.template product<Streams>(part, stage, acc);
    if ((lane & 3) == 0)
        parts[warp][lane >> 2] = weight * acc[0][0], parts[warp][8 + (lane >> 2)] = weight * acc[0][1];
    __syncthreads();
    if (threadIdx.x < 16 && o < d) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum += parts[w][threadIdx.x];
        y[token * ldy + o] = old + sum;
    }
}
#endif
