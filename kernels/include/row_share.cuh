// A row of floats dealt out to the threads of a cluster, order-preserving keys, and scans over a CTA.
// Sources: own
#pragma once

#include "cluster.cuh"
#include "reduce.cuh"

#define SELECT_THREADS 1024
#define SELECT_WARPS (SELECT_THREADS / 32)
#define HELD 5  // float4 a thread keeps in registers: 163840 values in a cluster of 8
#define LOWEST __int_as_float(0xff800000)  // -inf

// Keys compare as the floats do; -0 equals 0, and NaN is the largest, so that it can't hide.
__device__ __forceinline__ unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits << 1) > 0xFF000000u) return ~0u;
    if (bits == 0x80000000u) bits = 0;
    return bits ^ ((int)bits < 0 ? ~0u : 0x80000000u);
}

// The float of a key; NaN for ~0.
__device__ __forceinline__ float unordered(unsigned key) {
    return key == ~0u ? __int_as_float(0x7fffffff)
                      : __uint_as_float(key ^ ((int)key < 0 ? 0x80000000u : ~0u));
}

// The larger, NaN if one of them is.
__device__ __forceinline__ float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
#else
    return a != a || a > b ? a : b;
#endif
}

__device__ __forceinline__ unsigned warp_min(unsigned x) { return ~warp_max(~x); }
__device__ __forceinline__ unsigned warp_add(unsigned x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_add_sync(~0u, x);
#else
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
#endif
}

// This CTA's share of a row. A warp's values are contiguous: its groups of 128, a float4 a lane.
struct RowShare {
    const float* row;
    int n, first, groups;
    float4 held[HELD];  // -inf beyond the row

    __device__ __forceinline__ RowShare(const float* values, int count) : row(values), n(count) {
        const int warp = cluster_rank() * SELECT_WARPS + (threadIdx.x >> 5);
        groups = (n + 128 * SELECT_WARPS * CLUSTER - 1) / (128 * SELECT_WARPS * CLUSTER);
        first = warp * groups * 128 + (threadIdx.x & 31) * 4;
        load(0);
    }
    __device__ __forceinline__ void load(int from) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = first + (from + i) * 128;
            if (from + i >= groups) continue;
            held[i] = {LOWEST, LOWEST, LOWEST, LOWEST};
            if (at >= n) continue;
            if (at + 4 <= n) {
                held[i] = *reinterpret_cast<const float4*>(row + at);
            } else {
                held[i].x = row[at];
                if (at + 1 < n) held[i].y = row[at + 1];
                if (at + 2 < n) held[i].z = row[at + 2];
            }
        }
    }
    // f(four values, position of the first) for all groups, by whole warps; positions may pass n.
    template <class F>
    __device__ __forceinline__ void each(F f) {
        each(f, [] {});
    }
    // The same, and done() after each HELD groups.
    template <class F, class Done>
    __device__ __forceinline__ void each(F f, Done done) {
        for (int from = 0; from < groups; from += HELD) {
            if (groups > HELD) load(from);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (from + i < groups) f(held[i], first + (from + i) * 128);
            done();
        }
    }
};

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ unsigned warp_scan(unsigned x) {
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const unsigned below = __shfl_up_sync(~0u, x, offset);
        if ((threadIdx.x & 31) >= offset) x += below;
    }
    return x;
}

// Sum of the warps' entries before this thread's warp; `all` becomes the sum of all.
__device__ __forceinline__ unsigned before_warp(const unsigned* entries, unsigned& all) {
    const unsigned sums = warp_scan(entries[threadIdx.x & 31]), warp = threadIdx.x >> 5;
    all = __shfl_sync(~0u, sums, 31);
    const unsigned below = __shfl_sync(~0u, sums, warp ? warp - 1 : 0);
    return warp ? below : 0;
}
