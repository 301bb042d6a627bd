// Row tiles of weights whole in shared memory, one token: each plane of a row tile is one bulk copy, so
// that a CTA has all it will multiply under way at once, for one thread's few instructions.
//
// Sources: PTX manual; own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec_ring.cuh"

#ifdef SIMT  // stages of row tiles, or of pieces of them
extern thread_local unsigned char ring[];
#else
__align__(128) extern __shared__ unsigned char ring[];
#endif

// ---------------------------------------------------------------- instructions --------------
using RowBarrier = unsigned long long;
#ifdef SIMT  // copies are over at once. A barrier: phase, arrivals of a phase and those missing, 16 bits each
__device__ __forceinline__ void row_init(RowBarrier* bar, int arrivals) {
    *bar = (RowBarrier)arrivals << 32 | (RowBarrier)arrivals << 16;
}
__device__ __forceinline__ void row_arrive(RowBarrier* bar) {
    *bar -= 1ull << 32;
    if (*bar >> 32 == 0) *bar = (*bar & 0xFFFF0000) << 16 | (*bar & 0xFFFF0000) | (*bar + 1 & 0xFFFF);
}
__device__ __forceinline__ void row_expect(RowBarrier* bar, int) { row_arrive(bar); }
__device__ __forceinline__ void row_wait(RowBarrier* bar, int parity = 0) {
    while ((*(volatile RowBarrier*)bar & 1) == parity) simt::yield();
}
__device__ __forceinline__ void row_copy(void* to, const void* from, int nbytes, RowBarrier*) {
    memcpy(to, from, nbytes);
}
#else
#include "bulk_copy.cuh"
// A __syncthreads() makes it known.
__device__ __forceinline__ void row_init(RowBarrier* bar, int arrivals) {
    barrier_init(shared_address(bar), arrivals);
    barriers_ready();
}
__device__ __forceinline__ void row_arrive(RowBarrier* bar) { barrier_arrive(shared_address(bar)); }
// An arrival; nbytes of copies belong to the phase.
__device__ __forceinline__ void row_expect(RowBarrier* bar, int nbytes) {
    barrier_expect(shared_address(bar), nbytes);
}
// Until the phase of this parity is over; the first is 0.
__device__ __forceinline__ void row_wait(RowBarrier* bar, int parity = 0) {
    barrier_wait(shared_address(bar), parity);
}
__device__ __forceinline__ void row_copy(void* to, const void* from, int nbytes, RowBarrier* bar) {
    bulk_load(shared_address(to), from, nbytes, shared_address(bar));
}
#endif

// ---------------------------------------------------------------- weights -------------------
// A row tile of TILES column tiles of several weights (Q: their types) that meet one x.
template <int TILES, int... Q>
using RowStreams = RingStreams<OneShare<TILES, 1, TILES>, Q...>;

// By one thread: all bytes of the row tiles that `w` has started on, RowStreams::nbytes of them.
template <class SHARE>
__device__ __forceinline__ void row_fetch(
        const RingStreams<SHARE>&, unsigned char*, RowBarrier*) {}
template <class SHARE, int Q, int... REST>
__device__ __forceinline__ void row_fetch(
        const RingStreams<SHARE, Q, REST...>& w, unsigned char* to, RowBarrier* bar) {
    using T = Tile<Q>;
    using S = RingStreams<SHARE, Q, REST...>;
    constexpr int n = SHARE::depth;
    static_assert(T::d_bytes == 0 || n % 4 == 0, "whole blocks of 256 columns");
    row_copy(to, w.view.q + w.first * T::q_bytes, n * T::q_bytes, bar);
    if (T::h_bytes) row_copy(to + S::at_h, w.view.h + w.first * T::h_bytes, n * T::h_bytes, bar);
    if (T::s_bytes) row_copy(to + S::at_s, w.view.s + w.first * T::s_bytes, n * T::s_bytes, bar);
    if (T::m_bytes) row_copy(to + S::at_m, w.view.m + w.first * T::m_bytes, n * T::m_bytes, bar);
    if (T::d_bytes) row_copy(to + S::at_d, w.view.d + (w.first >> 2) * T::d_bytes, n / 4 * T::d_bytes, bar);
    const RingStreams<SHARE, REST...>& others = w;
    row_fetch(others, to + S::own, bar);
}

// ---------------------------------------------------------------- x -------------------------
// The fragments of x that meet a warp's column tiles: those of part `part` of PARTS.
template <class X, int TILES, int PARTS>
struct RowX {
    using Share = OneShare<TILES, PARTS, TILES>;
    static constexpr int most = Share::most, rounds = (most + 5) / 6, group = (most + rounds - 1) / rounds;
    X of[most];

    __device__ __forceinline__ static bool has(int part, int i) {
        return Share::even || i < most - 1 || i < Share::count(part);
    }
    // x times norm; squares += those of x. `norm` is a weight.
    template <bool NORM>
    __device__ __forceinline__ void take(
            int part, const float* x, const float* norm, float& squares) {
        const int lane = threadIdx.x & 31;
        const int c = 64 * Share::from(part) + 16 * (lane >> 3) + 2 * (lane & 3);
#pragma unroll
        for (int first = 0; first < most; first += group) {
            float v[group][4], weight[group][4];
#pragma unroll
            for (int i = 0; i < group; i++)
#pragma unroll
                for (int k = 0; k < 4; k += 2) {
                    const bool there = first + i < most && has(part, first + i);
                    const int at = c + 64 * (first + i) + 4 * k;
                    few_pair<true>(x + at, there, v[i][k], v[i][k + 1]);
                    if constexpr (NORM) {
                        unsigned two[2];
                        few_load<2>((const unsigned char*)(norm + at), there, two);
                        weight[i][k] = __uint_as_float(two[0]), weight[i][k + 1] = __uint_as_float(two[1]);
                    }
                }
            if constexpr (NORM && X::scales) one_normed(v, weight, squares);
            const typename X::Scale scale = X::scale(v);
#pragma unroll
            for (int i = 0; i < group; i++) {
                if (first + i >= most) break;
                if constexpr (NORM && !X::scales)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        squares += v[i][k] * v[i][k], v[i][k] *= weight[i][k];
                of[first + i] = X::of(v[i], lane, scale);
            }
        }
    }
    // acc[k] = row tile k in `stage` times x over the warp's columns: rows g, g + 8 in every lane.
    template <class STREAMS>
    __device__ __forceinline__ void product(
            int part, const unsigned char* stage, float (&acc)[STREAMS::count][2]) const {
        const int lane = threadIdx.x & 31, from = Share::from(part);
        const STREAMS w = {};
#pragma unroll
        for (int k = 0; k < STREAMS::count; k++) acc[k][0] = acc[k][1] = 0.f;
#pragma unroll
        for (int i = 0; i < most; i++)
            if (has(part, i)) w.add(stage, 0, from + i, of[i], lane, acc);
#pragma unroll
        for (int k = 0; k < STREAMS::count; k++) few_rows(acc[k]);
    }
};

// 1 / sqrt(mean of x^2 + eps) out of the warps' sums of squares.
template <int WARPS>
__device__ __forceinline__ float row_norm(const float (&squared)[WARPS], int in, float eps) {
    float square = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) square += squared[w];
    return rsqrtf(square / in + eps);
}
