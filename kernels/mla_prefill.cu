// Op        expanded attention of many tokens over a chunk of cache rows
//           mla_prefill: score_j = scale * q . key_j, weights = softmax, o = sum_j weight_j value_j
//           mla_prefill_merge: o from the parts that `splits` CTAs left
// Shapes    o [n, h * v]; queries, keys, values, rope: slabs.cuh; pos [n], -1 = padded;
//           state [splits, items, VS * 32 + 4, 256]: o (before the division), maximum and sum of
//           two rows a thread; item = 128 tokens of a head
// Dtypes    operands and probabilities float16, sums, maxima and state float32; o16 holds o / 16
//           in float16, o32 float32; either may be absent
// Variants  K=128 P=64 V=128 TILE=128; K=192 P=64 V=256 TILE=64; K=64 P=64 V=128 TILE=128;
//           K=16 P=8 V=16 TILE=128
// Needs     9.0a
// Grid      prefill (items, splits), 384 threads (a producer and two consumer warpgroups of 64
//           tokens), shared: queries, STAGES tiles of keys and values, 128 bytes; merge (items),
//           256 threads
// Assumes   K, P, V, TILE at compile time, k, p, v multiples of 8, v <= 256; scale > 0, times
//           log2(e); rows from a tile's start to its end hold numbers, also past the last position
// Numerics  online softmax in powers of two; a row's weights are rounded to float16 relative to
//           its maximum so far, their sum is not; a padded token's o is 0; +-65504 at most in o16
// Bound by  2 h (k + p + v) flops per token and cache row it sees
// Sources   FlashAttention-3 (arXiv 2407.08608): one warpgroup's softmax runs under the other's
//           products, and under its own product with the values before; own code
// Tested by tests/kernels/test_prefill.py, tests/gpu/test_cuda_prefill.py
#include <cuda_fp16.h>

#include "bulk_copy.cuh"
#include "pdl.cuh"
#include "slabs.cuh"
#include "warpgroup.cuh"

#define STAGES 2
#define ROW_SLAB (TILE * SLAB_ROW)
#define KEY_BYTES (SLABS * ROW_SLAB)
#define VALUE_BYTES (VS * ROW_SLAB)
#define WIDTH (VS * 64)
#define KEPT (WIDTH / 2 + 4)  // floats that a thread keeps between chunks
#define NONE __int_as_float(0xff800000)  // -inf

// ---------------------------------------------------------------- helpers -------------------
// The rows of a thread: o before the division, running maximum of scores and sum of weights.
struct Rows {
    float o[WIDTH / 2], top[2], sum[2];
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The first or next tile's scores become weights; keep[] is what older weights shrink by.
__device__ __forceinline__ void soften(float (&s)[TILE / 2], Rows& rows, float (&keep)[2],
                                       float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = rows.top[r];
#pragma unroll
        for (int i = 2 * r; i < TILE / 2; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
        top = quad_max(top);
        const float base = top == NONE ? 0.f : top * scale;
        keep[r] = exp2f(rows.top[r] * scale - base);
        float sum = 0.f;
#pragma unroll
        for (int i = 2 * r; i < TILE / 2; i += 4) {
            s[i] = exp2f(s[i] * scale - base), s[i + 1] = exp2f(s[i + 1] * scale - base);
            sum += s[i] + s[i + 1];
        }
        rows.top[r] = top, rows.sum[r] = rows.sum[r] * keep[r] + sum;
    }
}

__device__ __forceinline__ void shrink(float (&o)[WIDTH / 2], const float (&keep)[2]) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) o[i] *= keep[i >> 1 & 1];
}

// Weights as the fragments of A, 16 rows of the tile each.
__device__ __forceinline__ void pack(unsigned (&w)[TILE / 16][4], const float (&s)[TILE / 2]) {
#pragma unroll
    for (int i = 0; i < TILE / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const __half2 two = __floats2half2_rn(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
            w[i][j] = *reinterpret_cast<const unsigned*>(&two);
        }
}

__device__ __forceinline__ void scores(float (&s)[TILE / 2], unsigned queries, unsigned keys) {
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (16 * i >= (slab < KS ? K - 64 * slab : P - 64 * (slab - KS))) break;
            multiply(s, slab_along(queries + slab * QUERY_SLAB + 32 * i),
                     slab_along(keys + slab * ROW_SLAB + 32 * i), slab | i);
        }
}

__device__ __forceinline__ void weigh(float (&o)[WIDTH / 2], const unsigned (&w)[TILE / 16][4],
                                      unsigned values) {
#pragma unroll
    for (int i = 0; i < TILE / 16; i++)
        multiply_across(o, w[i], slab_across(values + 16 * i * SLAB_ROW, ROW_SLAB));
}

