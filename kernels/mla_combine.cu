// Op        merges the splits of absorbed attention by their maxima and sums:
//           o = sum_s w_s part_s / sum_s w_s sum_s, w_s = 2^(top_s - max top)
// Shapes    mla_merge_f32: o [n, h, r], part [n h, splits, r], stat [n h, splits, 2], pos [n]
//           mla_combine_f32, the plain kernels' twin: part [n, h, splits, r + 2], base e
// Dtypes    float32
// Grid      mla_merge_f32 (r / SLICE, h, n), 256 threads; mla_combine_f32 (n h), 256 threads
// Assumes   SLICE a multiple of 4, divides r, at most 256; at most 256 splits
// Numerics  splits in a fixed order, groups of them summed side by side; no live split gives 0
// Bound by  bytes of part that live splits wrote: r * live * 4 a row
// Sources   own
// Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_attention.py
#include "mla_merge.cuh"
#include "pdl.cuh"

// ---------------------------------------------------------------- kernels -------------------
#ifdef SLICE
extern "C" __global__ void __launch_bounds__(256)
mla_merge_f32(float* o, const float* part, const float* stat, const int* pos, int n, int splits,
              int r, int top_k) {
    __shared__ float merged[SLICE];
    const int head = blockIdx.y, t = blockIdx.z, first = blockIdx.x * SLICE;
    const long long row = (long long)t * gridDim.y + head;
    pdl_wait();
    pdl_launch();
    const int live = live_splits(pos, n, pos[t], top_k, splits);
    merge_splits<SLICE>(merged, part + row * splits * r, stat + row * splits * 2, live, r, first);
    for (int i = threadIdx.x; i < SLICE; i += 256) o[row * r + first + i] = merged[i];
}
#endif

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
        o[(long long)blockIdx.x * r + i] = total > 0.f ? v / total : 0.f;
    }
}
