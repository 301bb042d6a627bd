// Op        merges the splits of mla_decode by their maxima and sums: o = softmax-weighted mean
// Shapes    o [n, h, r], part [n, h, splits, r + 2]
// Dtypes    float32
// Grid      (n h), 256 threads
// Numerics  splits in order; a split with sum 0 is left out
// Bound by  bytes of part
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"

extern "C" __global__ void mla_combine_f32(float* o, const float* part, int splits, int r) {
    pdl_launch();
    pdl_wait();
    const float* in = part + (long long)blockIdx.x * splits * (r + 2);
    float peak = __int_as_float(0xff800000), total = 0.f;
    for (int s = 0; s < splits; s++)
        if (in[s * (r + 2) + r + 1] > 0.f) peak = fmaxf(peak, in[s * (r + 2) + r]);
    for (int s = 0; s < splits; s++) {
        const float sum = in[s * (r + 2) + r + 1];
        if (sum > 0.f) total += sum * expf(in[s * (r + 2) + r] - peak);
    }
    for (int i = threadIdx.x; i < r; i += blockDim.x) {
        float v = 0.f;
        for (int s = 0; s < splits; s++) {
            const float* split = in + s * (r + 2);
            if (split[r + 1] > 0.f) v += split[i] * expf(split[r] - peak);
        }
        o[(long long)blockIdx.x * r + i] = v / total;
    }
}
