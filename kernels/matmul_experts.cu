// Op        experts_up: h[t][s] = silu(gate_e x[t]) * up_e x[t], e = ids[t][s]
//           experts_down: y[t] = sum_s weights[t][s] * down_e h[t][s], in the order of s
// Shapes    h [n, K, f], x [n, d], ids and weights [n, K], y [n, d];
//           gate, up [E, f, d] and down [E, d, f] in GGUF bytes, experts `expert_bytes` apart
// Dtypes    weights any GGUF type (WTYPE, up WTYPE_UP); activations and sums float32
// Grid      up (ceil(f / 8), n K), down (ceil(d / 8), n); 256 threads, a warp per output row
// Assumes   experts first .. first + held - 1 are here; others add nothing
// Numerics  as matmul_vec
// Bound by  bytes of the chosen experts
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"
#include "quants.cuh"
#include "reduce.cuh"

template <int T>
__device__ __forceinline__ float dot(const unsigned char* row, const float* x, int n, int skip) {
    float sum = 0.f;
    for (int g = threadIdx.x & 31; g * 32 < n; g += 32) {
        float v[32];
        const int left = n - g * 32;
        load_group_tail<T>(row, g + skip / 32, skip + n, v);
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (i < left) sum += v[i] * x[g * 32 + i];
    }
    return warp_sum(sum);
}

extern "C" __global__ void __launch_bounds__(256)
experts_up_f32(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
               const int* ids, int n_used, int f, int d, int first, int held,
               long long row_bytes, long long up_row_bytes, long long expert_bytes,
               long long up_expert_bytes) {
    const int o = blockIdx.x * 8 + (threadIdx.x >> 5);
    pdl_launch();
    pdl_wait();
    const int e = ids[blockIdx.y] - first;
    if (o >= f) return;
    float value = 0.f;
    if (e >= 0 && e < held) {
        const float* in = x + (long long)(blockIdx.y / n_used) * d;
        const float g = dot<WTYPE>(gate + e * expert_bytes + o * row_bytes, in, d, 0);
        const float u = dot<WTYPE_UP>(up + e * up_expert_bytes + o * up_row_bytes, in, d, 0);
        value = g / (1.f + expf(-g)) * u;
    }
    if ((threadIdx.x & 31) == 0) h[(long long)blockIdx.y * f + o] = value;
}

extern "C" __global__ void __launch_bounds__(256)
experts_down_f32(float* y, const unsigned char* down, const float* h, const int* ids,
                 const float* weights, int n_used, int f, int d, int first, int held, int skip,
                 long long row_bytes, long long expert_bytes) {
    const int o = blockIdx.x * 8 + (threadIdx.x >> 5);
    pdl_launch();
    pdl_wait();
    if (o >= d) return;
    float sum = 0.f;
    for (int s = 0; s < n_used; s++) {
        const int slot = blockIdx.y * n_used + s, e = ids[slot] - first;
        if (e < 0 || e >= held) continue;
        const unsigned char* row = down + e * expert_bytes + o * row_bytes;
        sum += weights[slot] * dot<WTYPE>(row, h + (long long)slot * f, f, skip);
    }
    if ((threadIdx.x & 31) == 0) y[(long long)blockIdx.y * d + o] = sum;
}
