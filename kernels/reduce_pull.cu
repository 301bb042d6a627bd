// Op        reduce_many: as reduce_few (reduce_peer.cu) for long messages: GPUs read each other's
//           partials where they are. SHOTS=1: each GPU reads all of all. SHOTS=2: GPU g reads part
//           g of all, and writes the sum over part g of one rank's partial on every GPU
// Shapes    x_i [n]; partial_r [n] at the table's address of rank r; SHOTS=2 overwrites partials
// Dtypes    float32; REDUCE_TYPE as in reduce_peer.cu
// Grid      (power of two up to 128, the same on all GPUs), at least N_GPUS threads
// Assumes   n divisible by 4; the table's words: N_GPUS mails, the alarm, N_RANKS partials, N_GPUS
//           partials that take the sum (one of each GPU's ranks). held and N_MINE as in reduce_few
// Variants  N_GPUS=2 N_RANKS=2 N_MINE=1 REDUCE_TYPE=0 SHOTS=1; N_GPUS=2 N_RANKS=3 N_MINE=2
//           REDUCE_TYPE=1 SHOTS=1; N_GPUS=4 N_RANKS=4 N_MINE=1 REDUCE_TYPE=0 SHOTS=2; N_GPUS=8
//           N_RANKS=8 N_MINE=1 REDUCE_TYPE=8 SHOTS=2
// Spills    none
// Numerics  one rounding per addition, in rank order: equal bits on all ranks
// Bound by  the link: (N_GPUS - 1) 4 n bytes into each GPU with one shot, 2 (N_GPUS - 1) / N_GPUS 4 n
//           with two
// Sources   peers.cuh; two shots as in NCCL's and vLLM's custom all-reduce (reduce-scatter, all-gather)
// Tested by tests/kernels/test_peers.py, tests/gpu/test_collectives.py
#include "peers.cuh"
#include "partials.cuh"

#ifndef UNROLL
#define UNROLL (N_RANKS > 4 ? 2 : 4)
#endif

// The sum at i of all held ranks' partials, in rank order.
struct Sources {
    const float* at[N_RANKS];
    int held;
    __device__ __forceinline__ void load(float4 (&v)[N_RANKS], long long i) const {
#pragma unroll
        for (int r = 0; r < N_RANKS; r++)
            if (held >> r & 1) v[r] = load_peer(at[r] + i);
    }
    __device__ __forceinline__ float4 sum(const float4 (&v)[N_RANKS]) const {
        bool any = false;
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int r = 0; r < N_RANKS; r++) {
            if (!(held >> r & 1)) continue;
            if (any)
                add_to(total, rounded(v[r]));
            else
                total = rounded(v[r]), any = true;
        }
        return total;
    }
};

// f(i, sum at i) for each fourth i of [from, to) that is this thread's.
template <class F>
__device__ __forceinline__ void each_sum(const Sources& in, long long from, long long to, F f) {
    const long long step = 4ll * gridDim.x * blockDim.x;
    long long i = from + 4ll * (blockIdx.x * blockDim.x + threadIdx.x);
    for (; i + (UNROLL - 1) * step < to; i += UNROLL * step) {
        float4 v[UNROLL][N_RANKS];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) in.load(v[u], i + u * step);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) f(i + u * step, in.sum(v[u]));
    }
    for (; i < to; i += step) {
        float4 v[N_RANKS];
        in.load(v, i);
        f(i, in.sum(v));
    }
}

extern "C" __global__ void reduce_many(float* x0, float* x1, float* x2, float* x3, float* x4,
                                       float* x5, float* x6, float* x7, const void* table,
                                       void* own, int me, int held, long long n, int limit_ms) {
    const Streams streams = {{x0, x1, x2, x3, x4, x5, x6, x7}};
    const PeerWord* addresses = (const PeerWord*)table;
    const auto add = [&](long long i, float4 sum) {
#pragma unroll
        for (int k = 0; k < N_MINE; k++) {
            float4* at = (float4*)(streams.at[k] + i);
            float4 x = *at;
            add_to(x, sum);
            *at = x;
        }
    };
    Peers peers;
    Sources in;
    pdl_launch();
    peers.find(addresses, own, me, limit_ms);
#pragma unroll
    for (int r = 0; r < N_RANKS; r++) in.at[r] = (const float*)addresses[N_GPUS + 1 + r];
    in.held = held;
    pdl_wait();
    peers.begin();
    peers.count();
    peers.meet(0);  // all partials are there
#if SHOTS == 1
    each_sum(in, 0, n, add);
    __syncthreads();
    peers.meet(1);  // nobody reads mine any more
#else
    const long long part = (n / 32 + N_GPUS) / N_GPUS * 32;  // whole blocks
    float* sums[N_GPUS];
#pragma unroll
    for (int g = 0; g < N_GPUS; g++) sums[g] = (float*)addresses[N_GPUS + 1 + N_RANKS + g];
    // Part `me` of a partial is read here alone, by the thread that then overwrites it.
    each_sum(in, part * me, min(part * (me + 1), n), [&](long long i, float4 sum) {
#pragma unroll
        for (int k = 0; k < N_GPUS; k++) {
            const int g = (me + k) % N_GPUS;
#pragma unroll
            for (int j = 0; j < N_GPUS; j++)
                if (j == g) store_peer(sums[j] + i, sum);
        }
    });
    __syncthreads();
    peers.meet(1);  // this CTA's share of all parts is here: each CTA reads what its like wrote
    const float* mine = sums[0];
#pragma unroll
    for (int g = 1; g < N_GPUS; g++)
        if (g == me) mine = sums[g];
    const long long step = 4ll * gridDim.x * blockDim.x;
    for (int g = 0; g < N_GPUS; g++) {
        const long long end = min(part * (g + 1), n);
        long long i = part * g + 4ll * (blockIdx.x * blockDim.x + threadIdx.x);
#pragma unroll 4
        for (; i < end; i += step) add(i, load_peer(mine + i));
    }
#endif
}
