// Barriers and loads of kernels/include/bulk_copy.cuh on the CPU, over simt.h: copies happen at once,
// addresses are offsets into dynamic shared memory (BULK_SIM, its name).
// What it can't show: missing fences.
#pragma once
#include <map>

extern thread_local uint4 BULK_SIM[];

inline unsigned shared_address(const void* p) { return (unsigned)((char*)p - (char*)BULK_SIM); }

struct BulkBarrier {
    int arrivals, missing, nbytes, phase;
};
static std::map<unsigned, BulkBarrier> bulk_barriers;

inline void bulk_fail(const char* what) {
    fprintf(stderr, "%s in thread %d\n", what, simt::current->linear), abort();
}
inline BulkBarrier& bulk_barrier(unsigned bar) {
    if (!bulk_barriers.count(bar)) bulk_fail("unknown barrier");
    return bulk_barriers[bar];
}
inline void bulk_settle(BulkBarrier& b) {
    if (b.missing == 0 && b.nbytes == 0) b.phase ^= 1, b.missing = b.arrivals;
}
inline void barrier_init(unsigned bar, int n) { bulk_barriers[bar] = {n, n, 0, 0}; }
inline void barriers_ready() {}
inline void barrier_arrive(unsigned bar) {
    BulkBarrier& b = bulk_barrier(bar);
    if (b.missing-- <= 0) bulk_fail("too many arrivals");
    bulk_settle(b);
}
inline void barrier_expect(unsigned bar, int nbytes) {
    bulk_barrier(bar).nbytes += nbytes;
    barrier_arrive(bar);
}
inline void barrier_wait(unsigned bar, int parity) {
    for (long spins = 0; bulk_barrier(bar).phase == parity; spins++) {
        if (spins > 200000) bulk_fail("deadlock at a barrier");
        simt::yield();
    }
}
inline void meet(int id, int threads) { simt::arrive(simt::cta->named[id], threads); }
inline void publish_shared() {}
inline void bulk_load(unsigned to, const void* from, int nbytes, unsigned bar) {
    if (to % 16 || (size_t)from % 8 || nbytes % 16) bulk_fail("bad bulk load");
    memcpy((char*)BULK_SIM + to, from, nbytes);
    BulkBarrier& b = bulk_barrier(bar);
    b.nbytes -= nbytes;
    if (b.nbytes < 0) bulk_fail("more bytes than expected");
    bulk_settle(b);
}
