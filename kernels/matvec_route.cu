// Op        route_gated: what experts_up_few needs and what doesn't need the choice, in one launch: the
//           gate's choice (as route_few of route.cu) beside the shared expert's
//           h[t] = silu(gate . x[t]) * (up . x[t]) (as gated_few of matvec.cu), of one normed x
// Shapes    ids, weights [n, K], h [n, fs] rows ldh apart, route_gate [E, d], x [n, d], norm [d], bias [E] or
//           null, pos [n] or null, imposed [n, K] or null; gate, up [fs, d] in tiles. n <= 8
// Dtypes    route_gate, x, norm, bias, weights, h float32; ids, pos, imposed int32; gate WTYPE0, up WTYPE1
// Grid      (8 + ctas, a multiple of 8, n), 256 threads, clusters of 8: the first chooses, its CTAs have
//           E / 8 rows of the gate each and hand their scores to its first CTA
// Assumes   E = N_EXPERTS <= 1024, d = 64 N_COL_TILES a multiple of 128, K <= 32, groups <= 64
// Numerics  scores: each lane's columns in order, then a fixed tree; the rest as in route.cu, matvec.cu
// Bound by  latency of the choice, bytes of the shared expert
// Needs     9.0
// Variants  N_EXPERTS=64 N_STAGES=2 N_ROWS=2 N_CTAS=1 N_AHEAD=4 N_COL_TILES=32 WTYPE0=12 WTYPE1=8
// Sources   own
// Tested by tests/gpu/test_cuda_matvec.py
#include "matvec_rows.cuh"
#include "route.cuh"

constexpr int N_WARPS = 8, CLUSTER = 8, D = 64 * N_COL_TILES;
using Share = OneShare<N_COL_TILES, N_WARPS, N_AHEAD>;
template <int... Q>
using Streams = typename OnePick<(N_STAGES > 0 && OneStaged<N_COL_TILES>::fits), Share, Q...>::type;

// ---------------------------------------------------------------- device helpers ------------
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// to[e] of the cluster's first CTA = s
__device__ __forceinline__ void hand_over(float* to, float s) {
    const unsigned here = (unsigned)__cvta_generic_to_shared(to);
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(s) : "memory");
}

// Scores of this CTA's rows of the gate: a warp per row.
__device__ __forceinline__ void score_rows(
        float* scores, const float* gate, const float* x, const float* norm, float eps) {
    constexpr int QUADS = D / 128, AHEAD = QUADS < 16 ? QUADS : 16, GROUP = 4;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float4 w[AHEAD];
    float inverse = 0.f;
    bool first = true;
    for (int e = blockIdx.x * N_WARPS + warp; e < N_EXPERTS; e += CLUSTER * N_WARPS) {
        const float* row = gate + (long long)e * D;
        const auto weight = [&](int i) {
            unsigned a[4], b[4];
            few_load<4>((const unsigned char*)(row + 4 * (lane + 32 * i)), true, a);
            few_load<4>((const unsigned char*)(norm + 4 * (lane + 32 * i)), true, b);
            return make_float4(__uint_as_float(a[0]) * __uint_as_float(b[0]),
                               __uint_as_float(a[1]) * __uint_as_float(b[1]),
                               __uint_as_float(a[2]) * __uint_as_float(b[2]),
                               __uint_as_float(a[3]) * __uint_as_float(b[3]));
        };
#pragma unroll
        for (int i = 0; i < AHEAD; i++) w[i] = weight(i);
        if (first) pdl_wait(), pdl_launch();
        float sum = 0.f, square = 0.f;
        const auto add = [&](const float4& w, const float4& v) {
            sum += w.x * v.x + w.y * v.y + (w.z * v.z + w.w * v.w);
            square += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        };
        const float4* in = (const float4*)x;
#pragma unroll
        for (int i = 0; i < AHEAD; i += GROUP) {
            float4 v[GROUP];
#pragma unroll
            for (int k = 0; k < GROUP; k++)
                if (i + k < AHEAD) v[k] = in[lane + 32 * (i + k)];
#pragma unroll
            for (int k = 0; k < GROUP; k++)
                if (i + k < AHEAD) add(w[i + k], v[k]);
        }
        for (int i = AHEAD; i < QUADS; i++) add(weight(i), in[lane + 32 * i]);
        sum = warp_sum(sum);
        if (first) inverse = rsqrtf(warp_sum(square) / D + eps);
        if (first) cluster_wait();  // the first CTA has started
        first = false;
        if (lane == 0) hand_over(scores + e, sum * inverse);
    }
    if (first) pdl_wait(), pdl_launch(), cluster_wait();  // a warp without rows
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256, N_CTAS)
route_gated(int* ids, float* weights, float* h, const float* route_gate, const unsigned char* gate,
            const unsigned char* up, const float* x, const float* norm, const float* bias,
            const int* pos, const int* imposed, int fs, int ctas, int n_used, int n_groups,
            int n_groups_used, int sigmoid, int renormalise, long long ldx, long long ldh, float scale,
            float eps) {
    __shared__ union {
        struct {
            OneStaged<N_COL_TILES> staged;
            OneSums<N_WARPS, N_ROWS, 2> sums;
        } gated;
        struct {
            float handed[N_EXPERTS], score[N_EXPERTS], group[64];
        } route;
    } memory;
    const int token = blockIdx.y;
    x += token * ldx;
    if (blockIdx.x < CLUSTER) {
        cluster_arrive();
        score_rows(memory.route.handed, route_gate, x, norm, eps);
        cluster_arrive();
        if (blockIdx.x > 0) return;
        cluster_wait();
        if (threadIdx.x >= 32) return;
        const Choice how = {n_used, n_groups, n_groups_used, sigmoid, renormalise, scale};
        choose(ids + token * n_used, weights + token * n_used, memory.route.handed, bias,
               imposed ? imposed + token * n_used : nullptr, pos && pos[token] < 0, how,
               memory.route.score, memory.route.group);
        return;
    }
    const int cta = blockIdx.x - CLUSTER, row_tiles = (fs + 15) / 16, row = threadIdx.x & 15;
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
    const int n = (row_tiles - cta + ctas - 1) / ctas;
    auto& sums = memory.gated.sums;
    one_cta<true, false, N_STAGES>(sums, memory.gated.staged, streams, n, seek, x, norm, D, 0);
    __syncthreads();
    const float inverse = sums.norm(D, eps);
    for (int k = threadIdx.x >> 4; k < n; k += 2 * N_WARPS) {
        const int o = 16 * (cta + k * ctas) + row;
        if (o < fs)
            h[token * ldh + o] = few_swiglu(inverse * sums.sum(k, 0, row), inverse * sums.sum(k, 1, row));
    }
}
