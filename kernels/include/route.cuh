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

struct Choice {
    int n_used, n_groups, n_groups_used, sigmoid, renormalise;
    float scale;
};

// What is added to the scores of a lane's experts for the choice alone.
__device__ __forceinline__ void take_bias(const float* bias, float (&own)[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = (threadIdx.x & 31) + 32 * i;
        own[i] = bias && e < N_EXPERTS ? bias[e] : 0.f;
    }
}

// One warp chooses for one token. score: E floats of shared memory; group: 64.
__device__ __forceinline__ void choose(
        int* ids, float* weights, const float* in, const float (&bias)[PER_LANE], const int* imposed,
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
    unsigned stays[2] = {0, 0};  // bits of groups
    if (how.n_groups > 1) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int e = lane + 32 * i;
            if (e < N_EXPERTS) score[e] = own[i] + bias[i];
        }
        __syncwarp();
        int per = 32;  // lanes that look through one group
        while (per > 1 && per * how.n_groups > 32) per /= 2;
        for (int first = 0; first < how.n_groups; first += 32 / per) {
            const int g = first + lane / per;
            float best = NONE, second = NONE;
            for (int i = lane % per; g < how.n_groups && i < size; i += per) {
                second = fmaxf(second, fminf(best, score[g * size + i]));
                best = fmaxf(best, score[g * size + i]);
            }
            for (int offset = per / 2; offset; offset /= 2) {
                const float other = __shfl_xor_sync(~0u, best, offset);
                second = fmaxf(fmaxf(second, __shfl_xor_sync(~0u, second, offset)), fminf(best, other));
                best = fmaxf(best, other);
            }
            if (lane % per == 0 && g < how.n_groups)
                group[g] = how.sigmoid && size > 1 ? best + second : best;
        }
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {  // a group stays if fewer than n_groups_used are better
            const int g = lane + 32 * half;
            int better = g < how.n_groups ? 0 : how.n_groups_used;
            for (int o = 0; g < how.n_groups && o < how.n_groups; o++)
                better += group[o] > group[g] || (group[o] == group[g] && o < g);
            stays[half] = __ballot_sync(~0u, better < how.n_groups_used);
        }
    }
    const float groups = 1.f / size;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = lane + 32 * i, g = (int)((e + 0.5f) * groups);
        const bool out = how.n_groups > 1 && !((g & 32 ? stays[1] : stays[0]) >> (g & 31) & 1);
        key[i] = e < N_EXPERTS ? ordered(out ? NONE : own[i] + bias[i]) : 0;
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

