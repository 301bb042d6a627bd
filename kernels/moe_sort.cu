// Op        moe_sort: the slots (token t's choice k is slot t n_used + k) in order of their expert, and
//           tiles of up to 128 of them, wide ones first, for the grouped products
//           moe_combine: y[t] (+)= sum_k weights[t][k] * part[t n_used + k], in the order of k
// Shapes    slots [n_slots], tiles [most, 4]: (held expert, first place in slots, slots, 0), most =
//           n_slots / 128 + held; ends [4]: tiles over 96, over 64, over 32, all; ids and weights
//           [n, n_used], y [n, d], part [n n_used, d]
// Dtypes    int32, float32
// Grid      moe_sort (1), 1024 threads, shared bytes 128 held + 2 (n_slots rounded up to 8);
//           moe_combine (n), 256 threads
// Assumes   held <= 1024; experts first .. first + held - 1 are here, others (and -1) join no tile
// Numerics  slots of an expert stay in order: two runs give the same lists; plain float32 sums
// Bound by  launch latency; moe_combine: bytes, 4 d (n_used + 2) a token
// Sources   own
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "pdl.cuh"

// ---------------------------------------------------------------- device helpers ------------
// Sum of v over the threads before this one; every thread gets the sum of all in `total`.
template <class T>
__device__ __forceinline__ T sum_before(T v, T* warps, T& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    T sum = v;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    T base = 0;
    total = 0;
    for (int w = 0; w < 32; w++) {
        if (w == warp) base = total;
        total += warps[w];
    }
    return base + sum - v;
}

// Lanes with the same e as this one.
__device__ __forceinline__ unsigned same(int e, int bits) {
    unsigned lanes = ~0u;
    for (int b = 0; b < bits; b++) {
        const unsigned set = __ballot_sync(~0u, e >> b & 1);
        lanes &= e >> b & 1 ? set : ~set;
    }
    return lanes;
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(1024)
moe_sort(int* slots, int* tiles, int* ends, const int* ids, int n_slots, int first, int held) {
    extern __shared__ uint4 shared[];
    __shared__ int warp_slots[32];
    __shared__ unsigned long long warp_tiles[32];
    int* place = (int*)shared;                                  // [32 warps][held]
    unsigned short* expert = (unsigned short*)(place + 32 * held);  // [n_slots], held: none
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, bits = 32 - __clz(held);
    pdl_launch();
    for (int i = threadIdx.x; i < 32 * held; i += 1024) place[i] = 0;
    pdl_wait();
    for (int i = threadIdx.x; i < n_slots; i += 1024) {
        const int e = ids[i] - first;
        expert[i] = e >= 0 && e < held ? e : held;
    }
    __syncthreads();
    // A warp takes neighbouring slots, 32 at a time: first it counts, then it places.
    const int rounds = (n_slots + 1023) / 1024;
    int* own = place + warp * held;
    for (int r = 0; r < rounds; r++) {
        const int i = (warp * rounds + r) * 32 + lane, e = i < n_slots ? expert[i] : held;
        const unsigned lanes = same(e, bits);
        if (e < held && (lanes & ((1u << lane) - 1)) == 0) own[e] += __popc(lanes);
        __syncwarp();
    }
    __syncthreads();
    const int e = threadIdx.x;
    int n = 0, all;
    if (e < held)
        for (int w = 0; w < 32; w++) {
            const int count = place[w * held + e];
            place[w * held + e] = n, n += count;
        }
    const int start = sum_before(n, warp_slots, all);
    if (e < held)
        for (int w = 0; w < 32; w++) place[w * held + e] += start;
    // Tiles of this expert by width: four numbers of 16 bits.
    const int full = n >> 7, rest = n & 127, width = rest > 96 ? 0 : rest > 64 ? 1 : rest > 32 ? 2 : 3;
    unsigned long long before, total;
    before = sum_before((unsigned long long)full + ((unsigned long long)(rest > 0) << 16 * width),
                        warp_tiles, total);
    int end[4], sum = 0;
    for (int i = 0; i < 4; i++) end[i] = sum += (int)(total >> 16 * i & 0xFFFF);
    if (threadIdx.x < 4) ends[threadIdx.x] = end[threadIdx.x];
    int at = (int)(before & 0xFFFF);
    for (int i = 0; i <= full; i++, at++) {
        const int count = i < full ? 128 : rest;
        if (count == 0) break;
        if (i == full && width > 0) at = end[width - 1] + (int)(before >> 16 * width & 0xFFFF);
        tiles[4 * at] = e, tiles[4 * at + 1] = start + 128 * i, tiles[4 * at + 2] = count;
        tiles[4 * at + 3] = 0;
    }
    __syncthreads();
    for (int r = 0; r < rounds; r++) {
        const int i = (warp * rounds + r) * 32 + lane, e = i < n_slots ? expert[i] : held;
        const unsigned lanes = same(e, bits);
        const int rank = __popc(lanes & ((1u << lane) - 1));
        if (e < held) slots[own[e] + rank] = i;
        __syncwarp();
        if (e < held && rank == 0) own[e] += __popc(lanes);
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(256)
moe_combine(float* y, const float* part, const int* ids, const float* weights, int n_used, int d,
            int first, int held, int add) {
    pdl_launch();
    pdl_wait();
    const int* id = ids + blockIdx.x * n_used;
    const float* weight = weights + blockIdx.x * n_used;
    y += (long long)blockIdx.x * d, part += (long long)blockIdx.x * n_used * d;
    for (int i = threadIdx.x; i < d; i += 256) {
        float sum = add ? y[i] : 0.f;
        for (int k = 0; k < n_used; k++)
            if (id[k] >= first && id[k] < first + held) sum += weight[k] * part[(long long)k * d + i];
        y[i] = sum;
    }
}
