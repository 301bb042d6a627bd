// Op        route: chosen experts and their weights from gate scores; ties go to the lower id
// Shapes    ids, weights [n, K], logits [n, E], bias [E] or null, pos [n], imposed [n, K] or null: ids to
//           take instead of choosing
// Dtypes    float32, ids, pos, imposed int32; a padded token (pos -1) gets ids -1, weights 0
// Grid      (n), 32 threads: one warp per token
// Assumes   E <= 1024, groups <= 64; E a multiple of groups
// Numerics  softmax (max subtracted) or sigmoid per expert; group score = its maximum (softmax) or
//           its best two (sigmoid); weights from unbiased scores
// Bound by  launch latency
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"
#include "reduce.cuh"

#define NONE __int_as_float(0xff800000)  // -inf

// (value, index) of the best entry, lower index first among equals; every lane gets both.
__device__ __forceinline__ int warp_best(float& value, int index) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        const float v = __shfl_xor_sync(~0u, value, offset);
        const int i = __shfl_xor_sync(~0u, index, offset);
        if (v > value || (v == value && i < index)) value = v, index = i;
    }
    return index;
}

extern "C" __global__ void route_f32(int* ids, float* weights, const float* logits,
                                     const float* bias, const int* pos, const int* imposed,
                                     int n_experts, int n_used, int n_groups,
                                     int n_groups_used, int sigmoid, int renormalise,
                                     float scale) {
    __shared__ float score[1024], select[1024], group[64];
    const int lane = threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (pos[blockIdx.x] < 0) {
        for (int k = lane; k < n_used; k += 32) {
            ids[blockIdx.x * n_used + k] = -1;
            weights[blockIdx.x * n_used + k] = 0.f;
        }
        return;
    }
    const float* in = logits + (long long)blockIdx.x * n_experts;
    float top = NONE, sum = 0.f;
    for (int e = lane; e < n_experts; e += 32) top = fmaxf(top, in[e]);
    warp_best(top, lane);
    for (int e = lane; e < n_experts; e += 32) {
        score[e] = sigmoid ? 1.f / (1.f + expf(-in[e])) : expf(in[e] - top);
        sum += score[e];
    }
    sum = warp_sum(sum);
    for (int e = lane; e < n_experts; e += 32) {
        if (!sigmoid) score[e] /= sum;
        select[e] = score[e] + (bias ? bias[e] : 0.f);
    }
    __syncwarp();
    if (n_groups > 1) {
        const int size = n_experts / n_groups;
        for (int g = lane; g < n_groups; g += 32) {
            float best = NONE, second = NONE;
            for (int i = g * size; i < (g + 1) * size; i++) {
                if (select[i] > best) second = best, best = select[i];
                else second = fmaxf(second, select[i]);
            }
            group[g] = sigmoid && size > 1 ? best + second : best;
        }
        __syncwarp();
        // A group stays when fewer than n_groups_used others are better (or equal and earlier).
        for (int e = lane; e < n_experts; e += 32) {
            const int g = e / size;
            int better = 0;
            for (int o = 0; o < n_groups; o++)
                better += group[o] > group[g] || (group[o] == group[g] && o < g);
            if (better >= n_groups_used) select[e] = NONE;
        }
        __syncwarp();
    }
    float total = 0.f;
    for (int k = 0; k < n_used; k++) {
        float value = NONE;
        int best = n_experts;
        for (int e = lane; e < n_experts; e += 32)
            if (select[e] > value) value = select[e], best = e;
        best = warp_best(value, best);
        if (imposed) best = imposed[blockIdx.x * n_used + k];
        total += score[best];
        if (lane == 0) {
            ids[blockIdx.x * n_used + k] = best;
            weights[blockIdx.x * n_used + k] = score[best];
        }
        __syncwarp();
        if (lane == 0) select[best] = NONE;
        __syncwarp();
    }
    const float factor = renormalise ? scale / fmaxf(total, 1e-20f) : scale;
    __syncwarp();
    for (int k = lane; k < n_used; k += 32) weights[blockIdx.x * n_used + k] *= factor;
}
