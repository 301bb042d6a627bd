// Op        keys and values of each head from latent rows row0 .. row0 + n_rows of the cache:
//           key = c_kv k_b[head] beside the shared k_pe, value = v_b[head] c_kv
// Shapes    keys, values, rope, up as slabs.cuh has them; unboost [2] (mla_prefill_inputs.cu);
//           cache [n_ctx, r + p]; pos [n]
// Dtypes    cache CACHE_KIND 0 float16, 1 bfloat16, 2 float32, 3 int8 [n_ctx, 32 blocks] with
//           float16 scales [n_ctx, blocks], rounded to float16; up, keys, values float16, unboost
//           float32
// Variants  R=512 K=128 P=64 V=128 TILE=128 CACHE_KIND=0;
//           R=512 K=192 P=64 V=256 TILE=64 CACHE_KIND=0;
//           R=256 K=64 P=64 V=128 TILE=128 CACHE_KIND=3;
//           R=512 K=128 P=64 V=128 TILE=128 CACHE_KIND=1; R=32 K=16 P=8 V=16 TILE=128 CACHE_KIND=2
// Needs     9.0a
// Spills    none
// Grid      any number of CTAs, best one per SM; 384 threads; shared: RS slabs of
//           128 rows, 4 slabs of up, 2 of output (slab 16 KiB), 256 bytes
// Assumes   R, K, P, V, TILE at compile time, r and p multiples of 8; rows up to the
//           highest position are written; n_rows is a multiple of 128
// Numerics  products of float16 with float32 sums, keys and values rounded to float16 and kept
//           within +-65504; rows past the highest position come out as 0 and aren't read
// Bound by  2 n_rows r h (k + v) flops
// Sources   warp specialisation after CUTLASS's sm90 kernels (BSD-3), own code
// Tested by tests/kernels/test_prefill.py, tests/gpu/test_cuda_prefill.py
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bulk_copy.cuh"
#include "pdl.cuh"
#include "slabs.cuh"
#include "warpgroup.cuh"

#define SLAB (128 * SLAB_ROW)
#define STAGES 4
#define LOADERS 96  // threads that bring latent rows

#if CACHE_KIND == 0
typedef __half Cell;
#elif CACHE_KIND == 1
typedef __nv_bfloat16 Cell;
#elif CACHE_KIND == 2
typedef float Cell;
#else
typedef signed char Cell;
#endif
#define BLOCKS ((R + P + 31) / 32)
#define PITCH (CACHE_KIND == 3 ? 32 * BLOCKS : R + P)  // cells from row to row

