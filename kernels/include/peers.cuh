// GPUs of one host that reach each other's mail: counted steps, packets that carry their number,
// flags per CTA, and waits that end. Every GPU launches the same kernels in the same order, with
// equal grids of a power of two of CTAs, at most PEER_CTAS.
//
// A GPU's own words (PeerOwn) lie in its memory. Its mail (written by the others, read by itself):
//   unsigned started[16][PEER_CTAS], done[16][PEER_CTAS]     by sending GPU and CTA: a step's number
//   unsigned long long inbox[2][N_RANKS][room]               packets: float32 | step's number << 32
// A packet is one 64-bit word and its number is the step's, so there is nothing to clear, and what
// an earlier message of another size left behind is never taken for this one. Two inboxes, used in
// turn, suffice: a GPU begins step s + 2 when s + 1 has ended, for which every other GPU sent
// something, which it does after it has ended s. So in every step every GPU sends to every other
// one: a GPU without a partial sets `started`.
//
// Who sends. The sum's own kernel, what a product left in its slot (reduce_peer.cu). Or the product,
// one token's, where it is computed (post.cuh): it waits for the launches before it, so the sum before
// has ended here when it sends, which is all that the argument above asks of a sender; and the counter
// is that sum's. What it sends is added up by the next launch (reduce_sent.cu), which begins before the
// product ends but not before it has waited, so the counter and the residual stream are the last sum's
// for it too. Both ways give equal bits, and GPUs may mix them.
// Sources: the packets are those of NCCL's LL protocol (src/device/prims_ll.h, BSD); the rest own.
// Tested by: tests/kernels/test_peers.py (all interleavings of a model), tests/gpu/test_collectives.py
#pragma once
#include "post.cuh"

#define PEER_CTAS 128

// ---------------------------------------------------------------- a step ---------------------
// A thread's view of one step.
struct Peers : Patience {
    char* mail[N_GPUS];  // by GPU
    unsigned step;
    int me;

    // `table`: addresses of all mails, then the alarm's. What it needs may be read before pdl_wait().
    __device__ __forceinline__ void find(const PeerWord* table, void* words, int gpu, int limit) {
#pragma unroll
        for (int g = 0; g < N_GPUS; g++) mail[g] = (char*)table[g];
        alarm = (int*)table[N_GPUS];
        own = (PeerOwn*)words, me = gpu, limit_ms = limit, polls = 0, since = 0;
    }
    // After pdl_wait(), by all threads; then count() by all, once.
    __device__ __forceinline__ void begin() {
        step = (unsigned)(*(volatile PeerWord*)&own->ticks / PEER_TICKS) + 1;
        broken = *(volatile int*)&own->error != 0;
    }
    // All threads of the CTA have read the counter: the CTA's share of a step's ticks. Until the
    // last CTA adds its own the quotient stays, so all CTAs see one number without waiting.
    __device__ __forceinline__ void count() {
        __syncthreads();
        if (threadIdx.x == 0) atomicAdd(&own->ticks, (PeerWord)(PEER_TICKS / gridDim.x));
    }
    __device__ __forceinline__ PeerWord* inbox(int gpu, int rank, long long room) const {
        return (PeerWord*)(mail[gpu] + 2 * 16 * PEER_CTAS * sizeof(unsigned))
               + ((long long)(step & 1) * N_RANKS + rank) * room;
    }
    // The flag that `from` raises for this CTA in `gpu`'s mail; `done`: the second of a step.
    __device__ __forceinline__ unsigned* flag(int gpu, int from, int done) const {
        return (unsigned*)mail[gpu] + (done * 16 + from) * PEER_CTAS + blockIdx.x;
    }
    __device__ __forceinline__ void await(const unsigned* at, int gpu) {
        while ((int)(read_flag(at) - step) < 0 && !gives_up(gpu)) {}
    }
    // Thread g tells GPU g that this CTA is here, and waits until it is there too.
    __device__ __forceinline__ void meet(int done) {
        const int g = threadIdx.x;
        if (g < N_GPUS && g != me) {
            raise_flag(flag(g, me, done), step);
            await(flag(me, g, done), g);
        }
        __syncthreads();
    }
    // The step's sign of life from and to GPUs that send no packets; `silent` by bits.
    __device__ __forceinline__ void nod(int silent) {
        const int g = threadIdx.x;
        if (g >= N_GPUS || g == me) return;
        if (silent >> me & 1) raise_flag(flag(g, me, 0), step);
        if (silent >> g & 1) await(flag(me, g, 0), g);
    }
    __device__ __forceinline__ PeerWord packet(float v) const {
        return (PeerWord)step << 32 | __float_as_uint(v);
    }
    __device__ __forceinline__ bool is_now(PeerWord a, PeerWord b) const {
        return (unsigned)(a >> 32) == step && (unsigned)(b >> 32) == step;
    }
};
