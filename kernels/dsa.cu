// Op        dsa_prepare, of the lightning indexer (DSA): key = layer_norm(key) with its first 2 half
//           columns rotated, stored at row pos[t]; queries rotated alike, scaled and split for the
//           score kernels, their heads' weights divided by root and by that scale
// Shapes    keys [n_ctx, i] (q8_0: int8, and scales [n_ctx, i / 32]); parts as `part_at` says (PARTS
//           0: float32 [n, I, i]); head_weights [n, I]; key [n, i], q [n, I * i], w [n, I] with row
//           strides; norm, bias [i]; pos [n], -1 = padded; cos, sin [n, half]
// Dtypes    KEYS and PARTS: include/dsa.cuh; all else float32
// Grid      (n, 1 + I / 8), 256 threads: y 0 the key, then a warp a head; (n, 1) keys alone
// Assumes   PARTS > 0: I a multiple of 8, i a multiple of 32, at most 128; i <= 1024
// Variants  KEYS=1; KEYS=2; KEYS=1 LAYOUT=1; KEYS=1 LAYOUT=2; KEYS=0 PARTS=0; KEYS=3 PARTS=0
// Spills    none
// Numerics  rotation and layer norm as NumPy, without fused multiply-add; keys rounded once; a query
//           is scaled by a power of two and keeps 22 bits in 2 float16, 24 in 3 bfloat16
// Bound by  launch latency
// Sources   formula: arXiv 2512.02556; the rest own
// Tested by tests/gpu/test_cuda_sparse.py, tests/kernels/test_dsa.py
#include "dsa.cuh"
#include "pdl.cuh"
#include "reduce.cuh"

#ifndef LAYOUT
#define LAYOUT 0  // of parts: 0 for mma, 1 and 2 for dsa_scores_wgmma.cu
#endif

__device__ __forceinline__ void put(float* at, float v) { *at = v; }
__device__ __forceinline__ void put(__half* at, float v) { *at = __float2half_rn(v); }
__device__ __forceinline__ void put(__nv_bfloat16* at, float v) { *at = __float2bfloat16_rn(v); }

// A pair rotated; products are rounded apart, as NumPy's.
__device__ __forceinline__ float2 rotated(float even, float odd, float c, float s) {
    return {__fadd_rn(__fmul_rn(even, c), -__fmul_rn(odd, s)),
            __fadd_rn(__fmul_rn(even, s), __fmul_rn(odd, c))};
}

// ---------------------------------------------------------------- dsa_prepare ---------------
// Stores a row of q8_0 as gguf does: scale = largest / 127 as float16, halves away from zero.
__device__ __forceinline__ void store_q8(signed char* row, __half* scales, const float* y, int width) {
    const int lane = threadIdx.x & 31;
    for (int block = threadIdx.x >> 5; block * 32 < width; block += blockDim.x >> 5) {
        const int i = block * 32 + lane;
        const float v = i < width ? y[i] : 0.f;
        const float most = warp_max(fabsf(v));
        const float scale = __fdiv_rn(most, 127.f), inverse = scale == 0.f ? 0.f : __fdiv_rn(1.f, scale);
        row[i] = (signed char)(int)roundf(__fmul_rn(v, inverse));
        if (lane == 0) scales[block] = __float2half_rn(scale);
    }
}

// layer_norm, rotation, store: one CTA a token.
__device__ __forceinline__ void prepare_key(void* keys, __half* scales, const float* key,
                                            const float* norm, const float* bias, int row,
                                            const float* cosine, const float* sine, int width,
                                            int half, float eps) {
    __shared__ float y[1024];
    float sum = 0.f, squares = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += key[i];
    const float mean = block_sum(sum) / width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float centred = key[i] - mean;
        squares += centred * centred;
    }
    const float deviation = sqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        y[i] = __fadd_rn(__fmul_rn(__fdiv_rn(key[i] - mean, deviation), norm[i]), bias[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float2 v = rotated(y[2 * i], y[2 * i + 1], cosine[i], sine[i]);
        y[2 * i] = v.x, y[2 * i + 1] = v.y;
    }
    __syncthreads();
    if (row < 0) return;
#if KEYS == 3
    const int blocks = (width + 31) / 32;
    store_q8((Key*)keys + (long long)row * blocks * 32, scales + (long long)row * blocks, y, width);
#else
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        put((Key*)keys + (long long)row * width + i, y[i]);
#endif
}

