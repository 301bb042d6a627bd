// Op        dsa_scores.cu's scores on Hopper's warpgroup products, of many tokens, of a few and of one:
//           score[t][j] = sum_I w[t][I] max(0, q[t][I] . key_j) / root, j <= pos[t]
// Shapes    scores [n, ld]; parts by dsa_prepare: with LAYOUT=1 [n, 2, i / 64, I, 64], _one with
//           LAYOUT=2 [2, I, i]; head_weights [n, I]; keys [n_ctx, i]; pos [n], -1 = padded
// Dtypes    keys and parts float16; scores and sums float32
// Grid      (SMs), 384 threads: three warpgroups of two tiles of 64 keys, which stay in registers
//           while TOKENS tokens pass through shared memory, 128 / I at a time, twice;
//           _few (SMs), 512 threads: the tokens stay, a warpgroup takes 64 keys after 64;
//           _one (SMs), 256 threads: the queries stay in registers, high and low parts of 8 heads a
//           warp, and each of two warpgroups has RING tiles of 128 keys coming in shared memory
// Shared    2 x (512 i + 512) bytes; _few n x (4 I i + 4 I); _one 1536 i + 8192
// Assumes   HEADS = I divides 128 and is a multiple of 8 (_few: of 32; _one: 32 or 64), WIDTH = i is
//           64 or 128
// Needs     9.0a
// Variants  HEADS=32 WIDTH=128; HEADS=64 WIDTH=128; HEADS=8 WIDTH=64
// Numerics  as dsa_scores_many: queries in 2 float16 (22 bits), float32 sums
// Bound by  4 n I n_kv i flops; _few: 2 n_kv i bytes
// Sources   own
// Tested by tests/gpu/test_cuda_sparse.py
#include <cuda_fp16.h>

#include "bulk_copy.cuh"
#include "dsa.cuh"
#include "mma.cuh"
#include "pdl.cuh"
#include "warpgroup.cuh"

#define CHUNKS (WIDTH / 32)
#define TOKENS 32
#define TOGETHER (128 / HEADS)                       // tokens of a product
#define BLOCK_PIECES (HEADS * 8)                     // uint4 of a token's 64 columns of one part
#define TOKEN_PIECES (2 * (WIDTH / 64) * BLOCK_PIECES)
#define STAGE_PIECES (TOGETHER * TOKEN_PIECES)
#define ROWS 384                                     // keys of a CTA

extern __shared__ __align__(1024) uint4 staged[];

// 64 keys of a warpgroup as A fragments. A lane's 16 bytes are 8 neighbouring columns: two steps in
// depth, whose order dsa_prepare gives the queries too.
struct Keys64 {
    uint4 a[CHUNKS][2];

    __device__ __forceinline__ void load(const void* keys, int row0, int last) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int row = min(row0 + 16 * warp + 8 * side + (lane >> 2), last);
            const uint4* at = (const uint4*)((const __half*)keys + (long long)row * WIDTH) + (lane & 3);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) a[c][side] = at[4 * c];
        }
    }

    // d = keys times the N columns staged at `slabs`.
    template <int N>
    __device__ __forceinline__ void multiply(float (&d)[N / 2], const uint4* slabs) const {
        products_begin();
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint4 &u = a[c][0], &v = a[c][1];
                    const unsigned four[4] = {half ? u.z : u.x, half ? v.z : v.x,
                                              half ? u.w : u.y, half ? v.w : v.y};
                    const int step = 2 * c + half, slab = part * (WIDTH / 64) + step / 4;
                    ::multiply(d, four, slab_along(slabs + slab * N * 8, 32 * (step % 4)),
                               part + step > 0);
                }
        products_commit();
        products_wait<0>();
        hold(d);
    }
};

// Scores of rows g (x) and g + 8 (y) of one token from its HEADS columns of d.
__device__ __forceinline__ void weigh(float& x, float& y, const float* d, const float2* weights) {
    x = y = 0.f;
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++) {
        const float2 w = weights[4 * j + (threadIdx.x & 3)];
        x += w.x * fmaxf(d[4 * j], 0.f) + w.y * fmaxf(d[4 * j + 1], 0.f);
        y += w.x * fmaxf(d[4 * j + 2], 0.f) + w.y * fmaxf(d[4 * j + 3], 0.f);
    }
    x += __shfl_xor_sync(~0u, x, 1), y += __shfl_xor_sync(~0u, y, 1);
    x += __shfl_xor_sync(~0u, x, 2), y += __shfl_xor_sync(~0u, y, 2);
}

