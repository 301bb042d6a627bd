// Barriers of kernels/include/bulk_copy.cuh on the CPU, over simt.h; a barrier is known by its address.
#pragma once
#include <map>

struct SimBarrier {
    int arrivals = 0, missing = 0, nbytes = 0, phase = 0;
    void settle() {
        if (missing == 0 && nbytes == 0) phase ^= 1, missing = arrivals;
    }
};
static std::map<unsigned, SimBarrier> sim_barriers;

inline void sim_fail(const char* what) {
    fprintf(stderr, "%s in thread %d\n", what, simt::current->linear), abort();
}
inline SimBarrier& sim_barrier(unsigned bar) {
    if (!sim_barriers.count(bar)) sim_fail("unknown barrier");
    return sim_barriers[bar];
}
inline void barrier_init(unsigned bar, int n) { sim_barriers[bar] = {n, n, 0, 0}; }
inline void barriers_ready() {}
inline void barrier_arrive(unsigned bar) {
    SimBarrier& b = sim_barrier(bar);
    if (b.missing-- <= 0) sim_fail("too many arrivals");
    b.settle();
}
inline void barrier_expect(unsigned bar, int nbytes) {
    sim_barrier(bar).nbytes += nbytes;
    barrier_arrive(bar);
}
inline void barrier_wait(unsigned bar, int parity) {
    for (long spins = 0; sim_barrier(bar).phase == parity; spins++) {
        if (spins > 200000) sim_fail("deadlock at a barrier");
        simt::yield();
    }
}
inline void meet(int id, int threads) { simt::arrive(simt::cta->named[id], threads); }
