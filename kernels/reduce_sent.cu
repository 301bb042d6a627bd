// Op        reduce_sent: as reduce_few (reduce_peer.cu) where the product before it has sent this
//           GPU's partial itself (Post in post.cuh): only gathers. x += sum over the held ranks r, in
//           rank order, of partial_r
// Shapes    x [n], n <= 2 threads
// Dtypes    float32
// Grid      as reduce_few's for n on the other GPUs; as many threads as take n by twos
// Assumes   as reduce_few; this GPU has one rank, which is held. The launch before is the product that
//           sends, and starts this one only when all of it has waited for what was before it
// Variants  N_GPUS=2 N_RANKS=2; N_GPUS=4 N_RANKS=5; N_GPUS=8 N_RANKS=8
// Spills    none
// Numerics  reduce_few's bits
// Bound by  a packet's way from the slowest GPU
// Sources   peers.cuh
// Tested by tests/kernels/test_peers.py, tests/gpu/test_collectives.py, tests/gpu/test_cuda_ranks.py
#include "peers.cuh"

extern "C" __global__ void reduce_sent(float* x, const void* table, void* own, int me, int held,
                                       int silent, int n, long long homes, long long room,
                                       int limit_ms) {
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    Peers peers;
    pdl_launch();
    peers.find((const PeerWord*)table, own, me, limit_ms);
    // Before pdl_wait(): the sum before is over, as the product that starts this launch has waited
    // for it, so the count stands, and so does x; past L1, which may hold what x was.
    peers.begin();
    if (i < n) {
        float v[N_RANKS][2], old[2];
        load_pair(x + i, old[0], old[1]);
        bool all;
        do {  // polls of all ranks under way at once
            all = true;
            int missing = 0;
#pragma unroll
            for (int r = 0; r < N_RANKS; r++) {
                if (!(held >> r & 1)) continue;
                PeerWord a, b;
                get_words(peers.inbox(me, r, room) + i, a, b);
                v[r][0] = __uint_as_float((unsigned)a), v[r][1] = __uint_as_float((unsigned)b);
                if (!peers.is_now(a, b)) all = false, missing = (int)(homes >> 4 * r & 15);
            }
            if (!all && peers.gives_up(missing)) break;
        } while (!all);
        bool any = false;
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int r = 0; r < N_RANKS; r++) {
            if (!(held >> r & 1)) continue;
#pragma unroll
            for (int k = 0; k < 2; k++) sum[k] = any ? sum[k] + v[r][k] : v[r][k];
            any = true;
        }
        pdl_wait();
        *(float2*)(x + i) = make_float2(old[0] + sum[0], old[1] + sum[1]);
    } else {
        pdl_wait();
    }
    peers.count();
    peers.nod(silent);
}
