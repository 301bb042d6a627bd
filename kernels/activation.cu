// Op        silu_mul: y = silu(gate) * up;  add: y = a + b;  rows: y[i] = x[wanted[i]]
// Shapes    flat arrays of m elements; rows: y [m, d], x [n, d]
// Dtypes    float32
// Grid      (ceil(m / 256)), 256 threads; rows (m), 256 threads
// Numerics  one rounding per operation, expf
// Bound by  bytes
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"

extern "C" __global__ void silu_mul_f32(float* y, const float* gate, const float* up,
                                        long long m) {
    pdl_launch();
    pdl_wait();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < m) y[i] = gate[i] / (1.f + expf(-gate[i])) * up[i];
}

extern "C" __global__ void add_f32(float* y, const float* a, const float* b, long long m) {
    pdl_launch();
    pdl_wait();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < m) y[i] = a[i] + b[i];
}

extern "C" __global__ void rows_f32(float* y, const float* x, const int* wanted, int d) {
    pdl_launch();
    pdl_wait();
    const float* in = x + (long long)wanted[blockIdx.x] * d;
    float* out = y + (long long)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) out[i] = in[i];
}
