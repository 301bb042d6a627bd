// Op        scores of the lightning indexer (DSA), which dsa_select.cu chooses by:
//           score[t][j] = sum_I w[t][I] max(0, q[t][I] . key_j) / root, j <= pos[t]
//           of few and of many tokens on tensor cores, plain on any device (Hopper and float16 keys:
//           dsa_scores_wgmma.cu)
// Shapes    scores [n, ld]; parts, head_weights by dsa_prepare with LAYOUT=0; keys [n_ctx, i] (q8_0:
//           int8, and scales [n_ctx, i / 32]); pos [n], -1 = padded, has no scores
// Dtypes    KEYS and PARTS: include/dsa.cuh; scores and sums float32
// Grid      persistent, 256 threads; plain (x, n), a token a y
// Shared    few: n tokens' parts and weights; many: 3 tokens'; plain: 64 keys and a token's queries
//           in float32
// Assumes   few, many: KEYS 1 or 2, HEADS = I a multiple of 8, WIDTH = i a multiple of 32, <= 128
// Variants  KEYS=1; KEYS=2; KEYS=1 HEADS=64; KEYS=0 PARTS=0; KEYS=3 PARTS=0
// Spills    none
// Numerics  float32 sums of nearly exact products; rows beyond pos[t] get no score
// Bound by  2 PARTS n I n_kv i flops, at half of the rate of warpgroup products on Hopper
// Sources   formula: arXiv 2512.02556; the rest own
// Tested by tests/gpu/test_cuda_sparse.py, tests/kernels/test_dsa.py
#include "dsa.cuh"
#include "mma.cuh"
#include "pdl.cuh"

#define TOKENS_AT_ONCE 16  // of dsa_scores_many, for one load of its keys
#define PLAIN_ROWS 64

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

// Few tokens: all of them staged, each warp takes 32 keys at a time.
extern "C" __global__ void __launch_bounds__(256, 2)
dsa_scores_few(float* scores, const void* parts, const float* head_weights, const void* keys,
               const int* pos, int n, long long ld) {
    pdl_launch();
    pdl_wait();
    const int last = largest(pos, n), rows = 32;
    const int tiles = (last + rows) / rows;
    int tile = blockIdx.x + gridDim.x * (threadIdx.x >> 5);
    WarpKeys<2> held;
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
