// A vector in shared memory, in groups of 32 floats at a stride of 36: lanes that each read their
// own group as float4 meet no bank conflict.
#pragma once
#include "quants.cuh"

#define GROUP_STRIDE 36

// Copies x[0..n) to shared memory, zeros up to the next multiple of 32. All threads of the CTA.
__device__ __forceinline__ void stage(float* staged, const float* x, int n) {
    for (int i = threadIdx.x; i < (n + 31) / 32 * 32; i += blockDim.x)
        staged[i / 32 * GROUP_STRIDE + i % 32] = i < n ? x[i] : 0.f;
}

// Group g of a staged vector.
__device__ __forceinline__ void staged_group(const float* staged, int g, float (&v)[32]) {
    const float4* at = reinterpret_cast<const float4*>(staged + g * GROUP_STRIDE);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float4 four = at[i];
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
}

// What a lane takes of the 1024 columns that its warp takes at a time, by its number g = lane + 32 * time:
// group g where a type has blocks; of plain numbers every 32nd column, so that loads of neighbouring
// lanes are neighbours.
template <int QTYPE>
__device__ __forceinline__ bool lane_has(int g, int n) {
    return (QuantTraits<QTYPE>::block == 1 ? g & ~31 : g) * 32 < n;
}

// Its values of a row of n; the first `skip` belong to another rank (plain numbers: none).
template <int QTYPE>
__device__ __forceinline__ void lane_values(
        const unsigned char* row, int g, int n, int skip, float (&v)[32]) {
    if constexpr (QuantTraits<QTYPE>::block == 1) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int c = 32 * ((g & ~31) + i) + (g & 31);
            v[i] = c < n ? load_float<QTYPE>(row, c) : 0.f;
        }
    } else {
        load_group_tail<QTYPE>(row, g + skip / 32, skip + n, v);
    }
}

// The same columns of a staged vector.
template <int QTYPE>
__device__ __forceinline__ void lane_inputs(const float* staged, int g, int n, float (&v)[32]) {
    if constexpr (QuantTraits<QTYPE>::block == 1) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int at = (g & ~31) + i;
            v[i] = 32 * at < n ? staged[at * GROUP_STRIDE + (g & 31)] : 0.f;
        }
    } else {
        staged_group(staged, g, v);
    }
}
