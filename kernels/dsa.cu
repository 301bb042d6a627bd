// Op        lightning indexer of sparse attention (DSA); dsa_select.cu chooses by its scores:
//           dsa_prepare: key = layer_norm(key) with its first 2 half columns rotated, stored at row
//           pos[t]; queries rotated alike, split and scaled for the score kernels
//           dsa_scores_*: score[t][j] = sum_I w[t][I] max(0, q[t][I] . key_j) / root, j <= pos[t]
// Shapes    keys [n_ctx, i] (q8_0: int8, and scales [n_ctx, i / 32]); q parts as `part_at` says
//           (PARTS 0: [n, I, i]); head_weights [n, I]; scores [n, ld];
//           key [n, i], q [n, I * i], w [n, I] with row strides; norm, bias [i]; cos, sin [n, half]
// Dtypes    KEYS = 0 float32, 1 float16, 2 bfloat16, 3 q8_0; sums float32
// Grid      dsa_prepare (n, 1 + I / 8), 256 threads: y 0 the key, then a warp a head; dsa_scores_few
//           and _many (persistent), 256; dsa_scores_plain (persistent, n), 256
// Shared    dsa_scores_few: n tokens' parts and weights; _many: 3 tokens'; _plain: 64 keys and a
//           token's queries in float32
// Assumes   tensor kernels: HEADS = I a multiple of 8, WIDTH = i a multiple of 32, at most 128, KEYS
//           1 or 2; ld a multiple of 4; i <= 1024; a token with pos -1 stores no key
// Variants  KEYS=1; KEYS=2; KEYS=1 LAYOUT=1; KEYS=1 LAYOUT=2; KEYS=0 PARTS=0; KEYS=3 PARTS=0;
//           KEYS=1 HEADS=64
// Numerics  queries are scaled by a power of two and split into 2 float16 (22 bits) or 3 bfloat16
//           (24 bits), so scores are float32 sums of nearly exact products; a row beyond pos[t] has
//           no score. Rotation and layer norm as NumPy, without fused multiply-add
// Bound by  bytes 2 n_kv i for few tokens; 2 PARTS n I n_kv i flops for many
// Sources   formula: arXiv 2512.02556; the rest own
// Tested by tests/gpu/test_cuda_sparse.py, tests/kernels/test_dsa.py
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mma.cuh"
#include "pdl.cuh"
#include "reduce.cuh"

#ifndef KEYS
#define KEYS 1
#endif
#ifndef HEADS
#define HEADS 32
#endif
#ifndef WIDTH
#define WIDTH 128
#endif
#ifndef PARTS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // no tensor core products of this kind
#define PARTS 0
#else
#define PARTS (KEYS == 1 ? 2 : KEYS == 2 ? 3 : 0)
#endif
#endif
#ifndef LAYOUT
#define LAYOUT 0  // of the queries' parts: 0 for mma, 1 and 2 for dsa_scores_wgmma.cu
#endif
#define TOKENS_AT_ONCE 16  // of dsa_scores_many, for one load of its keys
#ifndef FEW_TILES
#define FEW_TILES 2  // 16 keys each that a warp of dsa_scores_few takes at once
#endif
#define PLAIN_ROWS 64

#if KEYS == 0
typedef float Key;
#elif KEYS == 1
typedef __half Key;
#elif KEYS == 2
typedef __nv_bfloat16 Key;
#else
typedef signed char Key;
#endif

__device__ __forceinline__ void put(float* at, float v) { *at = v; }
__device__ __forceinline__ void put(__half* at, float v) { *at = __float2half_rn(v); }
__device__ __forceinline__ void put(__nv_bfloat16* at, float v) { *at = __float2bfloat16_rn(v); }
__device__ __forceinline__ float get(float v) { return v; }
__device__ __forceinline__ float get(__half v) { return __half2float(v); }
__device__ __forceinline__ float get(__nv_bfloat16 v) { return __bfloat162float(v); }

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
        float most = fabsf(v);
        for (int offset = 16; offset; offset >>= 1)
            most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
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
    for (int offset = 16; offset; offset >>= 1)
        most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
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

// ---------------------------------------------------------------- scores --------------------
#if PARTS
#define CHUNKS (WIDTH / 32)
#define TOKEN_WORDS (PARTS * HEADS * WIDTH / 8)  // uint4 of a token's parts
#define STAGED_WORDS (TOKEN_WORDS + HEADS / 4)   // and of its weights
extern __shared__ uint4 staged[];

__device__ __forceinline__ void product(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if KEYS == 2
    mma_bf16(d, a, b);
#else
    mma_f16(d, a, b);
#endif
}

// 16 TILES keys of one warp in registers, as A fragments.
template <int TILES>
struct WarpKeys {
    uint4 a[TILES][CHUNKS][2];

