// The choice of experts of one token by a warp, from its N_EXPERTS gate scores.
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "reduce.cuh"

#define NONE __int_as_float(0xff800000)  // -inf
constexpr int PER_LANE = (N_EXPERTS + 31) / 32;

// Floats as integers of the same order.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned u = __float_as_uint(x);
    return u & 0x80000000 ? ~u : u | 0x80000000;
}

__device__ __forceinline__ unsigned warp_max(unsigned x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, x);
#else
    for (int offset = 16; offset; offset >>= 1) x = max(x, __shfl_xor_sync(~0u, x, offset));
    return x;
#endif
}

struct Choice {
    int n_used, n_groups, n_groups_used, sigmoid, renormalise;
    float scale;
};

// One warp chooses for one token. score: E floats of shared memory; group: 64.
__device__ __forceinline__ void choose(
        int* ids, float* weights, const float* in, const float* bias, const int* imposed,
        bool padded, const Choice& how, float* score, float* group) {
    const int lane = threadIdx.x & 31;
    float own[PER_LANE];
    unsigned key[PER_LANE], top = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = lane + 32 * i;
        own[i] = e < N_EXPERTS ? *(const volatile float*)(in + e) : NONE;
        top = max(top, ordered(own[i]));
    }
    if (how.sigmoid) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) own[i] = 1.f / (1.f + expf(-own[i]));
    } else {
        top = warp_max(top);
        const float most = __uint_as_float(top & 0x80000000 ? top ^ 0x80000000 : ~top);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) sum += own[i] = expf(own[i] - most);
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) own[i] /= sum;
    }
    const int size = N_EXPERTS / how.n_groups;
    if (how.n_groups > 1) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int e = lane + 32 * i;
            if (e < N_EXPERTS) score[e] = own[i] + (bias ? bias[e] : 0.f);
        }
        __syncwarp();
        for (int g = lane; g < how.n_groups; g += 32) {
            float best = NONE, second = NONE;
            for (int i = g * size; i < (g + 1) * size; i++) {
                second = fmaxf(second, fminf(best, score[i]));
                best = fmaxf(best, score[i]);
            }
            group[g] = how.sigmoid && size > 1 ? best + second : best;
        }
        __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = lane + 32 * i;
        if (e >= N_EXPERTS) {
            key[i] = 0;
            continue;
        }
        key[i] = ordered(own[i] + (bias ? bias[e] : 0.f));
        if (how.n_groups > 1) {  // it stays if fewer than n_groups_used groups are better than its own
            const int g = e / size;
            int better = 0;
            for (int o = 0; o < how.n_groups; o++)
                better += group[o] > group[g] || (group[o] == group[g] && o < g);
            if (better >= how.n_groups_used) key[i] = ordered(NONE);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (lane + 32 * i < N_EXPERTS) score[lane + 32 * i] = own[i];
    int mine = 0;  // lane k: the k-th choice
    for (int k = 0; k < how.n_used; k++) {
        unsigned best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) best = max(best, key[i]);
        best = warp_max(best);
        unsigned first = 0;  // ~ the lowest id with that key
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (key[i] == best) first = max(first, ~(unsigned)(lane + 32 * i));
        const int e = (int)~warp_max(first);
        if (lane == k) mine = e;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (e == lane + 32 * i) key[i] = 0;
    }
    __syncwarp();
    if (lane < how.n_used && imposed) mine = imposed[lane];
    const float weight = lane < how.n_used && mine >= 0 ? score[mine] : 0.f;
    const float total = warp_sum(weight);
    const float factor = how.renormalise ? how.scale / fmaxf(total, 1e-20f) : how.scale;
    if (lane < how.n_used) {
        ids[lane] = padded ? -1 : mine;
        weights[lane] = padded ? 0.f : weight * factor;
    }
}

