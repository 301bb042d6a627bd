// A split's cache rows on their way into shared memory, as float16 (mla_decode_mma.cu, whose defines
// R, P, MT, CACHE_KIND, STAGES and CHOSEN these are).
//
// Sources: own. Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_attention.py
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mla_splits.cuh"
#include "mma.cuh"
#include "pdl.cuh"
// Float16 rows in a row come by bulk copies, asked for by warps of their own: in the other warps, cp.async
// would take a third of a tile's time, and a warp gets rid of a bulk copy every 40 ns.
#if CACHE_KIND == 0 && !CHOSEN && (defined(BULK_SIM) || (!defined(SIMT) && __CUDA_ARCH__ >= 900))
#define BULK 1
#ifndef BULK_SIM
#include "bulk_copy.cuh"
#endif
#else
#define BULK 0
#endif

constexpr int TILE = SPLIT_ROWS;              // cache rows at a time
constexpr int M = 16 * MT;                    // query rows of a CTA
constexpr int PRODUCERS = BULK ? 2 * MT : 0;  // warps; 4 are a warpgroup that can give registers away
constexpr int THREADS = 256 + 32 * PRODUCERS; // the first 256 compute
constexpr int W = R + P;
constexpr int STEPS = (W + 15) / 16;          // of 16 columns, the last may be half empty
constexpr int LD = 16 * STEPS + 8;            // halves between rows: an odd number of 16 bytes, so
                                              // that ldmatrix meets every bank once
constexpr int KG = 4;                         // 8 warps: 4 parts of r + p by 2 halves of a tile
constexpr int PART = (STEPS + KG - 1) / KG;   // steps of a warp
constexpr int UNITS = R / 16, OWN = (UNITS + 7) / 8;  // 16 columns of o; those of a warp
constexpr int LDS = TILE + 8, LDP = TILE + 8;
constexpr int LANES = 256 / M, COLS = TILE / LANES;   // threads and scores of a row in softmax
constexpr bool RAW = CACHE_KIND != 0;         // rows are converted after they arrive
constexpr int CHAINS = MT == 1 ? 2 : 1;       // sums of a score, to shorten what waits on each other
constexpr int BLOCKS = (W + 31) / 32;         // of a q8_0 row
constexpr int ROW_BYTES = CACHE_KIND == 2 ? 4 * W : CACHE_KIND == 3 ? 32 * BLOCKS : 2 * W;
constexpr int CHUNKS = ROW_BYTES / 16;        // of a row
static_assert(CHUNKS <= 256, "a thread keeps its column");
constexpr int STAGE_ROW = RAW ? ROW_BYTES : 2 * LD;
constexpr int STAGE_BYTES = TILE * STAGE_ROW;
constexpr int N_SCALES = CACHE_KIND == 3 ? (TILE * BLOCKS + 255) / 256 : 1;  // of a thread
#define NONE __int_as_float(0xff800000)       // -inf

// ---------------------------------------------------------------- shared memory -------------
struct Shared {
    char* ring;                // STAGES tiles as they come
    __half* tile;              // [TILE][LD]: a converted tile (RAW)
    float* score;              // [KG][M][LDS]: parts of scores
    __half* weight;            // [M][LDP]: probabilities
    float* keep;               // [M]: what remains of older sums
    unsigned long long* full;  // [STAGES]: tiles that have arrived (BULK)
    unsigned long long* empty; // [STAGES]: tiles that all warps are done with (BULK)
    float* scale;              // [2][TILE][BLOCKS] of this tile and the next (q8_0)
    int* wanted;               // [length]: this split's rows (CHOSEN)
};

__device__ __forceinline__ Shared carve(char* at) {
    Shared s;
    s.ring = at, at += STAGES * STAGE_BYTES;
    s.tile = (__half*)at, at += RAW ? TILE * LD * 2 : 0;
    s.score = (float*)at, at += KG * M * LDS * 4;
    s.weight = (__half*)at, at += M * LDP * 2;
    s.keep = (float*)at, at += M * 4;
    s.full = (unsigned long long*)at, at += STAGES * 8;
    s.empty = (unsigned long long*)at, at += STAGES * 8;
    s.scale = (float*)at, at += CACHE_KIND == 3 ? 2 * TILE * BLOCKS * 4 : 0;
    s.wanted = (int*)at;
    return s;
}