// o / sum of two tokens, tokens[r] < 0 = none, padded[r] = zeros.
__device__ __forceinline__ void write(__half* o16, float* o32, Rows& rows, const int (&tokens)[2],
                                      const int (&padded)[2], int head, int h, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float sum = quad_sum(rows.sum[r]), part = padded[r] ? 0.f : 1.f / sum;
        if (tokens[r] < 0) continue;
        const long long at = ((long long)tokens[r] * h + head) * V + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++) {
            if (8 * i >= V) break;
            const float a = padded[r] ? 0.f : rows.o[4 * i + 2 * r] * part;
            const float b = padded[r] ? 0.f : rows.o[4 * i + 2 * r + 1] * part;
            if (o16)
                *reinterpret_cast<unsigned*>(o16 + at + 8 * i) = pack_halves(a / 16.f, b / 16.f);
            if (o32) *reinterpret_cast<float2*>(o32 + at + 8 * i) = make_float2(a, b);
        }
    }
}

__device__ __forceinline__ void load_rows(Rows& rows, const float* state, int thread) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) rows.o[i] = state[i * 256 + thread];
    const float* rest = state + WIDTH / 2 * 256 + thread;
    rows.top[0] = rest[0], rows.top[1] = rest[256];
    rows.sum[0] = rest[512], rows.sum[1] = rest[768];
}
__device__ __forceinline__ void store_rows(float* state, const Rows& rows, int thread) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) state[i * 256 + thread] = rows.o[i];
    float* rest = state + WIDTH / 2 * 256 + thread;
    rest[0] = rows.top[0], rest[256] = rows.top[1];
    rest[512] = rows.sum[0], rest[768] = rows.sum[1];
}

// A thread's two tokens, and the last row that each sees; a padded one may see anything.
__device__ __forceinline__ void own_tokens(int (&tokens)[2], int (&padded)[2], int (&last)[2],
                                           const int* pos, int n, int block, int thread, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int token = 128 * block + 16 * (thread >> 5) + (lane >> 2) + 8 * r;
        tokens[r] = token < n ? token : -1;
        last[r] = token < n ? pos[token] : -1;
        padded[r] = last[r] < 0;
        if (padded[r]) last[r] = 0x7fffffff;
    }
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(384, 1)
mla_prefill(__half* o16, float* o32, float* state, const unsigned char* queries,
            const unsigned char* keys, const unsigned char* values, const unsigned char* rope,
            const int* pos, int n, int h, int row0, int n_rows, int is_first, int is_last,
            float scale) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned q_at = shared_address(shared), k_at = q_at + SLABS * QUERY_SLAB;
    const unsigned v_at = k_at + STAGES * KEY_BYTES, bars = v_at + STAGES * VALUE_BYTES;
    const unsigned q_full = bars, k_full = bars + 8, v_full = k_full + 8 * STAGES;
    const unsigned k_empty = v_full + 8 * STAGES, v_empty = k_empty + 8 * STAGES;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, thread = tid - 128;
    const int blocks = (n + 127) / 128, block = blocks - 1 - blockIdx.x / h, head = blockIdx.x % h;
    if (tid == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < 8 * STAGES; i += 8) {
            barrier_init(k_full + i, 1), barrier_init(v_full + i, 1);
            barrier_init(k_empty + i, 8), barrier_init(v_empty + i, 8);
        }
        barriers_ready();
    }
    __syncthreads();
    pdl_launch();
    pdl_wait();
    // the block's last and first visible row; every warp finds them for itself
    int longest = -1, shortest = 0x7fffffff;
    for (int i = lane; i < 128; i += 32) {
        const int at = 128 * block + i < n ? pos[128 * block + i] : -1;
        longest = max(longest, at), shortest = min(shortest, at < 0 ? 0x7fffffff : at);
    }
    for (int i = 16; i; i >>= 1) {
        longest = max(longest, __shfl_xor_sync(~0u, longest, i));
        shortest = min(shortest, __shfl_xor_sync(~0u, shortest, i));
    }
    // tiles of this chunk that some token sees, those that all see whole, and this CTA's share
    const int seen = min(max(longest + 1 - row0, 0), n_rows), tiles = (seen + TILE - 1) / TILE;
    const int whole = longest < 0 ? 0 : max(shortest + 1 - row0, 0) / TILE;
    const int from = tiles * blockIdx.y / gridDim.y, stop = tiles * (blockIdx.y + 1) / gridDim.y;
    const int count = stop - from;

    if (warp < 4) {
        give_registers<24>();
        if (tid == 0 && count) {
            barrier_expect(q_full, SLABS * QUERY_SLAB);
            bulk_load(q_at, queries + ((long long)head * blocks + block) * SLABS * QUERY_SLAB,
                      SLABS * QUERY_SLAB, q_full);
            for (int at = 0; at < count; at++) {
                const int stage = at % STAGES, free = at / STAGES & 1 ^ 1, tile = stop - 1 - at;
                const long long in_head = (long long)head * (n_rows / TILE) + tile;
                const unsigned k_to = k_at + stage * KEY_BYTES, v_to = v_at + stage * VALUE_BYTES;
                barrier_wait(k_empty + 8 * stage, free);
                barrier_expect(k_full + 8 * stage, KEY_BYTES);
                bulk_load(k_to, keys + in_head * KS * ROW_SLAB, KS * ROW_SLAB, k_full + 8 * stage);
                bulk_load(k_to + KS * ROW_SLAB, rope + (long long)tile * PS * ROW_SLAB,
                          PS * ROW_SLAB, k_full + 8 * stage);
                barrier_wait(v_empty + 8 * stage, free);
                barrier_expect(v_full + 8 * stage, VALUE_BYTES);
                bulk_load(v_to, values + in_head * VALUE_BYTES, VALUE_BYTES, v_full + 8 * stage);
            }
        }
        return;
    }
    take_registers<240>();
    const int group = (warp >> 2) - 1;  // tokens 64 group .. 64 group + 63 of the block
    const unsigned q_own = q_at + group * (QUERY_SLAB / 2);
    int tokens[2], padded[2], last[2];
    own_tokens(tokens, padded, last, pos, n, block, thread, lane);
    Rows rows;
    float* const kept = state + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * KEPT * 256;
    if (!is_first) {
        if (count == 0 && !is_last) return;
        load_rows(rows, kept, thread);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) rows.o[i] = 0.f;
        rows.top[0] = rows.top[1] = NONE, rows.sum[0] = rows.sum[1] = 0.f;
    }
    if (count) {
        float s[TILE / 2], keep[2];
        unsigned w[TILE / 16][4];
        // rows past a token's position score -inf
        auto mask = [&](int tile) {
            if (tile < whole) return;
#pragma unroll
            for (int i = 0; i < TILE / 2; i++) {
                const int row = row0 + tile * TILE + 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
                if (row > last[i >> 1 & 1]) s[i] = NONE;
            }
        };
        if (group == 1) let_pass(1, 256);  // the first group goes first
        barrier_wait(q_full, 0);
        barrier_wait(k_full, 0);
        meet(1 + group, 256);
        products_begin();
        scores(s, q_own, k_at);
        products_commit();
        let_pass(2 - group, 256);
        products_wait<0>();
        hold(s);
        if (lane == 0) barrier_arrive(k_empty);
        mask(stop - 1);
        soften(s, rows, keep, scale);
        shrink(rows.o, keep);
        pack(w, s);
        for (int at = 1; at < count; at++) {
            const int stage = at % STAGES, before = (at - 1) % STAGES;
            barrier_wait(k_full + 8 * stage, at / STAGES & 1);
            meet(1 + group, 256);
            products_begin();
            scores(s, q_own, k_at + stage * KEY_BYTES);
            products_commit();
            barrier_wait(v_full + 8 * before, (at - 1) / STAGES & 1);
            products_begin();
            weigh(rows.o, w, v_at + before * VALUE_BYTES);
            products_commit();
            let_pass(2 - group, 256);
            products_wait<1>();
            hold(s);
            mask(stop - 1 - at);
            soften(s, rows, keep, scale);
            // always true, but keeps the compiler from waiting before it takes the weights
            if (lane == 0 && !(rows.sum[0] + rows.sum[1] < 0.f))
                barrier_arrive(k_empty + 8 * stage);
            products_wait<0>();
            hold(rows.o);
            if (lane == 0) barrier_arrive(v_empty + 8 * before);
            shrink(rows.o, keep);
            pack(w, s);
        }
        const int end = (count - 1) % STAGES;
        barrier_wait(v_full + 8 * end, (count - 1) / STAGES & 1);
        products_begin();
        weigh(rows.o, w, v_at + end * VALUE_BYTES);
        products_commit();
        products_wait<0>();
        hold(rows.o);
        if (group == 0) meet(1, 256);  // the pass that the other group left last
    }
    if (is_last && gridDim.y == 1)
        write(o16, o32, rows, tokens, padded, head, h, lane);
    else
        store_rows(kept, rows, thread);
}

