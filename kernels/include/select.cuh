// The k largest of a row of floats, by a cluster of CLUSTER CTAs that count in shared memory. Equals
// go to the lower position, the chosen come out in order of their positions, and counts are
// integers, so two runs are alike. Two ways, the second where the first gives up:
// - select_linear: one count in 2047 equal steps between the largest value and a lower bound of the
//   k-th, where values hardly ever meet (the top bits of a float do, and equal addresses in shared
//   memory wait for each other); the few values of the last step are compared with each other.
// - threshold and collect: radix select by 11 + 11 + 10 bits, for rows of any kind.
// Sources: radix select as in arXiv 2306.12566 (AIR top-k); one cluster for the grid, linear steps: own
#pragma once

#include "row_share.cuh"

#define LISTED 128  // values that select_linear compares with each other
#ifndef SELECT_BYTES
#define SELECT_BYTES 16384  // of a CTA's bitmap of its values: 131072
#endif

struct SelectShared {
    alignas(16) unsigned count[2048];
    unsigned total[2048];
    unsigned warp[2][SELECT_WARPS];
    unsigned cta[2][16];
    unsigned digit, level, size;
    unsigned listed, above, extra[16];  // select_linear's, with the values of its last step
    unsigned key[CLUSTER][LISTED], at[CLUSTER][LISTED];
    unsigned listed_key[LISTED], listed_at[LISTED], owner[LISTED];
    unsigned bitmap[SELECT_BYTES / 4];
};

// Chosen are the keys with key >> shift above prefix, and the first `level` with it equal.
struct Threshold {
    unsigned prefix;
    int shift, level;
};

// The cluster's counts of all bins: each CTA adds up a slice of them and tells all.
__device__ __forceinline__ const unsigned* add_up(int bins, SelectShared& s) {
    if (CLUSTER == 1) return s.count;
    const int slice = bins / CLUSTER;
    for (int i = threadIdx.x; i < slice; i += SELECT_THREADS) {
        const int bin = cluster_rank() * slice + i;
        unsigned sum = 0;
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) sum += peer_load(&s.count[bin], c);
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) peer_store(&s.total[bin], c, sum);
    }
    cluster_sync();
    return s.total;
}

// Before select(); touches this CTA's shared memory alone, so it can come before pdl_wait().
__device__ __forceinline__ void select_clear(SelectShared& s) {
    for (int i = threadIdx.x; i < 2048; i += SELECT_THREADS) s.count[i] = 0;
    if (threadIdx.x < 16) s.extra[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.digit = ~0u, s.listed = s.above = 0;
    cluster_arrive();
}

// Largest value of the row, and a lower bound of its k-th largest (mostly): the smallest of many
// maxima, of warps or of lanes' batches, if those are at least k, else the smallest value. As keys.
__device__ __forceinline__ void bounds(RowShare& share, int k, SelectShared& s, unsigned& peak,
                                       unsigned& low) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, batches = (share.groups + HELD - 1) / HELD;
    const long long whole = share.n - share.groups * 128, wanted = (long long)k * share.groups * 128;
    const bool by_warp = wanted <= whole, by_lane = wanted <= whole * 32 * batches;  // whole warps only
    const float most_possible = __int_as_float(0x7f800000);
    float most = LOWEST, batch = LOWEST, least = most_possible;
    share.each(
        [&](const float4& v, int) {
            const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                batch = larger(batch, x[e]);
                if (!by_lane && x[e] > LOWEST) least = fminf(least, x[e]);
            }
        },
        [&] {
            most = larger(most, batch);
            if (by_lane && batch > LOWEST) least = fminf(least, batch);
            batch = LOWEST;
        });
    peak = warp_max(ordered(most));
    low = by_warp ? (peak == ordered(LOWEST) ? ~0u : peak) : warp_min(ordered(least));
    if (lane == 0) s.warp[0][warp] = peak, s.warp[1][warp] = low;
    __syncthreads();
    peak = warp_max(s.warp[0][lane]), low = warp_min(s.warp[1][lane]);
    if (CLUSTER > 1) {
        if (threadIdx.x < CLUSTER) {
            peer_store(&s.cta[0][cluster_rank()], threadIdx.x, peak);
            peer_store(&s.cta[1][cluster_rank()], threadIdx.x, low);
        }
        cluster_sync();
        for (int c = 0; c < CLUSTER; c++) peak = max(peak, s.cta[0][c]), low = min(low, s.cta[1][c]);
    }
}

