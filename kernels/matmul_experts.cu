// Op        experts_up: h[t][s] = silu(gate_e x[t]) * up_e x[t], e = ids[t][s]
//           experts_down: y[t] (+)= sum_s weights[t][s] * down_e h[t][s], in the order of s
// Shapes    h [n, K, f], x [n, d], ids and weights [n, K], y [n, d];
//           gate, up [E, f, d] and down [E, d, f] in GGUF bytes, experts `expert_bytes` apart
// Dtypes    weights any GGUF type (WTYPE, up WTYPE_UP); activations and sums float32
// Grid      up (ceil(f / 8), n K), down (ceil(d / 8), n); 256 threads, a warp per output row;
//           shared bytes: 4 GROUP_STRIDE ceil(d / 32), and K times that of f
// Assumes   experts first .. first + held - 1 are here; others add nothing
// Numerics  as matmul_vec
// Bound by  bytes of the chosen experts
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"
#include "quants.cuh"
#include "reduce.cuh"
#include "staged.cuh"

// sum + a lane's columns of a weight row times those of a vector
template <int T>
__device__ __forceinline__ float dot_group(float sum, const unsigned char* row, int g, int n,
                                           int skip, const float* staged) {
    float v[32], x[32];
    lane_values<T>(row, g, n, skip, v);
    lane_inputs<T>(staged, g, n, x);
#pragma unroll
    for (int i = 0; i < 32; i++) sum += v[i] * x[i];
    return sum;
}

extern "C" __global__ void __launch_bounds__(256)
experts_up_f32(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
               const int* ids, int n_used, int f, int d, int first, int held,
               long long row_bytes, long long up_row_bytes, long long expert_bytes,
               long long up_expert_bytes) {
    extern __shared__ float staged[];
    const int lane = threadIdx.x & 31, o = blockIdx.x * 8 + (threadIdx.x >> 5);
    pdl_launch();
    pdl_wait();
    const int e = ids[blockIdx.y] - first;
    stage(staged, x + (long long)(blockIdx.y / n_used) * d, d);
    __syncthreads();
    if (o >= f) return;
    float g_sum = 0.f, u_sum = 0.f;
    if (e >= 0 && e < held) {
        const unsigned char* g_row = gate + e * expert_bytes + o * row_bytes;
        const unsigned char* u_row = up + e * up_expert_bytes + o * up_row_bytes;
        for (int g = lane; lane_has<WTYPE>(g, d); g += 32)
            g_sum = dot_group<WTYPE>(g_sum, g_row, g, d, 0, staged);
        for (int g = lane; lane_has<WTYPE_UP>(g, d); g += 32)
            u_sum = dot_group<WTYPE_UP>(u_sum, u_row, g, d, 0, staged);
    }
    g_sum = warp_sum(g_sum), u_sum = warp_sum(u_sum);
    if (lane == 0) h[(long long)blockIdx.y * f + o] = g_sum / (1.f + expf(-g_sum)) * u_sum;
}

extern "C" __global__ void __launch_bounds__(256)
experts_down_f32(float* y, const unsigned char* down, const float* h, const int* ids,
                 const float* weights, int n_used, int f, int d, int first, int held, int skip,
                 long long row_bytes, long long expert_bytes, int add) {
    extern __shared__ float staged[];
    const int lane = threadIdx.x & 31, o = blockIdx.x * 8 + (threadIdx.x >> 5);
    const int stride = (f + 31) / 32 * GROUP_STRIDE;
    pdl_launch();
    pdl_wait();
    for (int s = 0; s < n_used; s++)
        stage(staged + s * stride, h + ((long long)blockIdx.y * n_used + s) * f, f);
    __syncthreads();
    if (o >= d) return;
    float total = 0.f;
    for (int s = 0; s < n_used; s++) {
        const int slot = blockIdx.y * n_used + s, e = ids[slot] - first;
        if (e < 0 || e >= held) continue;
        const unsigned char* row = down + e * expert_bytes + o * row_bytes;
        float sum = 0.f;
        for (int g = lane; lane_has<WTYPE>(g, f); g += 32)
            sum = dot_group<WTYPE>(sum, row, g, f, skip, staged + s * stride);
        total += weights[slot] * sum;
    }
    total = warp_sum(total);
    float* to = y + (long long)blockIdx.y * d + o;
    if (lane == 0) *to = add ? *to + total : total;
}
