// Op        moe_sort: the slots (token t's choice k is slot t n_used + k) in order of their expert, and
//           tiles of up to `tile` (128, 64 or 32) of them, wide ones first, for the grouped products
//           moe_combine: y[t] (+)= sum_k weights[t][k] * 16 part[t n_used + k], in the order of k
// Shapes    slots [n_slots], tiles [most, 4]: (held expert, first place in slots, slots, 0), most =
//           n_slots / tile + held; ends [4]: tiles of over 3/4, over half, over a quarter of `tile`
//           slots, all; ids and weights [n, n_used], y [n, d], part [n n_used, d] at row stride ldp
// Dtypes    int32, float32; part float16 of value / 16
// Grid      moe_sort (1), 1024 threads, shared bytes 132 held + 4 n_slots (`staged`: 8 n_slots);
//           moe_combine (n), 256 threads
// Assumes   held <= 1024; experts first .. first + held - 1 are here, others (and -1) join no tile;
//           ldp a multiple of 8, part's rows finite up to there, n_used <= 16
// Numerics  the order of an expert's slots may differ from run to run: a token's result doesn't depend
//           on its place; plain float32 sums
// Bound by  launch latency; moe_combine: bytes, d (2 n_used + 8) a token
// Sources   own
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "pdl.cuh"
#include "types.cuh"

// ---------------------------------------------------------------- device helpers ------------
// Sum of v over the lanes up to this one.
template <class T>
__device__ __forceinline__ T sum_up_to(T v) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T other = __shfl_up_sync(~0u, v, offset);
        if ((threadIdx.x & 31) >= offset) v += other;
    }
    return v;
}

// Sum of v over the threads before this one, of 1024; every thread gets the sum of all in `total`.
template <class T>
__device__ __forceinline__ T sum_before(T v, T* warps, T& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const T sum = sum_up_to(v);
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    const T before = sum_up_to(warps[lane]);
    total = __shfl_sync(~0u, before, 31);
    const T base = __shfl_sync(~0u, before, warp > 0 ? warp - 1 : 0);
    return (warp > 0 ? base : 0) + sum - v;
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(1024)
moe_sort(int* slots, int* tiles, int* ends, const int* ids, int n_slots, int first, int held,
         int tile, int staged) {
    extern __shared__ uint4 shared[];
    __shared__ int warp_slots[32];
    __shared__ unsigned long long warp_tiles[32];
    int* place = (int*)shared;        // [32 warps][held], then [held]
    int* slot = place + 33 * held;    // [n_slots]: expert (held: none), 65536 * place in the warp's
    int* sorted = staged ? slot + n_slots : slots;  // scattered stores to global memory are slow
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    pdl_launch();
    for (int i = threadIdx.x; i < 32 * held; i += 1024) place[i] = 0;
    pdl_wait();
    for (int base = threadIdx.x; base < n_slots; base += 8 * 1024) {  // 8 loads under way
        int e[8];
#pragma unroll
        for (int j = 0; j < 8; j++) e[j] = base + 1024 * j < n_slots ? ids[base + 1024 * j] - first : 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (base + 1024 * j < n_slots) slot[base + 1024 * j] = e[j] >= 0 && e[j] < held ? e[j] : held;
    }
    __syncthreads();
    // A warp takes neighbouring slots, 32 at a time, and counts those of each expert.
    const int rounds = (n_slots + 1023) / 1024;
    int* own = place + warp * held;
    for (int i = warp * rounds * 32 + lane; i < min(n_slots, (warp + 1) * rounds * 32); i += 32)
        if (slot[i] < held) slot[i] |= atomicAdd(own + slot[i], 1) << 16;
    __syncthreads();
    for (int e = warp; e < held; e += 32) {  // a lane per warp
        const int count = place[lane * held + e], sum = sum_up_to(count);
        place[lane * held + e] = sum - count;
        if (lane == 31) place[32 * held + e] = sum;
    }
    __syncthreads();
    const int e = threadIdx.x, n = e < held ? place[32 * held + e] : 0;
    int all;
    const int start = sum_before(n, warp_slots, all);
    // Tiles of this expert by width: four numbers of 16 bits.
    const int full = n / tile, rest = n % tile, width = 3 - max(4 * rest - 1, 0) / tile;
    unsigned long long before, total;
    before = sum_before((unsigned long long)full + ((unsigned long long)(rest > 0) << 16 * width),
                        warp_tiles, total);
    int end[4], sum = 0;
    for (int i = 0; i < 4; i++) end[i] = sum += (int)(total >> 16 * i & 0xFFFF);
    if (threadIdx.x < 4) ends[threadIdx.x] = end[threadIdx.x];
    int at = (int)(before & 0xFFFF);
    for (int i = 0; i <= full; i++, at++) {
        const int count = i < full ? tile : rest;
        if (count == 0) break;
        if (i == full && width > 0) at = end[width - 1] + (int)(before >> 16 * width & 0xFFFF);
        tiles[4 * at] = e, tiles[4 * at + 1] = start + tile * i, tiles[4 * at + 2] = count;
        tiles[4 * at + 3] = 0;
    }
    if (e < held) place[32 * held + e] = start;
    __syncthreads();
    for (int r = 0; r < rounds; r++) {
        const int i = (warp * rounds + r) * 32 + lane;
        const int e = i < n_slots ? slot[i] & 0xFFFF : held;
        if (e < held) sorted[place[32 * held + e] + own[e] + (slot[i] >> 16)] = i;
    }
    if (!staged) return;
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += 1024) slots[i] = sorted[i];
}

