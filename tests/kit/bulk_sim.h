// Barriers and loads of kernels/include/bulk_copy.cuh on the CPU, over simt.h: copies happen at once,
// addresses are offsets into dynamic shared memory (BULK_SIM, its name).
// What it can't show: missing fences.
#pragma once
#include "barrier_sim.h"

extern thread_local uint4 BULK_SIM[];

inline unsigned shared_address(const void* p) { return (unsigned)((char*)p - (char*)BULK_SIM); }

inline void publish_shared() {}
inline void bulk_load(unsigned to, const void* from, int nbytes, unsigned bar) {
    if (to % 16 || (size_t)from % 8 || nbytes % 16) sim_fail("bad bulk load");
    memcpy((char*)BULK_SIM + to, from, nbytes);
    SimBarrier& b = sim_barrier(bar);
    b.nbytes -= nbytes;
    if (b.nbytes < 0) sim_fail("more bytes than expected");
    b.settle();
}
