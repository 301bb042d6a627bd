// Expanded prefill's arrays in global memory: each is cut into pieces that one bulk copy brings to
// shared memory as products read them (warpgroup.cuh): slabs of rows x 64 float16 values.
//   queries  [h, n / 128, KS + PS slabs, 128 tokens]     up      [column pairs, RS slabs, 128]
//   keys     [h, tiles, KS, TILE cache rows]             values  [h, tiles, VS, TILE]
//   rope     [tiles, PS, TILE], shared by all heads
// K, P, V, R: sizes k, p, v, r; TILE: cache rows that a step of attention takes, 64 or 128.
// Sources: own. Tested by: tests/kernels/test_prefill.py, tests/gpu/test_cuda_prefill.py.
#pragma once
#include <cuda_fp16.h>

#define KS ((K + 63) / 64)
#define PS ((P + 63) / 64)
#define VS ((V + 63) / 64)
#define RS ((R + 63) / 64)
#define SLABS (KS + PS)  // of a query or key
#define SLAB_ROW 128  // bytes
#define QUERY_SLAB (128 * SLAB_ROW)

// Where 16-byte piece c of row i lies in a slab.
__device__ __forceinline__ int piece_at(int i, int c) {
    return i * SLAB_ROW + ((c ^ (i & 7)) << 4);
}

// Two float32 as float16, the first one low; +-65504 instead of infinity.
__device__ __forceinline__ unsigned pack_halves(float a, float b) {
    const __half2 both = __floats2half2_rn(fminf(fmaxf(a, -65504.f), 65504.f),
                                           fminf(fmaxf(b, -65504.f), 65504.f));
    return *reinterpret_cast<const unsigned*>(&both);
}
__device__ __forceinline__ uint4 pack_piece(const float (&v)[8]) {
    return make_uint4(pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(v[4], v[5]),
                      pack_halves(v[6], v[7]));
}