    // Rows from row0 on; those past `last` are read as it, and their scores not stored.
    __device__ __forceinline__ void load(const void* keys, int row0, int last) {
        const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int side = 0; side < 2; side++) {
                const int row = min(row0 + 16 * m + 8 * side + g, last);
                const uint4* at = (const uint4*)((const Key*)keys + (long long)row * WIDTH) + t;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) a[m][c][side] = at[4 * c];
            }
    }

    // The token staged at `q` against all rows; stores those up to pos.
    __device__ __forceinline__ void score(float* scores, const uint4* q, int row0, int pos) const {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const float2* weights = (const float2*)(q + TOKEN_WORDS);
        constexpr int BOTH = HEADS % 16 ? 1 : 2;  // tiles of 8 heads side by side: more sums under way
        float sum[TILES][2] = {};
#pragma unroll 1
        for (int tile = 0; tile < HEADS / 8; tile += BOTH) {
            float d[BOTH][TILES][4] = {};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    unsigned b[BOTH][2][2];
#pragma unroll
                    for (int o = 0; o < BOTH; o++) {
                        const uint4 v = q[((part * (HEADS / 8) + tile + o) * CHUNKS + c) * 32 + lane];
                        b[o][0][0] = v.x, b[o][0][1] = v.y, b[o][1][0] = v.z, b[o][1][1] = v.w;
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++)
#pragma unroll
                        for (int m = 0; m < TILES; m++) {
                            const uint4 &u = a[m][c][0], &v = a[m][c][1];
                            const unsigned four[4] = {half ? u.z : u.x, half ? v.z : v.x,
                                                      half ? u.w : u.y, half ? v.w : v.y};
#pragma unroll
                            for (int o = 0; o < BOTH; o++) product(d[o][m], four, b[o][half]);
                        }
                }
#pragma unroll
            for (int o = 0; o < BOTH; o++) {
                const float2 w = weights[(tile + o) * 4 + t];  // heads 8 (tile + o) + 2t, + 1
#pragma unroll
                for (int m = 0; m < TILES; m++)
#pragma unroll
                    for (int side = 0; side < 2; side++)
                        sum[m][side] += w.x * fmaxf(d[o][m][2 * side], 0.f)
                            + w.y * fmaxf(d[o][m][2 * side + 1], 0.f);
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int side = 0; side < 2; side++) {
                float x = sum[m][side];
                x += __shfl_xor_sync(~0u, x, 1);
                x += __shfl_xor_sync(~0u, x, 2);
                const int row = row0 + 16 * m + 8 * side + g;
                if ((2 * m + side) % 4 == t && row <= pos) scores[row] = x;
            }
    }
};

// Largest position of n tokens; whole warps.
__device__ __forceinline__ int largest(const int* pos, int n) {
    int last = -1;
    for (int i = threadIdx.x & 31; i < n; i += 32) last = max(last, pos[i]);
    for (int offset = 16; offset; offset >>= 1) last = max(last, __shfl_xor_sync(~0u, last, offset));
    return last;
}

// Few tokens: all of them staged, each warp takes 16 FEW_TILES keys at a time.
extern "C" __global__ void __launch_bounds__(256, FEW_TILES == 2 ? 2 : 1)
dsa_scores_few(float* scores, const void* parts, const float* head_weights, const void* keys,
               const int* pos, int n, long long ld) {
    pdl_launch();
    pdl_wait();
    const int last = largest(pos, n), rows = 16 * FEW_TILES;
    const int tiles = (last + rows) / rows;
    int tile = blockIdx.x + gridDim.x * (threadIdx.x >> 5);
    WarpKeys<FEW_TILES> held;
    if (tile < tiles) held.load(keys, tile * rows, last);  // under way while queries are staged
    for (int t = 0; t < n; t++) {
        const uint4* in = (const uint4*)parts + (long long)t * TOKEN_WORDS;
        for (int i = threadIdx.x; i < TOKEN_WORDS; i += 256) staged[t * STAGED_WORDS + i] = in[i];
        float* weights = (float*)(staged + t * STAGED_WORDS + TOKEN_WORDS);
        for (int i = threadIdx.x; i < HEADS; i += 256) weights[i] = head_weights[t * HEADS + i];
    }
    __syncthreads();
    while (tile < tiles) {
        for (int t = 0; t < n; t++)
            held.score(scores + t * ld, staged + t * STAGED_WORDS, tile * rows, pos[t]);
        tile += gridDim.x * 8;
        if (tile < tiles) held.load(keys, tile * rows, last);
    }
}

