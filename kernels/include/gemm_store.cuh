// What a product does with its sums: float32 rows, added to float32 rows, or float16 rows.
// d0, d1 as in warpgroup.cuh: weight rows row0 .. row0 + 127 and the next 128 (of `rows`), tokens
// 0 .. n - 1; to(token) is the address of a token's row.
#pragma once
#include "gemm.cuh"

// Rows at a fixed stride.
template <class T>
struct StridedRows {
    T* y;
    long long stride;
    __device__ __forceinline__ T* operator()(int token) const { return y + token * stride; }
};

// y = scale d. Eight lanes fill a 32-byte sector of a token's row.
template <int N, class To>
__device__ __forceinline__ void store_float(
        const float (&d0)[N / 2], const float (&d1)[N / 2], float scale, int row0, int rows, int n, To to) {
    const int row = row0 + gemm_row(), token = gemm_token();
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const int t = 8 * (i / 2) + token + i % 2, at = 4 * (i / 2) + i % 2;
        if (t >= n) continue;
        float* y = to(t) + row;
        if (row < rows) y[0] = d0[at] * scale;
        if (row + 8 < rows) y[8] = d0[at + 2] * scale;
        if (row + 128 < rows) y[128] = d1[at] * scale;
        if (row + 136 < rows) y[136] = d1[at + 2] * scale;
    }
}

// y += scale d: one writer per element, so the sum's order is fixed.
template <int N, class To>
__device__ __forceinline__ void add_float(
        const float (&d0)[N / 2], const float (&d1)[N / 2], float scale, int row0, int rows, int n, To to) {
    const int row = row0 + gemm_row(), token = gemm_token();
#pragma unroll
    for (int first = 0; first < N / 4; first += 8) {  // 32 loads under way
        float old[8][4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float* y = to(min(8 * ((first + i) / 2) + token + i % 2, n - 1)) + row;
            old[i][0] = row < rows ? y[0] : 0.f;
            old[i][1] = row + 8 < rows ? y[8] : 0.f;
            old[i][2] = row + 128 < rows ? y[128] : 0.f;
            old[i][3] = row + 136 < rows ? y[136] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int t = 8 * ((first + i) / 2) + token + i % 2, at = 4 * ((first + i) / 2) + i % 2;
            if (t >= n) continue;
            float* y = to(t) + row;
            if (row < rows) y[0] = old[i][0] + d0[at] * scale;
            if (row + 8 < rows) y[8] = old[i][1] + d0[at + 2] * scale;
            if (row + 128 < rows) y[128] = old[i][2] + d1[at] * scale;
            if (row + 136 < rows) y[136] = old[i][3] + d1[at + 2] * scale;
        }
    }
}

// y = float16 of value(i), i the index of a register of one part, whose rows start at row0. Four
// lanes fill a 32-byte sector of a token's row. Rows from `rows` to the next multiple of 8 are
// written too: y's rows are padded.
template <int N, class Value, class To>
__device__ __forceinline__ void store_half(Value value, int row0, int rows, int n, To to) {
    const int lane = threadIdx.x & 31, odd = lane & 1;
    // after the transpose a lane has token lane / 4, after the exchange four rows of it
    const int row = row0 + (threadIdx.x >> 5) * 16 + (odd ? 8 : 0) + 4 * ((lane & 3) >> 1);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const unsigned top = transposed(saturated_half2(value(4 * j), value(4 * j + 1)));
        const unsigned bottom = transposed(saturated_half2(value(4 * j + 2), value(4 * j + 3)));
        const unsigned other = __shfl_xor_sync(~0u, odd ? top : bottom, 1);
        const int t = 8 * j + (lane >> 2);
        if (t < n && row < (rows + 7) / 8 * 8)
            *(uint2*)(to(t) + row) = odd ? make_uint2(other, bottom) : make_uint2(top, other);
    }
}
