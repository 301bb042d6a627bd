// The k largest of a row of floats by radix select: 11 + 11 + 10 bits of order-preserving keys,
// counted by a cluster of CLUSTER CTAs in shared memory. Equals go to the lower position, and the
// chosen come out in order of their positions; integer counts only, so two runs are alike.
// Sources: radix select as in arXiv 2306.12566 (AIR top-k); one cluster instead of the whole grid: own
#pragma once

#include "reduce.cuh"

#ifndef CLUSTER
#define CLUSTER 1  // CTAs that share a row: 1 needs no cluster launch
#endif
#define SELECT_THREADS 1024
#define SELECT_WARPS (SELECT_THREADS / 32)
#define HELD 5  // float4 a thread keeps in registers: 163840 values in a cluster of 8

// ---------------------------------------------------------------- cluster -------------------
#if CLUSTER > 1
#define __select_bounds__(threads) __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(threads)

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ unsigned peer_address(const void* mine, unsigned rank) {
    unsigned at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at) : "r"((unsigned)__cvta_generic_to_shared(mine)), "r"(rank));
    return at;
}
// The word where CTA `rank` of the cluster has its `mine`.
__device__ __forceinline__ unsigned peer_load(const unsigned* mine, unsigned rank) {
    unsigned v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(v) : "r"(peer_address(mine, rank)) : "memory");
    return v;
}
__device__ __forceinline__ void peer_store(unsigned* mine, unsigned rank, unsigned v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;"
                 :: "r"(peer_address(mine, rank)), "r"(v) : "memory");
}
#else
#define __select_bounds__(threads) __launch_bounds__(threads)
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ unsigned peer_load(const unsigned* mine, unsigned) { return *mine; }
__device__ __forceinline__ void peer_store(unsigned* mine, unsigned, unsigned v) { *mine = v; }
#endif

// ---------------------------------------------------------------- keys and rows -------------
// Keys compare as the floats do; -0 equals 0, and NaN is the largest, so that it can't hide.
__device__ __forceinline__ unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits << 1) > 0xFF000000u) return ~0u;
    if (bits == 0x80000000u) bits = 0;
    return bits ^ ((int)bits < 0 ? ~0u : 0x80000000u);
}

// This CTA's share of a row. A warp's values are contiguous: its groups of 128, a float4 a lane.
struct RowShare {
    const float* row;
    int n, first, groups;
    float4 held[HELD];

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
            if (from + i >= groups || at >= n) continue;
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
        for (int from = 0; from < groups; from += HELD) {
            if (groups > HELD) load(from);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (from + i < groups) f(held[i], first + (from + i) * 128);
        }
    }
};

// ---------------------------------------------------------------- select --------------------
struct SelectShared {
    unsigned count[2048], total[2048];
    unsigned warp[2][SELECT_WARPS];
    unsigned cta[2][16];
    unsigned digit, level, size;
};

