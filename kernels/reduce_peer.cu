// Op        reduce_few: x_i += sum over the held ranks r, in rank order, of rounded(partial_r), for
//           each residual stream x_i of this GPU's ranks. One shot: every GPU pushes its ranks'
//           partials into the mail of all others and adds up what it was sent
// Shapes    x_i [n], slots [N_MINE][stride]: partials of this GPU's ranks, as many as it has; n <= room
// Dtypes    float32; REDUCE_TYPE: what partials are rounded to before the sum (partials.cuh)
// Grid      (power of two up to 128, the same on all GPUs), 32 to 1024 threads
// Assumes   n, stride and room divisible by 4; homes: the GPU of rank r in bits 4r..; held, mine and
//           silent (GPUs without held rank) by bits; ranks of one GPU in the order of their streams.
//           N_GPUS=1: no mail, table holds no addresses
// Variants  N_GPUS=2 N_RANKS=2 N_MINE=1 REDUCE_TYPE=0; N_GPUS=1 N_RANKS=3 N_MINE=3 REDUCE_TYPE=8;
//           N_GPUS=4 N_RANKS=5 N_MINE=2 REDUCE_TYPE=30; N_GPUS=8 N_RANKS=8 N_MINE=1 REDUCE_TYPE=0
// Spills    none
// Numerics  one rounding per addition, in rank order: equal bits on all ranks
// Bound by  a store's way to the peer and back: 8 n bytes to each peer
// Sources   peers.cuh
// Tested by tests/kernels/test_peers.py, tests/gpu/test_collectives.py
#include "peers.cuh"
#include "partials.cuh"

extern "C" __global__ void reduce_few(float* x0, float* x1, float* x2, float* x3, float* x4,
                                      float* x5, float* x6, float* x7, const float* slots,
                                      const void* table, void* own, int me, int mine, int held,
                                      int silent, int n, long long homes, long long stride,
                                      long long room, int limit_ms) {
    const Streams streams = {{x0, x1, x2, x3, x4, x5, x6, x7}};
    const int step = 4 * gridDim.x * blockDim.x, first = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    Peers peers;
    pdl_launch();
    if (N_GPUS > 1) peers.find((const PeerWord*)table, own, me, limit_ms);
    pdl_wait();
    if (N_GPUS > 1) {
        peers.begin();
        for (int i = first; i < n; i += step) {
            int slot = 0;
#pragma unroll
            for (int r = 0; r < N_RANKS; r++) {
                if (!(mine >> r & 1)) continue;
                const float* partial = slots + stride * slot++;
                if (!(held >> r & 1)) continue;
                const float4 v = rounded(*(const float4*)(partial + i));
                const PeerWord a = peers.packet(v.x), b = peers.packet(v.y), c = peers.packet(v.z),
                               d = peers.packet(v.w);
#pragma unroll
                for (int g = 0; g < N_GPUS; g++) {
                    if (g == me) continue;
                    PeerWord* to = peers.inbox(g, r, room) + i;
                    put_words(to, a, b);
                    put_words(to + 2, c, d);
                }
            }
        }
        peers.count();
        peers.nod(silent);
    }
    for (int i = first; i < n; i += step) {
        float4 x[N_MINE], v[N_RANKS];
#pragma unroll
        for (int k = 0; k < N_MINE; k++) x[k] = *(const float4*)(streams.at[k] + i);
        int slot = 0;
#pragma unroll
        for (int r = 0; r < N_RANKS; r++)
            if (mine >> r & 1) {
                if (held >> r & 1) v[r] = rounded(*(const float4*)(slots + stride * slot + i));
                slot++;
            }
        if (N_GPUS > 1) {
            bool all;
            do {  // polls of all ranks under way at once
                all = true;
                int missing = 0;
#pragma unroll
                for (int r = 0; r < N_RANKS; r++) {
                    if (!(held >> r & 1) || (mine >> r & 1)) continue;
                    const PeerWord* from = peers.inbox(me, r, room) + i;
                    PeerWord a, b, c, d;
                    get_words(from, a, b);
                    get_words(from + 2, c, d);
                    v[r] = make_float4(__uint_as_float((unsigned)a), __uint_as_float((unsigned)b),
                                       __uint_as_float((unsigned)c), __uint_as_float((unsigned)d));
                    if (!peers.is_now(a, b) || !peers.is_now(c, d))
                        all = false, missing = (int)(homes >> 4 * r & 15);
                }
                if (!all && peers.gives_up(missing)) break;
            } while (!all);
        }
        bool any = false;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int r = 0; r < N_RANKS; r++) {
            if (!(held >> r & 1)) continue;
            if (any)
                add_to(sum, v[r]);
            else
                sum = v[r], any = true;
        }
#pragma unroll
        for (int k = 0; k < N_MINE; k++) {
            add_to(x[k], sum);
            *(float4*)(streams.at[k] + i) = x[k];
        }
    }
}