extern "C" __global__ void __launch_bounds__(256)
moe_combine(float* y, const unsigned short* part, const int* ids, const float* weights, int n_used,
            int d, int first, int held, int add, long long ldp) {
    __shared__ float weight[16];  // 0: not held, and not read
    pdl_launch();
    pdl_wait();
    if (threadIdx.x < 16) {
        const int slot = blockIdx.x * n_used + threadIdx.x, e = threadIdx.x < n_used ? ids[slot] - first : -1;
        weight[threadIdx.x] = e >= 0 && e < held ? 16.f * weights[slot] : 0.f;
    }
    __syncthreads();
    y += (long long)blockIdx.x * d, part += blockIdx.x * n_used * ldp;
    const bool whole = d % 8 == 0;
    for (int i = 8 * threadIdx.x; i < d; i += 2048) {
        alignas(16) float sum[8] = {};
        if (add && whole) {
            *(float4*)sum = *(const float4*)(y + i), *(float4*)(sum + 4) = *(const float4*)(y + i + 4);
        } else if (add) {
            for (int j = 0; j < 8 && i + j < d; j++) sum[j] = y[i + j];
        }
#pragma unroll
        for (int first_k = 0; first_k < 16; first_k += 8) {
            if (first_k >= n_used) break;
            uint4 pairs[8];  // all under way
#pragma unroll
            for (int k = 0; k < 8; k++) {
                pairs[k] = make_uint4(0, 0, 0, 0);
                if (first_k + k < n_used && weight[first_k + k] != 0.f)
                    pairs[k] = *(const uint4*)(part + (first_k + k) * ldp + i);
            }
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const unsigned word[4] = {pairs[k].x, pairs[k].y, pairs[k].z, pairs[k].w};
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sum[j] += weight[first_k + k] *
                              half_bits_to_float(word[j / 2] >> 16 * (j & 1) & 0xFFFF);
            }
        }
        if (whole) {
            *(float4*)(y + i) = *(const float4*)sum, *(float4*)(y + i + 4) = *(const float4*)(sum + 4);
        } else {
            for (int j = 0; j < 8 && i + j < d; j++) y[i + j] = sum[j];
        }
    }
}