extern "C" __global__ void __launch_bounds__(384, 1)
dsa_scores_wgmma(float* scores, const void* parts, const float* head_weights, const void* keys,
                 const int* pos, int n, long long ld) {
    pdl_launch();
    pdl_wait();
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int last = largest(pos, n), tiles = (last + ROWS) / ROWS, sets = (n + TOKENS - 1) / TOKENS;
    uint4* staged_weights = staged + 2 * STAGE_PIECES;
    // TOGETHER tokens from `first` on: per part and 64 columns their heads' rows, 128 of 128 bytes.
    const auto stage = [&](int first, int slot) {
        for (int i = threadIdx.x; i < STAGE_PIECES; i += 384) {
            const int block = i / 1024, row = i % 1024 / 8, token = min(first + row / HEADS, n - 1);
            const uint4* in = (const uint4*)parts + (long long)token * TOKEN_PIECES
                + block * BLOCK_PIECES + row % HEADS * 8 + i % 8;
            cp_async16(staged + slot * STAGE_PIECES + i, in);
        }
        for (int i = threadIdx.x; i < 32; i += 384) {
            const int token = min(first + i * 4 / HEADS, n - 1);
            cp_async16(staged_weights + slot * 32 + i,
                       head_weights + (long long)token * HEADS + i * 4 % HEADS);
        }
        cp_async_commit();
    };
    for (int item = blockIdx.x; item < tiles * sets; item += gridDim.x) {
        const int first = item % sets * TOKENS, stop = min(n, first + TOKENS);
        const int row0 = item / sets * ROWS + threadIdx.x / 128 * 128;
        const int set_last = largest(pos + first, stop - first);
        if (item / sets * ROWS > set_last) continue;
        stage(first, 0);
        Keys64 held[2];
        held[0].load(keys, row0, last);
        held[1].load(keys, row0 + 64, last);
        for (int at = first, slot = 0; at < stop; at += TOGETHER, slot ^= 1) {
            cp_async_wait<0>();
            publish_shared();
            __syncthreads();  // these tokens are there, and nobody reads those before any more
            if (at + TOGETHER < stop) stage(at + TOGETHER, slot ^ 1);
            const float2* weights = (const float2*)(staged_weights + slot * 32);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const int top = row0 + 64 * m, row = top + (threadIdx.x >> 5 & 3) * 16 + g;
                if (top > set_last) continue;
                float d[64];
                held[m].multiply<128>(d, staged + slot * STAGE_PIECES);
#pragma unroll
                for (int o = 0; o < TOGETHER; o++) {
                    float x, y;
                    weigh(x, y, d + o * (HEADS / 2), weights + o * (HEADS / 2));
                    const int token = at + o;
                    if (t == o % 4 && token < stop) {
                        float* out = scores + token * ld;
                        const int allowed = pos[token];
                        if (row <= allowed) out[row] = x;
                        if (row + 8 <= allowed) out[row + 8] = y;
                    }
                }
            }
        }
        __syncthreads();
    }
}

