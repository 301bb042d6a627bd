// Op        y[b][t][o] (+)= sum_i w[b][o][i] x[b][t][i]: dense (one b) and per-head (b = head) products
// Shapes    w [B, out, in] in GGUF bytes, x rows of `in` at stride ldx, y rows at stride ldy;
//           strides wb (bytes), xb, yb between batches; `skip` columns of the first block belong to
//           another rank
// Dtypes    w any GGUF type (WTYPE); x, y and sums float32
// Grid      matmul_vec (ceil(out / (8 ROWS)), n, B): a warp takes ROWS rows, x in shared memory
//           matmul (ceil(out / 8), ceil(n / COLS), B): a warp takes a row and COLS tokens
//           256 threads; shared bytes of matmul_vec: 4 GROUP_STRIDE ceil(in / 32), of matmul:
//           COLS times that of 1024 columns, which it stages at a time
// Assumes   skip a multiple of 32
// Numerics  each lane sums its columns in order, then a fixed tree; relative error about 1e-6
// Bound by  bytes of w for few tokens, float32 FMA for many
// Sources   own
// Tested by tests/gpu/test_cuda_models.py
#include "pdl.cuh"
#include "quants.cuh"
#include "reduce.cuh"
#include "staged.cuh"

#ifdef ROWS
extern "C" __global__ void __launch_bounds__(256)
matmul_vec_f32(float* y, const unsigned char* w, const float* x, int n, int out, int in, int skip,
               long long row_bytes, long long ldx, long long ldy, long long wb, long long xb,
               long long yb, int add) {
    extern __shared__ float staged[];
    const int lane = threadIdx.x & 31, o = (blockIdx.x * 8 + (threadIdx.x >> 5)) * ROWS;
    const int t = blockIdx.y, b = blockIdx.z;
    pdl_launch();
    pdl_wait();
    stage(staged, x + b * xb + t * ldx, in);
    __syncthreads();
    if (o >= out) return;
    w += b * wb;
    float sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = 0.f;
    for (int g = lane; lane_has<WTYPE>(g, in); g += 32) {
        float in_g[32];
        lane_inputs<WTYPE>(staged, g, in, in_g);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float v[32];
            lane_values<WTYPE>(w + min(o + r, out - 1) * row_bytes, g, in, skip, v);
#pragma unroll
            for (int i = 0; i < 32; i++) sum[r] += v[i] * in_g[i];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float total = warp_sum(sum[r]);
        float* to = y + b * yb + t * ldy + o + r;
        if (lane == 0 && o + r < out) *to = add ? *to + total : total;
    }
}
#endif

#ifdef COLS
extern "C" __global__ void __launch_bounds__(256)
matmul_f32(float* y, const unsigned char* w, const float* x, int n, int out, int in, int skip,
           long long row_bytes, long long ldx, long long ldy, long long wb, long long xb,
           long long yb, int add) {
    extern __shared__ float staged[];  // COLS tokens, 32 groups of each
    const int lane = threadIdx.x & 31, o = blockIdx.x * 8 + (threadIdx.x >> 5);
    const int t0 = blockIdx.y * COLS, b = blockIdx.z;
    pdl_launch();
    pdl_wait();
    const unsigned char* row = w + b * wb + min(o, out - 1) * row_bytes;
    x += b * xb + t0 * ldx;
    float sum[COLS];
#pragma unroll
    for (int t = 0; t < COLS; t++) sum[t] = 0.f;
    for (int at = 0; at < in; at += 1024) {
        __syncthreads();
        for (int t = 0; t < COLS; t++)
            if (t0 + t < n) stage(staged + t * 32 * GROUP_STRIDE, x + t * ldx + at, min(1024, in - at));
        __syncthreads();
        if (!lane_has<WTYPE>(at / 32 + lane, in)) continue;
        float v[32];
        lane_values<WTYPE>(row, at / 32 + lane, in, skip, v);
#pragma unroll
        for (int t = 0; t < COLS; t++) {
            if (t0 + t >= n) break;
            float in_g[32];
            lane_inputs<WTYPE>(staged + t * 32 * GROUP_STRIDE, lane, in - at, in_g);
#pragma unroll
            for (int i = 0; i < 32; i++) sum[t] += v[i] * in_g[i];
        }
    }
#pragma unroll
    for (int t = 0; t < COLS; t++) {
        const float total = warp_sum(sum[t]);
        float* to = y + b * yb + (t0 + t) * ldy + o;
        if (lane == 0 && o < out && t0 + t < n) *to = add ? *to + total : total;
    }
}
#endif