extern "C" __global__ void __launch_bounds__(256)
mla_prefill_merge(__half* o16, float* o32, const float* state, const int* pos, int n, int h,
                  int splits, float scale) {
    const int thread = threadIdx.x, lane = thread & 31;
    const int block = (n + 127) / 128 - 1 - blockIdx.x / h, head = blockIdx.x % h;
    pdl_launch();
    pdl_wait();
    int tokens[2], padded[2], last[2];
    own_tokens(tokens, padded, last, pos, n, block, thread, lane);
    Rows rows, part;
    load_rows(rows, state + (long long)blockIdx.x * KEPT * 256, thread);
    for (int split = 1; split < splits; split++) {
        load_rows(part, state + ((long long)split * gridDim.x + blockIdx.x) * KEPT * 256, thread);
        float keep[2], add[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float top = fmaxf(rows.top[r], part.top[r]);
            const float base = top == NONE ? 0.f : top * scale;
            keep[r] = exp2f(rows.top[r] * scale - base), add[r] = exp2f(part.top[r] * scale - base);
            rows.top[r] = top, rows.sum[r] = rows.sum[r] * keep[r] + part.sum[r] * add[r];
        }
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++)
            rows.o[i] = rows.o[i] * keep[i >> 1 & 1] + part.o[i] * add[i >> 1 & 1];
    }
    write(o16, o32, rows, tokens, padded, head, h, lane);
}
