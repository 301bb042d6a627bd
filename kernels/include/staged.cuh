// A vector in shared memory, in groups of 32 floats at a stride of 36: lanes that each read their
// own group as float4 meet no bank conflict.
#pragma once

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
