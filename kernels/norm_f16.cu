// Op        rms_norm_f16: x += add, if there is add; then y = x / sqrt(mean(x^2) + eps) * w, as float32
//           and as float16 of y / 16
//           rows_f16: y16 = x / 16; rows_from_f16: y = 16 x16
// Shapes    y16 [n, d] at row stride ldy, y [n, d] dense or null, x [n, d] at row stride ldx, add [n, d]
//           dense or null, w [d]
// Dtypes    float32; y16 float16, saturating
// Grid      (n), 256 threads
// Assumes   ldy a multiple of 8
// Numerics  block_sum's fixed order; relative error about 1e-6, then one rounding to float16
// Bound by  bytes: 4 d per float32 array and 2 d a token
// Sources   own
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "pairs.cuh"
#include "pdl.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr int PIECES = 8;  // four columns each, of a thread

// ---------------------------------------------------------------- device helpers ------------
// float16 bits of two sixteenths, the largest finite number instead of infinity.
__device__ __forceinline__ unsigned sixteenths(float lo, float hi) {
    lo = fminf(fmaxf(lo * 0.0625f, -65504.f), 65504.f), hi = fminf(fmaxf(hi * 0.0625f, -65504.f), 65504.f);
    return half2_of(lo, hi);
}

// f(i, value i of x) for this thread's columns, then y16 = what f gave.
template <class F>
__device__ __forceinline__ void store_rows(unsigned short* y16, int d, F f) {
    for (int i = 2 * threadIdx.x; i < (d + 7) / 8 * 8; i += 512) {  // rows are padded with zeros
        const float lo = i < d ? f(i) : 0.f, hi = i + 1 < d ? f(i + 1) : 0.f;
        *(unsigned*)(y16 + i) = sixteenths(lo, hi);
    }
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(256)
rms_norm_f16(unsigned short* y16, float* y, float* x, const float* add, const float* w, int d,
             long long ldy, long long ldx, float eps) {
    pdl_launch();
    pdl_wait();
    x += blockIdx.x * ldx, y16 += blockIdx.x * ldy;
    if (add) add += (long long)blockIdx.x * d;
    if (y) y += (long long)blockIdx.x * d;
    float sum = 0.f;
    if (d % 4 == 0 && ldx % 4 == 0 && d <= 1024 * PIECES) {  // the row stays in registers
        float4 v[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int i = 1024 * p + 4 * threadIdx.x;
            if (i >= d) break;
            v[p] = *(const float4*)(x + i);
            if (add) {
                const float4 more = *(const float4*)(add + i);
                v[p].x += more.x, v[p].y += more.y, v[p].z += more.z, v[p].w += more.w;
                *(float4*)(x + i) = v[p];
            }
            sum += v[p].x * v[p].x + v[p].y * v[p].y + v[p].z * v[p].z + v[p].w * v[p].w;
        }
        const float scale = rsqrtf(block_sum(sum) / d + eps);
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int i = 1024 * p + 4 * threadIdx.x;
            if (i >= d) break;
            const float4 by = *(const float4*)(w + i);
            const float4 out = {v[p].x * scale * by.x, v[p].y * scale * by.y, v[p].z * scale * by.z,
                                v[p].w * scale * by.w};
            if (y) *(float4*)(y + i) = out;
            *(uint2*)(y16 + i) = make_uint2(sixteenths(out.x, out.y), sixteenths(out.z, out.w));
        }
        if (threadIdx.x < d % 8) y16[d + threadIdx.x] = 0;  // d % 8 is 0 or 4
        return;
    }
    for (int i = threadIdx.x; i < d; i += 256) {
        float v = x[i];
        if (add) x[i] = v += add[i];
        sum += v * v;
    }
    const float scale = rsqrtf(block_sum(sum) / d + eps);  // its barriers publish x too
    store_rows(y16, d, [&](int i) {
        const float v = x[i] * scale * w[i];
        if (y) y[i] = v;
        return v;
    });
}

extern "C" __global__ void __launch_bounds__(256)
rows_f16(unsigned short* y16, const float* x, int d, long long ldy, long long ldx) {
    pdl_launch();
    pdl_wait();
    x += blockIdx.x * ldx;
    store_rows(y16 + blockIdx.x * ldy, d, [&](int i) { return x[i]; });
}

extern "C" __global__ void __launch_bounds__(256)
rows_from_f16(float* y, const unsigned short* x16, int d, long long ldx) {
    pdl_launch();
    pdl_wait();
    x16 += blockIdx.x * ldx, y += (long long)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += 256) y[i] = 16.f * half_bits_to_float(x16[i]);
}
