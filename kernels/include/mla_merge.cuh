// Merges the splits of one query row (mla_decode_mma.cu) over COLS of its r columns.
#pragma once

#include "mla_splits.cuh"
#include "reduce.cuh"

#define MERGE_SPLITS 256  // splits that can be merged: a thread weighs one

// Splits that hold something for a row of position `last`.
__device__ __forceinline__ int live_splits(const int* pos, int n, int last, int top_k, int splits) {
    if (last < 0) return 0;
    if (splits == 1) return 1;
    const int rows = top_k ? top_k : last_position(pos, 0, n - 1) + 1;
    const int length = split_length(rows, splits);
    return ((top_k ? top_k : last + 1) + length - 1) / length;
}

// Column threadIdx.x (< COLS) of columns first .. first + COLS - 1 of the row's softmax-weighted mean;
// 0 when `live` is 0; other threads get nothing of use. 256 threads; `part` [splits, r], `stat`
// [splits, 2]. Every warp weighs all splits for itself, which spares two barriers.
template <int COLS>
__device__ __forceinline__ float merge_splits(const float* part, const float* stat, int live, int r,
                                              int first) {
    constexpr int LANES = COLS / 4, GROUPS = 256 / LANES, ITEMS = 9, WEIGHED = MERGE_SPLITS / 32;
    __shared__ float4 partial[256];
    const int lane = threadIdx.x & 31, group = threadIdx.x / LANES, c = threadIdx.x % LANES;
    const float none = __int_as_float(0xff800000);
    const float* in = part + first + 4 * c;
    float4 v[ITEMS];
    float2 own[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int s = group + i * GROUPS;
        v[i] = make_float4(0.f, 0.f, 0.f, 0.f), own[i] = make_float2(none, 0.f);
        if (group < GROUPS && s < live) {
            v[i] = *(const float4*)(in + (long long)s * r);
            own[i] = *(const float2*)(stat + 2 * s);
        }
    }
    float top[WEIGHED], sum[WEIGHED], peak = none, total = 0.f;
#pragma unroll
    for (int i = 0; i < WEIGHED; i++) {
        top[i] = none, sum[i] = 0.f;
        if (32 * i < live && lane + 32 * i < live) {
            const float2 two = *(const float2*)(stat + 2 * (lane + 32 * i));
            top[i] = two.x, sum[i] = two.y;
        }
        peak = fmaxf(peak, top[i]);
    }
    peak = warp_max(peak);
#pragma unroll
    for (int i = 0; i < WEIGHED; i++)
        if (top[i] > none) total += sum[i] * exp2f(top[i] - peak);
    total = warp_sum(total);
    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](float its_top, const float4& x) {
        const float w = its_top > none ? exp2f(its_top - peak) : 0.f;
        o.x += w * x.x, o.y += w * x.y, o.z += w * x.z, o.w += w * x.w;
    };
#pragma unroll
    for (int i = 0; i < ITEMS; i++) add(own[i].x, v[i]);
    for (int s = group + ITEMS * GROUPS; group < GROUPS && s < live; s += GROUPS)
        add(stat[2 * s], *(const float4*)(in + (long long)s * r));
    partial[threadIdx.x] = o;
    __syncthreads();
    float y = 0.f;
    if (threadIdx.x < COLS)
        for (int g = 0; g < min(GROUPS, live); g++)
            y += (&partial[g * LANES + threadIdx.x / 4].x)[threadIdx.x % 4];
    return live ? y / total : 0.f;
}