// Cache row that slot `i` of this split shows, -1 for none.
__device__ __forceinline__ int row_of(const Shared& s, int i, int start, int stop) {
    if (start + i >= stop) return -1;
    return CHOSEN ? s.wanted[i] : start + i;
}

// ---------------------------------------------------------------- copies --------------------
// Among the threads that compute.
__device__ __forceinline__ void all_meet() {
#if BULK
    meet(1, 256);
#else
    __syncthreads();
#endif
}

// This step's first row: those below are older than the launch before.
__device__ __forceinline__ int first_position(const int* pos, int n) {
    int least = 0x7fffffff;
    for (int t = threadIdx.x & 31; t < n; t += 32) {
        const int at = position(pos, t);
        least = min(least, at < 0 ? least : at);
    }
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        least = min(least, __shfl_xor_sync(~0u, least, offset));
    return least;
}

#if BULK
// What the last warps do: a lane asks for one row of each tile. Slots without a row become zeros. Rows from `fresh` on may be asked for once the predecessor is done.
__device__ __forceinline__ void produce(const Shared& s, const char* cache, int fresh, int start,
                                        int stop, int tiles) {
    constexpr int SHARE = TILE / PRODUCERS;  // rows of a warp
    const int lane = threadIdx.x & 31, first = (threadIdx.x / 32 - 8) * SHARE;
    bool waited = !EARLY;
    for (int i = 0; i < tiles; i++) {
        // the last stage is free once the queries have left it
        const int stage = i % STAGES, uses = i / STAGES + (stage == STAGES - 1);
        if (uses) barrier_wait(shared_address(s.empty + stage), (uses - 1) & 1);
        if (!waited && start + min((i + 1) * TILE, stop - start) > fresh) pdl_wait(), waited = true;
        char* to = s.ring + stage * STAGE_BYTES + first * STAGE_ROW;
        const int row = lane < SHARE ? row_of(s, i * TILE + first + lane, start, stop) : -1;
        const unsigned rows = __ballot_sync(~0u, row >= 0), bar = shared_address(s.full + stage);
        if (rows != (1u << SHARE) - 1) {
            for (int j = 0; j < SHARE; j++)
                for (int c = lane; c < CHUNKS && !(rows >> j & 1); c += 32)
                    *(uint4*)(to + j * STAGE_ROW + 16 * c) = make_uint4(0, 0, 0, 0);
            publish_shared();  // a later copy may come to the same place
            __syncwarp();
        }
        if (lane == 0) barrier_expect(bar, __popc(rows) * ROW_BYTES);
        __syncwarp();
        if (row >= 0)
            bulk_load(shared_address(to + lane * STAGE_ROW), cache + (long long)row * ROW_BYTES,
                      ROW_BYTES, bar);
    }
    if (!waited) pdl_wait();
}
#else
// Starts copying the tile whose first slot is `first`; slots without a row become zeros.
__device__ __forceinline__ void fetch(const Shared& s, const char* cache, int stage, int first,
                                      int start, int stop) {
    char* to = s.ring + stage * STAGE_BYTES;
    // a thread keeps its column: whole rows at a time, so that addresses are one addition apart
    constexpr int AT_ONCE = 256 / CHUNKS < TILE ? 256 / CHUNKS : TILE;
    const int own = threadIdx.x / CHUNKS, col = threadIdx.x % CHUNKS * 16;
    if (own >= AT_ONCE) return;
#pragma unroll
    for (int i = 0; i < (TILE + AT_ONCE - 1) / AT_ONCE; i++) {
        const int slot = i * AT_ONCE + own;
        if (TILE % AT_ONCE && slot >= TILE) break;
        const int row = row_of(s, first + slot, start, stop);
        cp_async16(to + slot * STAGE_ROW + col,
                   cache + (long long)max(row, 0) * ROW_BYTES + col, row >= 0);
    }
}