#if PARTS
// Where a column's 16-bit word of a query lies. A lane of the score kernels takes 16 bytes, 8
// neighbouring columns, of a key as two steps in depth; so queries' columns are permuted alike.
#if LAYOUT == 2
// [part][head][column], as dsa_scores_wgmma_one reads them.
__device__ __forceinline__ int part_at(int part, int head, int column, int heads, int width) {
    return (part * heads + head) * width + column;
}
#elif LAYOUT == 1
// As dsa_scores_wgmma's slabs: [part][64 columns][head], 16-byte pieces swizzled.
__device__ __forceinline__ int part_at(int part, int head, int column, int heads, int width) {
    const int t = column % 32 / 8, r = column % 8;
    const int depth = column / 32 * 32 + r / 4 * 16 + r % 4 / 2 * 8 + 2 * t + r % 2;
    const int row = (part * (width / 64) + depth / 64) * heads + head;
    return row * 64 + ((depth % 64 / 8) ^ (head & 7)) * 8 + depth % 8;
}
#else
// As the B fragments of mma: [part][8 heads][32 columns][lane].
__device__ __forceinline__ int part_at(int part, int head, int column, int heads, int width) {
    const int block = (part * (heads / 8) + head / 8) * (width / 32) + column / 32;
    return (block * 32 + head % 8 * 4 + column % 32 / 8) * 8 + column % 8;
}
#endif

// One warp a head: rotated, scaled so that the largest is in [256, 512), split in PARTS.
__device__ __forceinline__ void prepare_head(unsigned short* parts, float* head_weight,
                                             const float* q, float w, int head, int heads,
                                             const float* cosine, const float* sine, int width,
                                             int half, float root) {
    const int lane = threadIdx.x & 31;
    float2 v[2];
    float most = 0.f;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const int i = lane + 32 * m;
        if (2 * i >= width) continue;
        v[m] = {q[2 * i], q[2 * i + 1]};
        if (i < half) v[m] = rotated(v[m].x, v[m].y, cosine[i], sine[i]);
        most = fmaxf(most, fmaxf(fabsf(v[m].x), fabsf(v[m].y)));
    }
    most = warp_max(most);
    const int exponent = min(max((int)(__float_as_uint(most) >> 23), 9), 254);
    const float up = __uint_as_float((unsigned)(262 - exponent) << 23);   // 2^8 / 2^(exponent - 127)
    const float down = __uint_as_float((unsigned)(exponent - 8) << 23);
    if (lane == 0) *head_weight = __fdiv_rn(w, root) * down;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const int i = lane + 32 * m;
        if (2 * i >= width) continue;
        float x = v[m].x * up, y = v[m].y * up;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#if KEYS == 2
            const __nv_bfloat16 a = __float2bfloat16_rn(x), b = __float2bfloat16_rn(y);
            const unsigned low = __bfloat16_as_ushort(a), high = __bfloat16_as_ushort(b);
#else
            const __half a = __float2half_rn(x), b = __float2half_rn(y);
            const unsigned low = __half_as_ushort(a), high = __half_as_ushort(b);
#endif
            *(unsigned*)(parts + part_at(part, head, 2 * i, heads, width)) = high << 16 | low;
            x -= get(a), y -= get(b);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(256)
dsa_prepare(void* keys, void* scales, void* parts, float* head_weights, const float* key,
            const float* norm, const float* bias, const float* q, const float* w, const int* pos,
            const float* cosine, const float* sine, int width, int half, int heads,
            long long ld_key, long long ld_q, long long ld_w, float eps, float root) {
    const int t = blockIdx.x;
    pdl_launch();
    pdl_wait();
    cosine += (long long)t * half, sine += (long long)t * half;
    if (blockIdx.y == 0) {
        prepare_key(keys, (__half*)scales, key + t * ld_key, norm, bias, pos[t], cosine, sine, width,
                    half, eps);
        return;
    }
    const int head = (blockIdx.y - 1) * 8 + (threadIdx.x >> 5);
    if (head >= heads) return;
    const float* in = q + t * ld_q + (long long)head * width;
    const float weight = w[t * ld_w + head];
#if PARTS
    prepare_head((unsigned short*)parts + (long long)t * PARTS * heads * width,
                 head_weights + t * heads + head, in, weight, head, heads, cosine, sine, width, half,
                 root);
#else
    const int lane = threadIdx.x & 31;
    float* out = (float*)parts + ((long long)t * heads + head) * width;
    for (int i = lane; i < half; i += 32) {
        const float2 v = rotated(in[2 * i], in[2 * i + 1], cosine[i], sine[i]);
        out[2 * i] = v.x, out[2 * i + 1] = v.y;
    }
    for (int i = 2 * half + lane; i < width; i += 32) out[i] = in[i];
    if (lane == 0) head_weights[t * heads + head] = __fdiv_rn(weight, root);
#endif
}
