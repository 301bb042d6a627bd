// Op        scores_gated: what experts_up_bulk needs and what doesn't need the choice, in one launch: the
//           gate's scores (as in route.cu) beside the shared expert's
//           h[t] = silu(gate . x[t]) * (up . x[t]) (as gated_few of matvec.cu), of one normed x
// Shapes    scores [n, E], h [n, fs] rows ldh apart, route_gate [E, d], x [n, d], norm [d]; gate, up [fs, d] in
//           tiles. n <= 8
// Dtypes    route_gate, x, norm, scores, h float32; gate WTYPE0, up WTYPE1
// Grid      (E + ctas, n), 256 threads: one CTA per expert's score of all tokens, then the shared expert's, one token
//           each
// Assumes   d = 64 N_COL_TILES
// Numerics  as in route.cu and matvec.cu
// Bound by  bytes of the shared expert
// Variants  N_STAGES=2 N_ROWS=2 N_CTAS=1 N_AHEAD=4 N_COL_TILES=32 WTYPE0=12 WTYPE1=8
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_rows.cuh"
#include "route_scores.cuh"

constexpr int N_WARPS = ROUTE_WARPS, D = 64 * N_COL_TILES;
using Share = OneShare<N_COL_TILES, N_WARPS, N_AHEAD>;
template <int... Q>
using Streams = typename OnePick<(N_STAGES > 0 && OneStaged<N_COL_TILES>::fits), Share, Q...>::type;

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(256, N_CTAS)
scores_gated(float* scores, float* h, const float* route_gate, const unsigned char* gate,
             const unsigned char* up, const float* x, const float* norm, int n_experts, int n, int fs,
             int ctas, long long ldx, long long ldh, float eps) {
    __shared__ union {
        struct {
            OneStaged<N_COL_TILES> staged;
            OneSums<N_WARPS, N_ROWS, 2> sums;
        } gated;
        ScoreSums route;
    } memory;
    const int token = blockIdx.y;
    if (blockIdx.x < n_experts) {
        if (token == 0)  // for all
            score_cta(memory.route, scores, blockIdx.x, n_experts, route_gate, x, norm, n, D, ldx, eps);
        else
            pdl_wait(), pdl_launch();
        return;
    }
    x += token * ldx;
    const int cta = blockIdx.x - n_experts, row_tiles = (fs + 15) / 16, row = threadIdx.x & 15;
    const auto of_gate = tile_view<WTYPE0>(gate, row_tiles, N_COL_TILES);
    const auto of_up = tile_view<WTYPE1>(up, row_tiles, N_COL_TILES);
    using Pair = Streams<WTYPE0, WTYPE1>;
    Pair streams;
    const auto seek = [&](Pair& s, int k) {
        const int at = cta + k * ctas, lane = threadIdx.x & 31, begin = Share::from(threadIdx.x >> 5);
        if (at >= row_tiles) return false;
        const long long first = (long long)at * N_COL_TILES;
        Streams<WTYPE1>& second = s;
        s.start(of_gate, first, begin, lane);
        second.start(of_up, first, begin, lane);
        return true;
    };
    const int n_rows = (row_tiles - cta + ctas - 1) / ctas;
    auto& sums = memory.gated.sums;
    one_cta<true, false, N_STAGES>(sums, memory.gated.staged, streams, n_rows, seek, x, norm, D, 0);
    __syncthreads();
    const float inverse = sums.norm(D, eps);
    for (int k = threadIdx.x >> 4; k < n_rows; k += 2 * N_WARPS) {
        const int o = 16 * (cta + k * ctas) + row;
        if (o < fs)
            h[token * ldh + o] = few_swiglu(inverse * sums.sum(k, 0, row), inverse * sums.sum(k, 1, row));
    }
}
