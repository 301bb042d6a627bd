// Op        rope_table: cos and sin of pos * frequency
// Shapes    cos, sin [n, p / 2], pos [n], frequency [p / 2] (double)
// Dtypes    float32; angles in double, so that position 1e6 keeps its phase
// Grid      (n), p / 2 threads at most 512
// Assumes   it is the first launch of a step: it lets its successor start only after its own wait, so
//           that all kernels of the step find the step before complete, pos and older cache rows too
// Numerics  as NumPy: float64 angle, float32 cos and sin
// Bound by  launch latency
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"

extern "C" __global__ void rope_table_f32(float* cosine, float* sine, const int* pos,
                                          const double* frequency, int half) {
    pdl_wait();  // before the launch: see Assumes
    pdl_launch();
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        double s, c;
        sincos(pos[blockIdx.x] * frequency[i], &s, &c);
        cosine[blockIdx.x * half + i] = (float)c;
        sine[blockIdx.x * half + i] = (float)s;
    }
}
