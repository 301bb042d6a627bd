// Weights of kernels to come, fetched into L2 while memory would idle. A hint: it changes no value.
#pragma once

// This CTA's share of `nbytes` from p, a multiple of 16; one thread calls it.
__device__ __forceinline__ void fetch_ahead(const unsigned char* p, long long nbytes, int cta, int n_ctas) {
#if !defined(SIMT) && __CUDA_ARCH__ >= 900
    if (!p) return;
    const long long share = (nbytes / 16 + n_ctas - 1) / n_ctas * 16, start = share * cta;
    const long long stop = start + share < nbytes ? start + share : nbytes / 16 * 16;
    for (long long at = start; at < stop; at += 8192) {
        const unsigned size = stop - at < 8192 ? stop - at : 8192;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p + at), "r"(size) : "memory");
    }
#endif
}
