// Merges the splits of one query row (mla_decode_mma.cu) over COLS of its r columns.
#pragma once

#include "mla_splits.cuh"

#define MERGE_SPLITS 256  // splits that can be merged: a thread weighs one

// Splits that hold something for a row of position `last`.
__device__ __forceinline__ int live_splits(const int* pos, int n, int last, int top_k, int splits) {
    if (last < 0) return 0;
    if (splits == 1) return 1;
    const int rows = top_k ? top_k : last_position(pos, 0, n - 1) + 1;
    const int length = split_length(rows, splits);
    return ((top_k ? top_k : last + 1) + length - 1) / length;
}

// out[COLS] (shared) = columns first .. first + COLS - 1 of the row's softmax-weighted mean; zeros
// when `live` is 0. 256 threads; ends with a barrier. `part` [splits, r], `stat` [splits, 2].
template <int COLS>
__device__ __forceinline__ void merge_splits(float* out, const float* part, const float* stat,
                                             int live, int r, int first) {
    constexpr int LANES = COLS / 4, GROUPS = 256 / LANES, ITEMS = 8;
    __shared__ float weight[MERGE_SPLITS], sums[8], tops[8];
    __shared__ float4 partial[256];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int group = threadIdx.x / LANES, c = threadIdx.x % LANES;
    const float none = __int_as_float(0xff800000);
    const float* in = part + first + 4 * c;
    float4 v[ITEMS];  // asked for before the weights are known
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int s = group + i * GROUPS;
        v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (group < GROUPS && s < live) v[i] = *(const float4*)(in + (long long)s * r);
    }
    float top = none, sum = 0.f;
    if (threadIdx.x < live) top = stat[2 * threadIdx.x], sum = stat[2 * threadIdx.x + 1];
    float peak = top;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, offset));
    if (lane == 0) tops[warp] = peak;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 8; w++) peak = fmaxf(peak, tops[w]);
    const float own = top > none ? exp2f(top - peak) : 0.f;
    weight[threadIdx.x] = own;
    sum *= own;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < 8; w++) total += sums[w];
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](int split, const float4& x) {
        const float w = weight[split];
        o.x += w * x.x, o.y += w * x.y, o.z += w * x.z, o.w += w * x.w;
    };
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (group < GROUPS && group + i * GROUPS < live) add(group + i * GROUPS, v[i]);
    for (int s = group + ITEMS * GROUPS; group < GROUPS && s < live; s += GROUPS)
        add(s, *(const float4*)(in + (long long)s * r));
    partial[threadIdx.x] = o;
    __syncthreads();
    if (threadIdx.x < COLS) {
        float y = 0.f;
        for (int g = 0; g < min(GROUPS, live); g++)
            y += (&partial[g * LANES + threadIdx.x / 4].x)[threadIdx.x % 4];
        out[threadIdx.x] = live ? y / total : 0.f;
    }
    __syncthreads();
}
