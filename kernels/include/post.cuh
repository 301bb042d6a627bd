// What several GPUs' kernels write to and read from each other: a GPU's own words, packets, waits that
// end, and how a kernel that isn't a collective sends by itself. The protocol is in peers.cuh.
// Sources: peers.cuh. Tested by: tests/kernels/test_peers.py, tests/gpu/test_collectives.py
#pragma once
#include "pdl.cuh"

#define PEER_TICKS 1024  // what the CTAs of a kernel add to the counter together

typedef unsigned long long PeerWord;

struct PeerOwn {
    PeerWord ticks;  // PEER_TICKS a step
    int error;       // 1 + a GPU that was waited for in vain
    int pad;
    // What senders need to know, where every GPU has one rank, of its own number:
    PeerWord apart, room;  // bytes from an inbox to the one used in the next step, and for a rank
    PeerWord inbox;        // here, of even steps
    PeerWord alarm;        // the group's error word, in host memory
    int me, limit_ms;
    PeerWord post[16];  // by GPU: this GPU's part of the inbox there, of even steps
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

// ---------------------------------------------------------------- waits that end -------------
#define PEER_POLLS 1024  // between looks at the clock and the alarm

struct Patience {
    PeerOwn* own;
    int* alarm;  // the group's error word, in host memory
    int limit_ms, polls;
    bool broken;
    PeerWord since;

    // After a poll in vain: whether to give up waiting for `gpu`. From the limit on, in
    // milliseconds of the device's clock, and after anybody gave up, nobody waits any more.
    __device__ __forceinline__ bool gives_up(int gpu) {
        if (broken) return true;
        between_polls();
        if (++polls % PEER_POLLS) return false;
        const PeerWord now = nanoseconds();
        if (!since) since = now;
        int word = read_word(alarm);
        if (!word && now - since <= (PeerWord)limit_ms * 1000000) return false;
        if (!word) *(volatile int*)alarm = word = 1 + gpu;
        *(volatile int*)&own->error = word;
        return broken = true;
    }
};

// ---------------------------------------------------------------- a kernel's own mail --------
// Of N GPUs with one rank each. A product sends its partial to all, this one too, and the next launch,
// reduce_sent.cu, adds up what came and counts the step. The sampler sends candidates to the others,
// takes theirs, and counts the step itself.
template <int N>
struct Post : Patience {
    PeerWord* to[N];
    const char* from;
    long long room;
    int me;
    unsigned step;

    // After pdl_wait(): the sum before is over, here, and its step is counted.
    __device__ __forceinline__ void open(const void* words) {
        own = (PeerOwn*)words, polls = 0, since = 0;
        const PeerWord ticks = *(volatile PeerWord*)&own->ticks;
        broken = *(volatile int*)&own->error != 0;
        const PeerWord apart = own->apart;
        from = (const char*)own->inbox, room = own->room;
        alarm = (int*)own->alarm, me = own->me, limit_ms = own->limit_ms;
#pragma unroll
        for (int g = 0; g < N; g++) to[g] = (PeerWord*)own->post[g];
        step = (unsigned)(ticks / PEER_TICKS) + 1;
        if (!(step & 1)) return;
        from += apart;
#pragma unroll
        for (int g = 0; g < N; g++) to[g] = (PeerWord*)((char*)to[g] + apart);
    }
    __device__ __forceinline__ void send(int i, float v, bool to_me = true) const {
        const PeerWord word = (PeerWord)step << 32 | __float_as_uint(v);
#pragma unroll
        for (int g = 0; g < N; g++)
            if (to_me || g != me) put_word(to[g] + i, word);
    }
    // What rank r sent at i and i + 1, i even; -inf and 0 if it is given up.
    __device__ __forceinline__ void take(int r, int i, unsigned& a, unsigned& b) {
        PeerWord x, y;
        do {
            get_words((const PeerWord*)(from + r * room) + i, x, y);
            a = (unsigned)x, b = (unsigned)y;
            if ((unsigned)(x >> 32) == step && (unsigned)(y >> 32) == step) return;
        } while (!gives_up(r));
        a = 0xff800000u, b = 0;
    }
    // By the only CTA that opens, once all of it has.
    __device__ __forceinline__ void count() const {
        atomicAdd(&own->ticks, (PeerWord)PEER_TICKS);
    }
};
template <>
struct Post<0> {  // partials stay here
    __device__ __forceinline__ void open(const void*) {}
    __device__ __forceinline__ void send(int, float) const {}
};
