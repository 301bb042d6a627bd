// How absorbed attention divides cache rows among CTAs; the attention and its merge must agree.
// Read on the device, so that a captured grid serves every n_kv.
#pragma once

#define SPLIT_ROWS 32  // a split is a multiple of this

// Rows of a split when `rows` are divided over at most `splits`.
__device__ __forceinline__ int split_length(int rows, int splits) {
    const int length = (rows + splits - 1) / splits;
    return max((length + SPLIT_ROWS - 1) / SPLIT_ROWS * SPLIT_ROWS, SPLIT_ROWS);
}

// pos[t], from where all SMs see the same: kernels read it before they wait for their predecessor,
// when a copy nearby may be of the step before.
__device__ __forceinline__ int position(const int* pos, int t) {
#ifdef SIMT
    return pos[t];
#else
    return __ldcg(pos + t);
#endif
}

// Largest of pos[first .. last]; every lane of a warp gets it. Needs all lanes.
__device__ __forceinline__ int last_position(const int* pos, int first, int last) {
    int most = -1;
    for (int t = first + (threadIdx.x & 31); t <= last; t += 32) most = max(most, position(pos, t));
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        most = max(most, __shfl_xor_sync(~0u, most, offset));
    return most;
}