// Chosen are the keys with key >> shift above prefix, and the first `level` with it equal.
struct Threshold {
    unsigned prefix;
    int shift, level;
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

// Where the k largest of a row end; 1 <= k <= n. All CTAs of the cluster, all threads.
__device__ __forceinline__ Threshold threshold(RowShare& share, int k, SelectShared& s) {
    const int tid = threadIdx.x;
    Threshold t = {0, 32, k};
#pragma unroll 1
    for (int pass = 0; pass < 3; pass++) {
        const int bits = pass < 2 ? 11 : 10, bins = 1 << bits, shift = t.shift - bits;
        for (int i = tid; i < bins; i += SELECT_THREADS) s.count[i] = 0;
        __syncthreads();
        share.each([&](const float4& v, int at) {
            const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const unsigned key = ordered(x[e]);
                if (at + e < share.n && (pass == 0 || key >> t.shift == t.prefix))
                    atomicAdd(&s.count[key >> shift & (bins - 1)], 1u);
            }
        });
        cluster_sync();
        const unsigned* totals = s.count;
        if (CLUSTER > 1) {  // each CTA adds up a slice of the bins and tells all
            totals = s.total;
            const int slice = bins / CLUSTER;
            for (int i = tid; i < slice; i += SELECT_THREADS) {
                const int bin = cluster_rank() * slice + i;
                unsigned sum = 0;
                for (int c = 0; c < CLUSTER; c++) sum += peer_load(&s.count[bin], c);
                for (int c = 0; c < CLUSTER; c++) peer_store(&s.total[bin], c, sum);
            }
            cluster_sync();
        }
        // Bins from the top, two or one a thread: the one in which the k-th largest lies.
        const int per = bins / SELECT_THREADS, top = bins - 1 - tid * per;
        const unsigned a = totals[top], b = per > 1 ? totals[top - 1] : 0;
        const unsigned inclusive = warp_scan(a + b);
        if ((tid & 31) == 31) s.warp[0][tid >> 5] = inclusive;
        __syncthreads();
        unsigned all;
        const unsigned upto = before_warp(s.warp[0], all) + inclusive, before = upto - a - b;
        const unsigned wanted = t.level;
        if (before < wanted && wanted <= upto) {
            const bool second = wanted > before + a;
            s.digit = second ? top - 1 : top;
            s.level = wanted - before - (second ? a : 0);
            s.size = second ? b : a;
        }
        __syncthreads();
        t.prefix = t.prefix << bits | s.digit, t.shift = shift, t.level = s.level;
        if (s.size == s.level) break;  // the whole bin is chosen
    }
    return t;
}

// put(place, position, value) for the chosen; places ascend with positions. After threshold().
template <class F>
__device__ __forceinline__ void collect(RowShare& share, Threshold t, SelectShared& s, F put) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Per lane: keys above the threshold in the upper half word, equals in the lower; a lane's
    // share of a group is 4 of each, so a warp's group never overflows.
    const auto counted = [&](const float4& v, int at, unsigned& above, unsigned& level) {
        const float x[4] = {v.x, v.y, v.z, v.w};
        above = level = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const unsigned key = ordered(x[e]) >> t.shift;
            if (at + e >= share.n) continue;
            above |= (key > t.prefix ? 1u : 0u) << e;
            level |= (key == t.prefix ? 1u : 0u) << e;
        }
    };
    unsigned n_above = 0, n_level = 0;
    share.each([&](const float4& v, int at) {
        unsigned above, level;
        counted(v, at, above, level);
        n_above += __popc(above), n_level += __popc(level);
    });
    n_above = warp_scan(n_above), n_level = warp_scan(n_level);
    if (lane == 31) s.warp[0][warp] = n_above, s.warp[1][warp] = n_level;
    __syncthreads();
    unsigned all_above, all_level;
    unsigned base_above = before_warp(s.warp[0], all_above);
    unsigned base_level = before_warp(s.warp[1], all_level);
    if (CLUSTER > 1) {
        if (threadIdx.x < CLUSTER) {
            peer_store(&s.cta[0][cluster_rank()], threadIdx.x, all_above);
            peer_store(&s.cta[1][cluster_rank()], threadIdx.x, all_level);
        }
        cluster_sync();
        for (unsigned c = 0; c < cluster_rank(); c++)
            base_above += s.cta[0][c], base_level += s.cta[1][c];
    }
    const unsigned wanted = t.level;
    share.each([&](const float4& v, int at) {
        unsigned above, level;
        counted(v, at, above, level);
        if (!__any_sync(~0u, above | level)) return;
        const unsigned mine = __popc(above) << 16 | __popc(level), upto = warp_scan(mine);
        unsigned a = base_above + ((upto - mine) >> 16), b = base_level + ((upto - mine) & 0xFFFF);
        const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (above >> e & 1) {
                put((int)(a++ + min(b, wanted)), at + e, x[e]);
            } else if (level >> e & 1) {
                if (b < wanted) put((int)(a + b), at + e, x[e]);
                b++;
            }
        }
        const unsigned whole = __shfl_sync(~0u, upto, 31);
        base_above += whole >> 16, base_level += whole & 0xFFFF;
    });
}
