// Op        y[t] = row tokens[t] of w, unpacked
// Shapes    y [n, d], tokens [n], w [V, d]
// Dtypes    w any GGUF type (WTYPE), y float32
// Grid      (n), 256 threads
// Assumes   rows begin at a block; d a multiple of 32 unless the type has no blocks
// Numerics  exact: bit-equal to gguf-py
// Bound by  bytes: n rows of w, 4 n d written
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"
#include "quants.cuh"

extern "C" __global__ void embed_f32(float* y, const int* tokens, const unsigned char* w, int d,
                                     long long row_bytes) {
    pdl_launch();
    pdl_wait();
    const unsigned char* row = w + tokens[blockIdx.x] * row_bytes;
    float* out = y + (long long)blockIdx.x * d;
    for (int g = threadIdx.x; g * 32 < d; g += blockDim.x) {
        float v[32];
        const int left = d - g * 32;
        load_group_tail<WTYPE>(row, g, d, v);
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (i < left) out[g * 32 + i] = v[i];
    }
}