// Many tokens: 64 keys a warp stay in registers while TOKENS_AT_ONCE tokens pass through shared
// memory, three of them at a time. Neighbouring CTAs take the same keys.
extern "C" __global__ void __launch_bounds__(256, 1)
dsa_scores_many(float* scores, const void* parts, const float* head_weights, const void* keys,
                const int* pos, int n, long long ld) {
    pdl_launch();
    pdl_wait();
    const int last = largest(pos, n), tiles = (last + 512) / 512;
    const int groups = (n + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
    const auto stage = [&](int t) {
        uint4* to = staged + t % 3 * STAGED_WORDS;
        const uint4* in = (const uint4*)parts + (long long)t * TOKEN_WORDS;
        const uint4* weights = (const uint4*)(head_weights + (long long)t * HEADS);
        for (int i = threadIdx.x; i < STAGED_WORDS; i += 256)
            cp_async16(to + i, i < TOKEN_WORDS ? in + i : weights + i - TOKEN_WORDS);
    };
    for (int item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
        const int first = item % groups * TOKENS_AT_ONCE, stop = min(n, first + TOKENS_AT_ONCE);
        const int row0 = item / groups * 512 + (threadIdx.x >> 5) * 64;
        if (item / groups * 512 > largest(pos + first, stop - first)) continue;
        stage(first);
        cp_async_commit();
        if (first + 1 < stop) stage(first + 1);
        cp_async_commit();
        WarpKeys<4> held;
        held.load(keys, row0, last);
        for (int t = first; t < stop; t++) {
            cp_async_wait<1>();
            __syncthreads();  // token t is there, and nobody reads token t - 1 any more
            if (t + 2 < stop) stage(t + 2);
            cp_async_commit();
            if (row0 <= pos[t])
                held.score(scores + t * ld, staged + t % 3 * STAGED_WORDS, row0, pos[t]);
        }
        __syncthreads();
    }
}
#endif

// Float32 arithmetic on keys of any type and size: a thread takes a row and every fourth group of
// four heads.
extern "C" __global__ void __launch_bounds__(256)
dsa_scores_plain(float* scores, const float* q, const float* head_weights, const void* keys,
                 const void* scales, const int* pos, int width, int heads, long long ld) {
    extern __shared__ float plain[];
    __shared__ float partial[4][PLAIN_ROWS];
    const int columns = (width + 3) / 4 * 4, rows4 = (heads + 3) / 4, t = blockIdx.y;
    float *queries = plain, *weights = queries + rows4 * 4 * columns, *held = weights + rows4 * 4;
    pdl_launch();
    pdl_wait();
    for (int i = threadIdx.x; i < rows4 * 4 * columns; i += 256) {
        const int head = i / columns, c = i % columns;
        queries[i] = head < heads && c < width ? q[((long long)t * heads + head) * width + c] : 0.f;
    }
    for (int i = threadIdx.x; i < rows4 * 4; i += 256)
        weights[i] = i < heads ? head_weights[t * heads + i] : 0.f;
    const int last = pos[t], row = threadIdx.x % PLAIN_ROWS, quarter = threadIdx.x / PLAIN_ROWS;
    for (int row0 = blockIdx.x * PLAIN_ROWS; row0 <= last; row0 += gridDim.x * PLAIN_ROWS) {
        __syncthreads();
        for (int i = threadIdx.x; i < PLAIN_ROWS * columns; i += 256) {
            const long long at = min(row0 + i / columns, last);
            const int c = i % columns;
            float v = 0.f;
#if KEYS == 3
            const int blocks = (width + 31) / 32;
            if (c < width)
                v = ((const Key*)keys)[at * blocks * 32 + c]
                    * __half2float(((const __half*)scales)[at * blocks + c / 32]);
#else
            if (c < width) v = get(((const Key*)keys)[at * width + c]);
#endif
            held[i / columns * (columns + 1) + c] = v;
        }
        __syncthreads();
        float sum = 0.f;
        for (int four = quarter; four < rows4; four += 4) {
            float d[4] = {};
            const float* key = held + row * (columns + 1);
            for (int c = 0; c < columns; c += 4)
#pragma unroll
                for (int h = 0; h < 4; h++) {
                    const float4 x = *(const float4*)(queries + (four * 4 + h) * columns + c);
                    d[h] += x.x * key[c] + x.y * key[c + 1] + x.z * key[c + 2] + x.w * key[c + 3];
                }
#pragma unroll
            for (int h = 0; h < 4; h++) sum += weights[four * 4 + h] * fmaxf(d[h], 0.f);
        }
        partial[quarter][row] = sum;
        __syncthreads();
        if (quarter == 0 && row0 + row <= last)
            scores[t * ld + row0 + row] =
                (partial[0][row] + partial[1][row]) + (partial[2][row] + partial[3][row]);
    }
}