// ---------------------------------------------------------------- helpers -------------------
__device__ __forceinline__ float get(__half v) { return __half2float(v); }
__device__ __forceinline__ float get(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float get(float v) { return v; }
__device__ __forceinline__ float get(signed char v) { return v; }

// Eight values of a row of the cache from `column` on, as float16.
__device__ __forceinline__ uint4 piece(const Cell* cache, const __half* scales, long long row,
                                       int column) {
    const Cell* from = cache + row * PITCH + column;
    if constexpr (CACHE_KIND == 0) return *reinterpret_cast<const uint4*>(from);
    const float scale = CACHE_KIND == 3 ? __half2float(scales[row * BLOCKS + column / 32]) : 1.f;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = get(from[i]) * scale;
    return pack_piece(v);
}

// Tells consumers of each slab of latent rows as soon as this thread's pieces are there.
template <int FIRST>
__device__ __forceinline__ void announce(unsigned ready) {
    copies_wait<RS - 1 - FIRST>();
    publish_shared();
    barrier_arrive(ready + 8 * FIRST);
    if constexpr (FIRST + 1 < RS) announce<FIRST + 1>(ready);
}

// Into how many items the columns of a row tile are cut: whole waves of CTAs, each with its pairs
// of slabs and a start that costs about as much as one pair.
__device__ __forceinline__ int best_splits(int used, int pairs) {
    int best = 1, least = 0x7fffffff;
    for (int s = 1; s <= min(pairs, 16); s++) {
        const int waves = (used * s + gridDim.x - 1) / gridDim.x;
        const int cost = waves * ((pairs + s - 1) / s + 1);
        if (cost < least) best = s, least = cost;
    }
    return best;
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(384, 1)
mla_expand(unsigned char* keys, unsigned char* values, unsigned char* rope,
           const unsigned char* up, const float* unboost, const Cell* cache,
           const __half* scales, const int* pos, int n, int row0, int n_rows, int h) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char* const latent = shared;
    unsigned char* const staged = shared + (RS + STAGES) * SLAB;
    const unsigned weights = shared_address(shared) + RS * SLAB;
    const unsigned full = shared_address(staged) + 2 * SLAB, empty = full + 8 * STAGES;
    const unsigned ready = empty + 8 * STAGES, unread = ready + 8 * RS;
    int* const tops = reinterpret_cast<int*>(staged + 2 * SLAB + 16 * STAGES + 8 * RS + 8);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++)
            barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 8);
        for (int i = 0; i < RS; i++) barrier_init(ready + 8 * i, LOADERS);
        barrier_init(unread, 8);
        barriers_ready();
    }
    pdl_launch();
    pdl_wait();
    int top = -1;
    for (int i = tid; i < n; i += 384) top = max(top, pos[i]);
    for (int i = 16; i; i >>= 1) top = max(top, __shfl_xor_sync(~0u, top, i));
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    for (int i = 0; i < 12; i++) top = max(top, tops[i]);
    // row tiles in use, each with its columns dealt to `splits` items that CTAs take in turn
    const int n_here = min(top + 1 - row0, n_rows), used = (n_here + 127) / 128;
    if (used <= 0) return;
    const int n_slabs = h * (KS + VS), pairs = (n_slabs + 1) / 2, splits = best_splits(used, pairs);

    if (warp == 0) {
        give_registers<40>();
        if (lane > 0) return;
        int at = 0;
        for (int item = blockIdx.x; item < used * splits; item += gridDim.x) {
            const int split = item / used, first = pairs * split / splits * RS;
            const int stop = pairs * (split + 1) / splits * RS;
            for (int block = first; block < stop; block++, at++) {
                const int stage = at % STAGES;
                barrier_wait(empty + 8 * stage, at / STAGES & 1 ^ 1);
                barrier_expect(full + 8 * stage, SLAB);
                bulk_load(weights + stage * SLAB, up + (long long)block * SLAB, SLAB,
                          full + 8 * stage);
            }
        }
        return;
    }
    if (warp < 4) {
        give_registers<40>();
        int turn = 0;
        for (int item = blockIdx.x; item < used * splits; item += gridDim.x, turn++) {
            const int tile = item % used, split = item / used;
            if (turn) barrier_wait(unread, turn - 1 & 1);
            const int n_rows_here = n_here - 128 * tile;
            const long long row_here = row0 + 128 * tile;
#pragma unroll
            for (int slab = 0; slab < RS; slab++) {
                for (int i = tid - 32; i < 1024; i += LOADERS) {
                    const int row = i >> 3, column = 64 * slab + 8 * (i & 7);
                    const int valid = row < n_rows_here && column < R;
                    unsigned char* to = latent + slab * SLAB + piece_at(row, i & 7);
                    const Cell* from = cache + (valid ? (row_here + row) * PITCH + column : 0);
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if constexpr (CACHE_KIND == 0) {
                        copy16(shared_address(to), from, valid);
                    } else {
                        if (valid) v = piece(cache, scales, row_here + row, column);
                        *reinterpret_cast<uint4*>(to) = v;
                    }
                }
                copies_commit();
            }
            announce<0>(ready);
            for (int i = tid - 32; i < 128 * 8 * PS && split == 0; i += LOADERS) {
                const int row = i / (8 * PS), column = i % (8 * PS), at = 128 * tile + row;
                uint4 v = make_uint4(0, 0, 0, 0);
                if (row < n_rows_here && 8 * column < P)
                    v = piece(cache, scales, row_here + row, R + 8 * column);
                unsigned char* to =
                    rope + ((long long)(at / TILE) * PS + column / 8) * TILE * SLAB_ROW;
                *reinterpret_cast<uint4*>(to + piece_at(at % TILE, column & 7)) = v;
            }
        }
        return;
    }
    take_registers<232>();
    const int group = (warp >> 2) - 1;  // rows 64 group .. 64 group + 63 of the tile
    const unsigned a = shared_address(latent) + group * (SLAB / 2);
    unsigned char* const out = staged + group * SLAB;
    const int row = 16 * (warp & 3) + (lane & 15);
    const float unboost_k = unboost[0], unboost_v = unboost[1];
    int at = 0, turn = 0;
    for (int item = blockIdx.x; item < used * splits; item += gridDim.x, turn++) {
        const int split = item / used, here = 128 * (item % used) + 64 * group;
        const int first = pairs * split / splits, stop = pairs * (split + 1) / splits;
        for (int pair = first; pair < stop; pair++) {
            float sum[64];
            for (int slab = 0; slab < RS; slab++, at++) {
                const int stage = at % STAGES;
                barrier_wait(full + 8 * stage, at / STAGES & 1);
                if (pair == first) barrier_wait(ready + 8 * slab, turn & 1);
                products_begin();
#pragma unroll
                for (int i = 0; i < 4; i++)
                    multiply(sum, slab_along(a + slab * SLAB + 32 * i),
                             slab_along(weights + stage * SLAB + 32 * i), slab | i);
                products_commit();
                if (slab) {
                    products_wait<1>();
                    if (lane == 0) barrier_arrive(empty + 8 * ((at - 1) % STAGES));
                }
            }
            products_wait<0>();
            hold(sum);
            if (lane == 0) barrier_arrive(empty + 8 * ((at - 1) % STAGES));
            if ((tid & 127) == 0) bulk_stores_read();
            meet(1 + group, 128);
#pragma unroll
            for (int slab = 0; slab < 2; slab++) {
                const float scale = (2 * pair + slab) % (KS + VS) < KS ? unboost_k : unboost_v;
#pragma unroll
                for (int c = 0; c < 8; c += 2) {
                    const float* s = sum + 32 * slab + 4 * c;
                    unsigned pairs[4];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        pairs[i] = pack_halves(s[2 * i] * scale, s[2 * i + 1] * scale);
                    unsigned char* to = out + slab * (SLAB / 2) + piece_at(row, c + (lane >> 4));
                    store_matrices(shared_address(to), pairs[0], pairs[1], pairs[2], pairs[3]);
                }
            }
            publish_shared();
            meet(1 + group, 128);
            if ((tid & 127) == 0) {
                for (int slab = 0; slab < 2; slab++) {
                    const int column = 2 * pair + slab, part = column % (KS + VS);
                    if (column >= n_slabs) break;
                    const long long at =
                        (long long)(column / (KS + VS)) * (n_rows / TILE) + here / TILE;
                    unsigned char* to = values + (at * VS + part - KS) * TILE * SLAB_ROW;
                    if (part < KS) to = keys + (at * KS + part) * TILE * SLAB_ROW;
                    bulk_store(to + here % TILE * SLAB_ROW, shared_address(out + slab * (SLAB / 2)),
                               SLAB / 2);
                }
                bulk_commit();
            }
        }
        if (lane == 0) barrier_arrive(unread);
    }
    if ((tid & 127) == 0) bulk_stores_done();
}
