// What several GPUs' kernels write to and read from each other: a GPU's own words, packets, and how a
// product sends its rank's partial by itself. The protocol is in peers.cuh.
// Sources: peers.cuh. Tested by: tests/kernels/test_peers.py, tests/gpu/test_collectives.py
#pragma once
#include "pdl.cuh"

#define PEER_TICKS 1024  // what the CTAs of a kernel add to the counter together

typedef unsigned long long PeerWord;

struct PeerOwn {
    PeerWord ticks;  // PEER_TICKS a step
    int error;       // 1 + a GPU that was waited for in vain
    int pad;
    PeerWord apart;     // bytes from an inbox to the one used in the next step
    PeerWord post[16];  // by GPU: the inbox there, of even steps, for this GPU's one rank
};

// ---------------------------------------------------------------- memory that others write ---
// Relaxed: a packet carries its own number; nothing else is read by virtue of it.
#ifdef SIMT
inline void put_word(PeerWord* at, PeerWord a) { *at = a; }
inline void put_words(PeerWord* at, PeerWord a, PeerWord b) { at[0] = a, at[1] = b; }
inline void get_words(const PeerWord* at, PeerWord& a, PeerWord& b) { a = at[0], b = at[1]; }
inline void load_pair(const float* at, float& a, float& b) { a = at[0], b = at[1]; }
inline float4 load_peer(const float* at) { return *(const float4*)at; }
inline void store_peer(float* at, float4 v) { *(float4*)at = v; }
inline void raise_flag(unsigned* at, unsigned step) { *at = step; }
inline unsigned read_flag(const unsigned* at) { return *at; }
inline int read_word(const int* at) { return *at; }
inline PeerWord nanoseconds() { return simt::clock += 1000000; }
inline void between_polls() { simt::yield(); }
#else
__device__ __forceinline__ void put_word(PeerWord* at, PeerWord a) {
    asm volatile("st.relaxed.sys.global.b64 [%0], %1;" :: "l"(at), "l"(a) : "memory");
}
__device__ __forceinline__ void put_words(PeerWord* at, PeerWord a, PeerWord b) {
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" :: "l"(at), "l"(a), "l"(b) : "memory");
}
__device__ __forceinline__ void get_words(const PeerWord* at, PeerWord& a, PeerWord& b) {
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at) : "memory");
}
__device__ __forceinline__ void load_pair(const float* at, float& a, float& b) {
    asm volatile("ld.relaxed.sys.global.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "l"(at) : "memory");
}
__device__ __forceinline__ float4 load_peer(const float* at) {
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ void store_peer(float* at, float4 v) {
    asm volatile("st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void raise_flag(unsigned* at, unsigned step) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(at), "r"(step) : "memory");
}
__device__ __forceinline__ unsigned read_flag(const unsigned* at) {
    unsigned v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ int read_word(const int* at) {
    int v;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ PeerWord nanoseconds() {
    PeerWord t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
__device__ __forceinline__ void between_polls() {}
#endif

// ---------------------------------------------------------------- a product's own mail -------
// Sends a rank's partial of the coming step to N GPUs, its own too, from where it is computed. The
// launch after it, which counts the step, is the one that adds the packets up: reduce_sent.cu.
template <int N>
struct Post {
    PeerWord* inbox[N];
    unsigned step;

    // After pdl_wait(): the sum before is over, here, and its step is counted.
    __device__ __forceinline__ void open(const void* words) {
        const PeerOwn* own = (const PeerOwn*)words;
        const unsigned long long count = *(volatile const PeerWord*)&own->ticks;
        const PeerWord apart = own->apart;
#pragma unroll
        for (int g = 0; g < N; g++) inbox[g] = (PeerWord*)own->post[g];
        step = (unsigned)(count / PEER_TICKS) + 1;
        if (step & 1)
#pragma unroll
            for (int g = 0; g < N; g++) inbox[g] = (PeerWord*)((char*)inbox[g] + apart);
    }
    __device__ __forceinline__ void send(int i, float v) const {
        const PeerWord word = (PeerWord)step << 32 | __float_as_uint(v);
#pragma unroll
        for (int g = 0; g < N; g++) put_word(inbox[g] + i, word);
    }
};
template <>
struct Post<0> {  // partials stay here
    __device__ __forceinline__ void open(const void*) {}
    __device__ __forceinline__ void send(int, float) const {}
};