// Puts the k largest, 1 <= k <= n, as collect() does; false, alike in all CTAs, where values that
// aren't finite, lie too close or are too many for the bitmap make it give up. After select_clear().
template <class F>
__device__ __forceinline__ bool select_linear(RowShare& share, int k, SelectShared& s, F put) {
    const int tid = threadIdx.x, lane = tid & 31, rank = cluster_rank();
    if (share.groups * 512 > SELECT_BYTES) return false;
    unsigned peak_key, low_key;
    bounds(share, k, s, peak_key, low_key);
    const float peak = unordered(peak_key), low = unordered(low_key), scale = 2047.f / (peak - low);
    if (!(scale > 0.f && scale < __int_as_float(0x7f800000))) return false;
    // 2^23 + step: steps grow as values fall, and rounding keeps that order.
    const auto step = [&](float x) { return __fmaf_rn(peak - x, scale, 8388608.f); };
    share.each([&](const float4& v, int) {
        const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (x[e] >= low) atomicAdd(&s.count[__float_as_uint(step(x[e])) - 0x4B000000u], 1u);
    });
    cluster_sync();
    const unsigned* totals = add_up(2048, s);
    {  // two steps a thread: the one in which the k-th largest lies
        const unsigned a = totals[2 * tid], b = totals[2 * tid + 1], inclusive = warp_scan(a + b);
        if (lane == 31) s.warp[0][tid >> 5] = inclusive;
        __syncthreads();
        unsigned all;
        const unsigned upto = before_warp(s.warp[0], all) + inclusive, before = upto - a - b;
        if (before < k && k <= upto) {
            const bool second = k > before + a;
            s.digit = 2 * tid + second, s.level = k - before - (second ? a : 0);
            s.size = second ? b : a;
        }
        __syncthreads();
    }
    if (s.digit == ~0u || s.size > LISTED) return false;
    // Values of earlier steps into the bitmap, those of the last one into everybody's list.
    const float last = 8388608.f + s.digit;
    const int first = rank * SELECT_WARPS * share.groups * 128;
    unsigned n_above = 0;
    share.each([&](const float4& v, int at) {
        const float x[4] = {v.x, v.y, v.z, v.w};
        unsigned above = 0, equal = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float t = step(x[e]);
            if (t < last) above |= 1u << e;
            if (t == last) equal |= 1u << e;
        }
        if (equal) {  // seldom
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (equal >> e & 1 && x[e] >= low) {
                    const unsigned slot = atomicAdd(&s.listed, 1u);
                    for (int c = 0; c < CLUSTER; c++) {
                        peer_store(&s.key[rank][slot], c, ordered(x[e]));
                        peer_store(&s.at[rank][slot], c, at + e);
                    }
                }
        }
        n_above += __popc(above);
        const unsigned right = __shfl_xor_sync(~0u, above, 1);
        if (!(lane & 1)) ((unsigned char*)s.bitmap)[(at - first) >> 3] = above | right << 4;
    });
    n_above = warp_add(n_above);
    if (lane == 0) atomicAdd(&s.above, n_above);
    __syncthreads();
    if (tid < CLUSTER) {
        peer_store(&s.cta[0][rank], tid, s.above);
        peer_store(&s.cta[1][rank], tid, s.listed);
    }
    cluster_sync();
    // Of the list, the `level` first by value, then by position. First into one piece.
    int owner = 0, slot = tid;
    while (owner < CLUSTER && slot >= (int)s.cta[1][owner]) slot -= s.cta[1][owner++];
    if (owner < CLUSTER) {
        s.listed_key[tid] = s.key[owner][slot], s.listed_at[tid] = s.at[owner][slot];
        s.owner[tid] = owner;
    }
    __syncthreads();
    for (int i = tid >> 5; i < (int)s.size; i += SELECT_WARPS) {  // a warp for one of them
        const unsigned key = s.listed_key[i], at = s.listed_at[i];
        unsigned better = 0;
        for (int o = lane; o < (int)s.size; o += 32)
            better += s.listed_key[o] > key || (s.listed_key[o] == key && s.listed_at[o] < at);
        if (warp_add(better) < s.level && lane == 0) {
            atomicAdd(&s.extra[s.owner[i]], 1u);
            if ((int)s.owner[i] == rank) atomicOr(&s.bitmap[(at - first) >> 5], 1u << (at & 31));
        }
    }
    __syncthreads();
    unsigned place = 0, all;
    for (int o = 0; o < rank; o++) place += s.cta[0][o] + s.extra[o];
    const int words = share.groups * SELECT_WARPS * 4, per = (words + SELECT_THREADS - 1) / SELECT_THREADS;
    const int from = tid * per, stop = min(words, from + per);
    unsigned mine = 0;
    for (int w = from; w < stop; w++) mine += __popc(s.bitmap[w]);
    const unsigned upto = warp_scan(mine);
    if (lane == 31) s.warp[0][tid >> 5] = upto;
    __syncthreads();
    place += before_warp(s.warp[0], all) + upto - mine;
    for (int w = from; w < stop; w++)
        for (unsigned bits = s.bitmap[w]; bits; bits &= bits - 1)
            put((int)place++, first + w * 32 + __ffs(bits) - 1);
    return true;
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
        const unsigned* totals = add_up(bins, s);
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

// put(place, position) for the chosen; places ascend with positions. After threshold().
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
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (above >> e & 1) {
                put((int)(a++ + min(b, wanted)), at + e);
            } else if (level >> e & 1) {
                if (b < wanted) put((int)(a + b), at + e);
                b++;
            }
        }
        const unsigned whole = __shfl_sync(~0u, upto, 31);
        base_above += whole >> 16, base_level += whole & 0xFFFF;
    });
}

// put(place, position) for the k largest of a row; all threads of the cluster. After select_clear()
// and cluster_wait().
template <class F>
__device__ __forceinline__ void select(RowShare& share, int k, SelectShared& s, F put) {
    if (select_linear(share, k, s, put)) return;
    collect(share, threshold(share, k, s), s, put);
}
