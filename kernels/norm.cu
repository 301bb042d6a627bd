// Op        rms_norm: y = x / sqrt(mean(x^2) + eps) * w
// Shapes    y [n, d] dense, x [n, d] with row stride ldx, w [d]
// Dtypes    float32
// Grid      (n), 256 threads
// Numerics  block_sum's fixed order; relative error about 1e-6
// Bound by  bytes: 4 n d per array
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"
#include "reduce.cuh"

extern "C" __global__ void rms_norm_f32(float* y, const float* x, const float* w, int d,
                                        long long ldx, float eps) {
    pdl_launch();
    pdl_wait();
    const float* in = x + blockIdx.x * ldx;
    float* out = y + (long long)blockIdx.x * d;
    float sum = 0.f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += in[i] * in[i];
    const float scale = rsqrtf(block_sum(sum) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) out[i] = in[i] * scale * w[i];
}
