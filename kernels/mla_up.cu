// Op        the weights that expand latent rows, as float16 in the order that mla_expand reads:
//           column c of head i is k_b[i, :, c] for c < k, then v_b[i, c, :]
// Shapes    up (slabs.cuh): columns h * (KS + VS) slabs of 64, in pairs, depth r; k_b [h, r, k];
//           v_b [h, v, r]
// Dtypes    WTYPE and WTYPE_V (GGUF type numbers) in raw GGUF bytes; float16
// Grid      (RS, h * (KS + VS)), 128 threads: a block of 64 columns x 64 of depth
// Assumes   k, v, r at compile time; whole rows (nothing is cut along k or r)
// Numerics  each weight rounded once to float16
// Bound by  bytes: h (k + v) r x (weight + 2)
// Sources   own
// Tested by tests/kernels/test_prefill.py, tests/gpu/test_cuda_prefill.py
#include "pdl.cuh"
#include "quants.cuh"
#include "slabs.cuh"

extern "C" __global__ void __launch_bounds__(128)
mla_up(unsigned char* up, const unsigned char* k_b, const unsigned char* v_b, long long k_row,
       long long v_row) {
    __align__(16) __shared__ __half block[64][72];  // [column][depth]
    const int depth = blockIdx.x, slab = blockIdx.y, head = slab / (KS + VS);
    const int part = slab % (KS + VS), line = threadIdx.x >> 1, half = threadIdx.x & 1;
    pdl_launch();
    float w[32];
    if (part < KS) {  // a row of k_b is one of depth
        const int at = 64 * depth + line;
#pragma unroll
        for (int i = 0; i < 32; i++) w[i] = 0.f;
        if (at < R && 64 * part + 32 * half < K)
            load_group_tail<WTYPE>(k_b + ((long long)head * R + at) * k_row, 2 * part + half, K, w);
#pragma unroll
        for (int i = 0; i < 32; i++) block[32 * half + i][line] = __float2half_rn(w[i]);
    } else {  // a row of v_b is a column
        const int at = 64 * (part - KS) + line;
#pragma unroll
        for (int i = 0; i < 32; i++) w[i] = 0.f;
        if (at < V && 64 * depth + 32 * half < R)
            load_group_tail<WTYPE_V>(v_b + ((long long)head * V + at) * v_row, 2 * depth + half, R,
                                     w);
#pragma unroll
        for (int i = 0; i < 32; i++) block[line][32 * half + i] = __float2half_rn(w[i]);
    }
    __syncthreads();
    pdl_wait();
    unsigned char* to = up + ((long long)(slab >> 1) * RS + depth) * 128 * SLAB_ROW;
    for (int i = threadIdx.x; i < 512; i += 128) {
        const int column = i >> 3, piece = i & 7;
        *reinterpret_cast<uint4*>(to + piece_at(64 * (slab & 1) + column, piece)) =
            *reinterpret_cast<const uint4*>(&block[column][8 * piece]);
    }
}