// Asks for the first STAGES - 1 tiles, for rows from `fresh` on once the predecessor is done.
__device__ __forceinline__ void fetch_first(const Shared& s, const char* cache, int fresh, int start,
                                            int stop, int tiles) {
    int asked = 0;
    for (; EARLY && asked < min(STAGES - 1, tiles); asked++) {
        if (start + min((asked + 1) * TILE, stop - start) > fresh) break;
        fetch(s, cache, asked, asked * TILE, start, stop);
        cp_async_commit();
    }
    if (EARLY) pdl_wait();
    for (; asked < STAGES - 1; asked++) {
        if (asked < tiles) fetch(s, cache, asked, asked * TILE, start, stop);
        cp_async_commit();
    }
}
#endif

// Until tile i is there for all. Without bulk copies, also asks for another one.
__device__ __forceinline__ void take_tile(const Shared& s, const char* cache, int i, int start,
                                          int stop, int tiles) {
#if BULK
    barrier_wait(shared_address(s.full + i % STAGES), i / STAGES & 1);
#else
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // and all are done with tile i - 1
    if (i + STAGES - 1 < tiles)
        fetch(s, cache, (i + STAGES - 1) % STAGES, (i + STAGES - 1) * TILE, start, stop);
    cp_async_commit();
#endif
}

// This warp is done with what stage `stage` held.
__device__ __forceinline__ void leave(const Shared& s, int stage) {
#if BULK
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(shared_address(s.empty + stage));
#endif
}

// The CTA's queries to `to`, [M][LD]; rows from `row_end` on hold anything: nobody uses their results.
__device__ __forceinline__ void take_queries(__half* to, const __half* q, int row0, int row_end) {
#pragma unroll
    for (int i = threadIdx.x; i < M * (W / 8); i += 256) {
        const int row = row0 + i / (W / 8), c = i % (W / 8) * 8;
        if (row < row_end)
            *(uint4*)(to + i / (W / 8) * LD + c) = *(const uint4*)(q + (long long)row * W + c);
    }
#if BULK
    publish_shared();  // tiles follow
#endif
    all_meet();
}

// ---------------------------------------------------------------- other types ---------------
// Scales of the tile at `first`: read one tile ahead, since they are too short for cp.async.
__device__ __forceinline__ void load_scales(float (&own)[N_SCALES], const Shared& s,
                                            const __half* scales, int first, int start, int stop) {
#pragma unroll
    for (int i = 0; i < N_SCALES; i++) {
        const int at = i * 256 + threadIdx.x, slot = at / BLOCKS;
        const int row = at < TILE * BLOCKS ? row_of(s, first + slot, start, stop) : -1;
        own[i] = row < 0 ? 0.f : __half2float(scales[(long long)row * BLOCKS + at % BLOCKS]);
    }
}

__device__ __forceinline__ void keep_scales(const Shared& s, const float (&own)[N_SCALES], int which) {
#pragma unroll
    for (int i = 0; i < N_SCALES; i++)
        if (i * 256 + threadIdx.x < TILE * BLOCKS)
            s.scale[which * TILE * BLOCKS + i * 256 + threadIdx.x] = own[i];
}

// Eight values from column 8c of a slot as float16 pairs.
__device__ __forceinline__ uint4 converted(const Shared& s, const char* raw, int slot, int c,
                                           int which) {
    float v[8];
    if (CACHE_KIND == 1) {
        const uint4 x = *(const uint4*)(raw + slot * ROW_BYTES + 16 * c);
        const unsigned w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = __uint_as_float(i & 1 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16);
    } else if (CACHE_KIND == 2) {
        const float4 a = *(const float4*)(raw + slot * ROW_BYTES + 32 * c);
        const float4 b = *(const float4*)(raw + slot * ROW_BYTES + 32 * c + 16);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        const uint2 x = *(const uint2*)(raw + slot * ROW_BYTES + 8 * c);
        const float d = s.scale[(which * TILE + slot) * BLOCKS + c / 4];
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = (float)(signed char)((i < 4 ? x.x : x.y) >> 8 * (i & 3)) * d;
    }
    uint4 out;
    unsigned* word = &out.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __half2 two = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        word[i] = *(const unsigned*)&two;
    }
    return out;
}
