// Op        rope_table: cos and sin of pos * frequency;  rope: pairs (2i, 2i + 1) of x rotated
// Shapes    cos, sin [n, p / 2], pos [n], frequency [p / 2] (double);
//           x [n, h, p] with strides ldx (token) and ldh (head), y [n, h, p] dense
// Dtypes    float32; angles in double, so that position 1e6 keeps its phase
// Grid      rope_table (n), p / 2 threads at most 512;  rope (n, h), p / 2 threads
// Assumes   rope_table_f32 is the first launch of a step: it lets its successor start only after its
//           own wait, so all kernels of the step find the step before complete
// Numerics  as NumPy: float64 angle, float32 cos and sin
// Bound by  launch latency
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"

extern "C" __global__ void rope_table_f32(float* cosine, float* sine, const int* pos,
                                          const double* frequency, int half) {
    pdl_wait();  // first: what starts after this kernel may read pos and older cache rows at once
    pdl_launch();
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        double s, c;
        sincos(pos[blockIdx.x] * frequency[i], &s, &c);
        cosine[blockIdx.x * half + i] = (float)c;
        sine[blockIdx.x * half + i] = (float)s;
    }
}

extern "C" __global__ void rope_f32(float* y, const float* x, const float* cosine,
                                    const float* sine, int half, long long ldx, long long ldh) {
    pdl_launch();
    pdl_wait();
    const int t = blockIdx.x, head = blockIdx.y;
    const float* in = x + t * ldx + head * ldh;
    float* out = y + ((long long)t * gridDim.y + head) * 2 * half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float c = cosine[t * half + i], s = sine[t * half + i];
        const float even = in[2 * i], odd = in[2 * i + 1];
        out[2 * i] = even * c - odd * s;
        out[2 * i + 1] = even * s + odd * c;
    }
}
