// Op        raw_products: y[b][t][o] (+)= sum_i w[b][o][i] x[b][t][i]: dense and per head (b) products
//           raw_experts_up: h[t][s] = silu(gate_e x[t]) * up_e x[t], e = ids[t][s]
//           raw_experts_down: y[t] (+)= sum_s weights[t][s] * down_e h[t][s]
// Shapes    w [B, out, in], gate and up [E, f, d], down [E, d, f] in GGUF bytes, strides between
//           batches and experts in bytes (wb, expert_bytes); x rows of `in` at stride ldx, y rows at ldy;
//           h [n, K, f]; ids, weights [n, K]; `skip` columns of the first block belong to another rank
// Dtypes    w any quantised GGUF type (WTYPE); the rest and sums float32
// Grid      products (any, ceil(n / TOKENS), B), up (any, n K), down (any, n): CTAs along x share the
//           rows; 32 N_WARPS threads, N_CTAS fit an SM; shared bytes: cuda_raw.py
// Assumes   share, slot as raw_rows.cuh has them; skip a multiple of 32; experts first .. first + held
//           - 1 are here, others give 0; w_bytes: of all of w
// Numerics  see include/raw_rows.cuh
// Bound by  unpacking's integer instructions, for the smallest types; else bytes of w
// Sources   own
// Variants  WTYPE=10 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=11 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=16 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=17 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=18 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=19 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=21 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=22 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=29 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=16 N_WARPS=16 N_CTAS=1 STAGES=3 TOKENS=1 ADD=1;
//           WTYPE=11 N_WARPS=8 N_CTAS=1 STAGES=3 TOKENS=8 ADD=0;
//           WTYPE=6 N_WARPS=8 N_CTAS=2 STAGES=3 TOKENS=1 ADD=0;
//           WTYPE=12 N_WARPS=16 N_CTAS=1 STAGES=3 TOKENS=1 ADD=0
// Needs     8.0
// Spills    none
// Tested by tests/kernels/test_raw.py, tests/gpu/test_cuda_raw.py
#include "raw_rows.cuh"

// ---------------------------------------------------------------- device helpers ------------
// Shared memory: x's pieces, its sums, sums of warps, the ring.
struct RawMemory {
    RawX x;
    float* sums;
    unsigned char* ring;
    __device__ __forceinline__ RawMemory(unsigned char* shared, int n_vectors, int n_sums, int n_groups) {
        x.n_chunks = (n_groups + 7) / 8 * 2;
        x.pieces = (uint4*)shared;
        x.sums = (float*)(x.pieces + n_vectors * x.n_chunks * 32);
        sums = x.sums + n_vectors * x.n_chunks * 8;
        ring = (unsigned char*)(sums + 2 * n_sums * RAW_WARPS * 16);
    }
};

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(RAW_THREADS, N_CTAS)
raw_products(float* y, const unsigned char* w, const float* x, int n, int out, int in, int skip,
             int share, int slot, long long row_bytes, long long w_bytes, long long ldx,
             long long ldy, long long wb, long long xb, long long yb) {
    extern __shared__ uint4 shared[];
    const int t0 = blockIdx.y * TOKENS, b = blockIdx.z, n_groups = (skip + in) / 32;
    const RawMemory memory((unsigned char*)shared, TOKENS, TOKENS, n_groups);
    RawX staged = memory.x;
    const RawShape shape = {out, n_groups, share, slot, row_bytes, w + w_bytes};
    pdl_launch();
    raw_rows<WTYPE, TOKENS, 1>(
        shape, staged, 1, memory.sums, memory.ring, [&](int) { return w + b * wb; },
        [&] {
            pdl_wait();
            for (int k = 0; k < TOKENS; k++)  // past the last token: zeros
                staged.put(k, x + b * xb + min(t0 + k, n - 1) * ldx, t0 + k < n ? in : 0, skip);
        },
        [&](int o, int k, const float (&total)[1]) {
            float* to = y + b * yb + (t0 + k) * ldy + o;
            if (t0 + k < n) *to = ADD ? *to + total[0] : total[0];
        });
}

#if TOKENS == 1
extern "C" __global__ void __launch_bounds__(RAW_THREADS, N_CTAS)
raw_experts_up(float* h, const unsigned char* gate, const unsigned char* up, const float* x,
               const int* ids, int n_used, int f, int d, int first, int held, int share,
               int slot, long long row_bytes, long long expert_bytes, long long w_bytes, long long ldx) {
    extern __shared__ uint4 shared[];
    const RawMemory memory((unsigned char*)shared, 1, 2, d / 32);
    RawX staged = memory.x;
    pdl_launch();
    pdl_wait();
    const int e = ids[blockIdx.y] - first;
    h += (long long)blockIdx.y * f;
    if (e < 0 || e >= held) {
        for (int o = blockIdx.x * RAW_THREADS + threadIdx.x; o < f; o += gridDim.x * RAW_THREADS)
            h[o] = 0.f;
        return;
    }
    const unsigned char* end = (gate < up ? up : gate) + w_bytes;
    const RawShape shape = {f, d / 32, share, slot, row_bytes, end};
    raw_rows<WTYPE, 1, 2>(
        shape, staged, 2, memory.sums, memory.ring,
        [&](int i) { return (i ? up : gate) + e * expert_bytes; },
        [&] { staged.put(0, x + blockIdx.y / n_used * ldx, d, 0); },
        [&](int o, int, const float (&total)[2]) { h[o] = few_swiglu(total[0], total[1]); });
}

extern "C" __global__ void __launch_bounds__(RAW_THREADS, N_CTAS)
raw_experts_down(float* y, const unsigned char* down, const float* h, const int* ids,
                 const float* weights, int n_used, int f, int d, int first, int held, int skip,
                 int share, int slot, long long row_bytes, long long expert_bytes,
                 long long w_bytes, long long ldy) {
    extern __shared__ uint4 shared[];
    __shared__ int experts[32], slots[32], n_here;
    const int n_groups = (skip + f) / 32;
    const RawMemory memory((unsigned char*)shared, n_used, 1, n_groups);
    RawX staged = memory.x;
    pdl_launch();
    pdl_wait();
    ids += blockIdx.y * n_used, weights += blockIdx.y * n_used;
    h += (long long)blockIdx.y * n_used * f, y += blockIdx.y * ldy;
    if (threadIdx.x == 0) {
        int n = 0;
        for (int s = 0; s < n_used; s++) {
            const int e = ids[s] - first;
            if (e >= 0 && e < held) experts[n] = e, slots[n++] = s;
        }
        n_here = n;
    }
    __syncthreads();
    const int n = n_here;
    if (n == 0) {
        if (!ADD)
            for (int o = blockIdx.x * RAW_THREADS + threadIdx.x; o < d; o += gridDim.x * RAW_THREADS)
                y[o] = 0.f;
        return;
    }
    const RawShape shape = {d, n_groups, share, slot, row_bytes, down + w_bytes};
    raw_rows<WTYPE, 1, 1>(
        shape, staged, n, memory.sums, memory.ring,
        [&](int i) { return down + experts[i] * expert_bytes; },
        [&] {
            for (int i = 0; i < n; i++)
                staged.put(i, h + (long long)slots[i] * f, f, skip, weights[slots[i]]);
        },
        [&](int o, int, const float (&total)[1]) { y[o] = ADD ? y[o] + total[0] : total[0]; });
}
#endif
