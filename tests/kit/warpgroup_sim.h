// kernels/include/warpgroup.cuh, bulk_copy.cuh and pdl.cuh on the CPU, over simt.h: everything
// asynchronous happens at once, operands are read as the descriptors of the real header say.
// `shared` stands for dynamic shared memory; its addresses are offsets.
// What it can't show: missing fences and waits for products, bank conflicts, speed.
#pragma once
#include "barrier_sim.h"

alignas(1024) static unsigned char shared[232448];

inline unsigned shared_address(const void* p) { return (unsigned)((unsigned char*)p - shared); }
inline void pdl_wait() {}
inline void pdl_launch() {}

inline void let_pass(int id, int threads) {
    simt::Barrier& b = simt::cta->named[id];
    if (++b.waiting == threads) b.waiting = 0, b.generation++;
}

// ---------------------------------------------------------------- copies --------------------
inline void publish_shared() {}
inline void bulk_load(unsigned to, const void* from, int nbytes, unsigned bar) {
    if (to % 16 || nbytes % 16 || to + nbytes > sizeof shared) sim_fail("bad bulk load");
    memcpy(shared + to, from, nbytes);
    SimBarrier& b = sim_barrier(bar);
    b.nbytes -= nbytes;
    if (b.nbytes < 0) sim_fail("more bytes than expected");
    b.settle();
}
inline void bulk_store(void* to, unsigned from, int nbytes) { memcpy(to, shared + from, nbytes); }
inline void bulk_commit() {}
inline void bulk_stores_read() {}
inline void bulk_stores_done() {}
inline void copy16(unsigned to, const void* from, int valid) {
    valid ? memcpy(shared + to, from, 16) : memset(shared + to, 0, 16);
}
inline void copies_commit() {}
template <int LEFT> inline void copies_wait() {}
inline void store_matrices(unsigned to, unsigned a, unsigned b, unsigned c, unsigned d) {
    struct In { unsigned to, v[4]; } in{to, {a, b, c, d}};
    simt::collective(&in, [&](std::vector<void*>& s) {
        for (int m = 0; m < 4; m++) {
            const unsigned row = ((In*)s[8 * m + simt::lane() / 4])->to;
            memcpy(shared + row + 4 * (simt::lane() % 4), &in.v[m], 4);
        }
    });
}

// ---------------------------------------------------------------- products ------------------
struct Slab {
    unsigned at, next;
    bool across;
};
inline Slab slab_along(unsigned at) { return {at, 0, false}; }
inline Slab slab_across(unsigned at, unsigned next) { return {at, next, true}; }
inline float sim_value(unsigned at) {  // the swizzle works on address bits
    unsigned short bits;
    memcpy(&bits, shared + (at ^ (at >> 7 & 7) << 4), 2);
    return simt::f16(bits);
}
// Value at (line, depth) of A or of B transposed.
inline float sim_value(const Slab& s, int line, int depth) {
    if (s.across) return sim_value(s.at + line / 64 * s.next + depth * 128 + line % 64 * 2);
    return sim_value(s.at + line * 128 + depth * 2);
}
inline void products_begin() {}
inline void products_commit() {}
template <int LEFT> inline void products_wait() {}
template <int N> inline void hold(float (&)[N]) {}
template <int COUNT> inline void give_registers() {}
template <int COUNT> inline void take_registers() {}

template <int N, class A>
inline void sim_multiply(float (&d)[N], A a, const Slab& b, int add) {
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int i = 0; i < N; i++) {
        const int row = g + 8 * (i >> 1 & 1), column = i / 4 * 8 + 2 * t + (i & 1);
        double sum = add ? d[i] : 0.;
        for (int k = 0; k < 16; k++) sum += (double)a(row, k) * sim_value(b, column, k);
        d[i] = (float)sum;
    }
}
template <int N>
inline void multiply(float (&d)[N], Slab a, Slab b, int add) {
    const int first = threadIdx.x / 32 % 4 * 16;
    sim_multiply(d, [&](int row, int k) { return sim_value(a, first + row, k); }, b, add);
}
template <int N>
inline void multiply_across(float (&d)[N], const unsigned (&a)[4], Slab b) {
    struct In { unsigned v[4]; } in{{a[0], a[1], a[2], a[3]}};
    float rows[2][16];
    simt::collective(&in, [&](std::vector<void*>& s) {
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < 16; k++) {
                const In& from = *(In*)s[simt::lane() / 4 * 4 + k % 8 / 2];
                rows[r][k] = simt::f16(from.v[r + 2 * (k / 8)] >> 16 * (k & 1) & 0xFFFF);
            }
    });
    sim_multiply(d, [&](int row, int k) { return rows[row / 8][k]; }, b, 1);
}