#if HEADS % 32 == 0
extern "C" __global__ void __launch_bounds__(512, 1)
dsa_scores_wgmma_few(float* scores, const void* parts, const float* head_weights, const void* keys,
                     const int* pos, int n, long long ld) {
    const int lane = threadIdx.x & 31, g = lane >> 2, group = threadIdx.x / 128;
    const int first = blockIdx.x + gridDim.x * group, apart = gridDim.x * 4;  // tiles of 64 keys
    pdl_launch();
    // The first keys on their way to L2 while the queries are still prepared; the position may be
    // that of the step before, which asks for nearly the same keys.
    const int about = *(const volatile int*)pos;
    for (int tile = first; tile < first + 2 * apart; tile += apart) {
        const int row = tile * 64 + threadIdx.x % 128 / (WIDTH / 64);
        const char* line = (const char*)((const __half*)keys + (long long)row * WIDTH)
            + threadIdx.x % (WIDTH / 64) * 128;
        if (row <= about) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
    pdl_wait();
    for (int i = threadIdx.x; i < n * TOKEN_PIECES; i += 512)
        cp_async16(staged + i, (const uint4*)parts + i);
    uint4* staged_weights = staged + n * TOKEN_PIECES;
    for (int i = threadIdx.x; i < n * HEADS / 4; i += 512)
        cp_async16(staged_weights + i, (const uint4*)head_weights + i);
    cp_async_commit();
    const int last = largest(pos, n), tiles = (last + 64) / 64;
    Keys64 held[2];
    if (first < tiles) held[0].load(keys, first * 64, last);
    cp_async_wait<0>();
    publish_shared();
    __syncthreads();
    const auto score = [&](const Keys64& these, int tile) {
        const int row = tile * 64 + (threadIdx.x >> 5 & 3) * 16 + g;
        for (int token = 0; token < n; token++) {
            float d[HEADS / 2], x, y;
            these.multiply<HEADS>(d, staged + token * TOKEN_PIECES);
            weigh(x, y, d, (const float2*)(staged_weights + token * HEADS / 4));
            float* out = scores + token * ld;
            const int allowed = pos[token];
            if ((lane & 3) == 0 && row <= allowed) out[row] = x;
            if ((lane & 3) == 1 && row + 8 <= allowed) out[row + 8] = y;
        }
    };
    for (int tile = first; tile < tiles; tile += 2 * apart) {
        if (tile + apart < tiles) held[1].load(keys, (tile + apart) * 64, last);
        score(held[0], tile);
        if (tile + apart >= tiles) break;
        if (tile + 2 * apart < tiles) held[0].load(keys, (tile + 2 * apart) * 64, last);
        score(held[1], tile + apart);
    }
}
#endif

#if HEADS == 32 || HEADS == 64
#define BLOCKS (HEADS / 32)  // of queries: 32 heads, their high and low parts are 64 rows
#define RING 3
#define TILE_PIECES (128 * WIDTH / 8)

// The partial sums of 32 columns over the 8 lanes g; lane g keeps the 4 columns from 4 (g reversed)..
template <int N>
__device__ __forceinline__ void halve(float (&v)[32], int mask) {
    const bool upper = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float kept = upper ? v[i + N / 2] : v[i], sent = upper ? v[i] : v[i + N / 2];
        v[i] = kept + __shfl_xor_sync(~0u, sent, mask);
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
dsa_scores_wgmma_one(float* scores, const void* parts, const float* head_weights, const void* keys,
                     const int* pos) {
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int first = blockIdx.x + gridDim.x * group, apart = gridDim.x * 2;
    uint4* ring = staged + group * RING * TILE_PIECES;
    float* partial = (float*)(staged + 2 * RING * TILE_PIECES) + group * 1024;  // [2][4 warps][128]
    pdl_launch();
    // As in _few: the first keys on their way to L2 while the query is still prepared.
    const int about = *(const volatile int*)pos;
    for (int i = thread; i < RING * 2 * WIDTH; i += 128) {  // lines of 128 bytes, 2 WIDTH a tile
        const long long row = (first + i / (2 * WIDTH) * apart) * 128ll + i % (2 * WIDTH) / (WIDTH / 64);
        const char* line = (const char*)((const __half*)keys + row * WIDTH) + i % (WIDTH / 64) * 128;
        if (row <= about) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
    pdl_wait();
    const int last = pos[0], tiles = (last + 128) / 128;
    const auto fetch = [&](int tile, int slot) {
        if (tile < tiles)
#pragma unroll 4
            for (int i = thread; i < TILE_PIECES; i += 128) {
                const int row = i / (WIDTH / 8), c = i % (WIDTH / 8);
                const uint4* in = (const uint4*)((const __half*)keys
                    + (long long)min(tile * 128 + row, last) * WIDTH) + c;
                cp_async16(ring + slot * TILE_PIECES + c / 8 * 1024 + row * 8 + ((c ^ row) & 7), in);
            }
        cp_async_commit();
    };
    for (int i = 0; i < RING - 1; i++) fetch(first + i * apart, i);
    unsigned a[BLOCKS][WIDTH / 16][4];
    float weight[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        const int head = 32 * b + 8 * warp + g;
        const unsigned* high = (const unsigned*)parts + head * (WIDTH / 2) + t;
        const unsigned* low = high + HEADS * (WIDTH / 2);
        weight[b] = head_weights[head];
#pragma unroll
        for (int step = 0; step < WIDTH / 16; step++) {
            a[b][step][0] = high[8 * step], a[b][step][1] = low[8 * step];
            a[b][step][2] = high[8 * step + 4], a[b][step][3] = low[8 * step + 4];
        }
    }
    const auto barrier = [&] { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); };
    int slot = 0, turn = 0;
    for (int tile = first; tile < tiles; tile += apart) {
        cp_async_wait<RING - 2>();
        publish_shared();
        barrier();  // this tile is there, and the one before it read by all
        fetch(tile + (RING - 1) * apart, slot ? slot - 1 : RING - 1);
        float v[32] = {};
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            float d[64];
            products_begin();
#pragma unroll
            for (int step = 0; step < WIDTH / 16; step++)
                multiply(d, a[b][step],
                         slab_along(ring + slot * TILE_PIECES + step / 4 * 1024, 32 * (step % 4)),
                         step > 0);
            products_commit();
            products_wait<0>();
            hold(d);
#pragma unroll
            for (int i = 0; i < 32; i++)  // high part's product + low part's
                v[i] += weight[b] * fmaxf(d[i / 2 * 4 + i % 2] + d[i / 2 * 4 + 2 + i % 2], 0.f);
        }
        halve<32>(v, 16);
        halve<16>(v, 8);
        halve<8>(v, 4);
        // v[0..3]: columns 8 j + 2 t, + 1 of two neighbouring blocks j
        const int j = (lane >> 4 & 1) * 8 + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2;
        float2* out = (float2*)(partial + turn * 512 + warp * 128 + 8 * j + 2 * t);
        out[0] = {v[0], v[1]}, out[4] = {v[2], v[3]};
        barrier();
        const float* sums = partial + turn * 512 + thread;
        const int row = tile * 128 + thread;
        if (row <= last) scores[row] = (sums[0] + sums[128]) + (sums[256] + sums[384]);
        slot = slot == RING - 1 ? 0 : slot + 1, turn ^= 1;
    }
}
#endif
