// Products of tiled weights with many tokens: a ring of stages in shared memory that runs ahead of
// the tensor cores, and the loop over it.
//
// Two warpgroups take 256 weight rows (GEMM_ROWS) and up to MOST tokens. Warp w has two row tiles:
// part 0 is row tile w, part 1 row tile 8 + w (or row tile w of a second weight: gate and up); with
// PARTS 1 there is no part 1, and 128 rows. While the tensor cores work on one part of a warp's rows
// (PARTS 1: on the stage before), the warp unpacks the other. CTAS fit an SM: with two, one computes
// while the other waits, and the next kernel's can start beside the last ones. With wgmma a third
// warpgroup copies; without, all warps copy, a barrier per stage. The ring knows nothing of work
// items' borders: the next item arrives while this item's results are stored.
// Sources: A from registers, unpacked in between, and a copying warpgroup with few registers as in
// CUTLASS's mixed-input kernels; own.
#pragma once
#include "gemm_stage.cuh"
#include "mma.cuh"
#include "pdl.cuh"
#include "tiles.cuh"
#include "warpgroup.cuh"
#ifdef WGMMA
#include "bulk_copy.cuh"
#endif

// A lane's part of a row tile of a stage.
template <int QTYPE>
__device__ __forceinline__ TileData<QTYPE> load_staged(const unsigned char* staged) {
    using In = StagedTile<QTYPE>;
    const int lane = threadIdx.x & 31;
    TileData<QTYPE> w;
    load_numbers<QTYPE, false>(staged, staged + In::h, lane, w);
    load_scales<QTYPE, false>(staged + In::s, staged + In::m, lane, w);
    load_block_scales<QTYPE, false>(staged + In::d, lane, w);
    return w;
}

// It as boosted float16 fragments of its four steps.
template <int QTYPE>
__device__ __forceinline__ void unpack_tile(
        const TileData<QTYPE>& w, float boost, unsigned (&a)[4][4]) {
    HalfScales scales;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j % Tile<QTYPE>::steps == 0)
            scales = half_scales<QTYPE>(w, j / Tile<QTYPE>::steps, boost);
        scaled_fragment<QTYPE>(w, j, scales, a[j]);
    }
}

// d (+)= a x^T over the 64 columns of a stage; with wgmma it runs until it is waited for.
template <int N>
__device__ __forceinline__ void multiply_stage(
        float (&d)[N / 2], unsigned (&a)[4][4], const unsigned char* x, bool accumulate) {
#ifdef WGMMA
    Slab b[4];
#pragma unroll
    for (int j = 0; j < 4; j++) b[j] = slab_along(x, 32 * j);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(d, a[j], b[j], accumulate || j > 0);
    products_commit();
#else
    const int lane = threadIdx.x & 31;
    if (!accumulate)
#pragma unroll
        for (int i = 0; i < N / 2; i++) d[i] = 0.f;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            // matrices: tokens n .. n + 7 at both halves of the 16 columns, then tokens n + 8 ..
            const int token = n + (lane & 7) + (lane >> 4 << 3), piece = 2 * j + (lane >> 3 & 1);
            unsigned b[4];
            ldmatrix(b, x + token * 128 + ((piece ^ (token & 7)) << 4));
#pragma unroll
            for (int i = 0; i < 2 && n + 8 * i < N; i++) {
                const unsigned b_block[2] = {b[2 * i], b[2 * i + 1]};
                mma_f16(reinterpret_cast<float(&)[4]>(d[n / 2 + 4 * i]), a[j], b_block);
            }
        }
#endif
}

// The ring. Items is the kernel's: n items of this grid, open(item, GemmSource&). EARLY, for one item a
// CTA: the copying warpgroup, if there is one, asks for weights before it waits for the kernel before.
template <class Items, int TILE_BYTES, bool EARLY = false>
struct Gemm {
    const Items& items;
    unsigned char* ring;
    int at = 0;  // slot read next
#ifdef WGMMA
    // full[slot]: the copies are there; free[slot]: both warpgroups are done with them.
    unsigned long long *full, *free;
    unsigned phase = 0;  // of full[at]

    __device__ __forceinline__ Gemm(const Items& items, void* shared)
        : items(items), ring(ring_of(shared)) {
        full = (unsigned long long*)(ring + STAGES * (GEMM_X_BYTES + GEMM_TILES * TILE_BYTES));
        free = full + STAGES;
        if (threadIdx.x < STAGES) {
            barrier_init(shared_address(full + threadIdx.x), GEMM_COPIERS);
            barrier_init(shared_address(free + threadIdx.x), GEMM_FIRST_COPIER / 32);
        }
        publish_shared();
        __syncthreads();
    }

    // Runs the copying warpgroup, which then has nothing more to do: true.
    __device__ __forceinline__ bool copies() {
        if (threadIdx.x < GEMM_FIRST_COPIER) {
            take_registers<CTAS == 1 ? 216 : 96>();
            return false;
        }
        give_registers<CTAS == 1 ? 72 : 48>();
        int to = 0, ready = 0, n = 0;  // slot copied to; slot that is full next; stages under way
        unsigned wanted = 1;           // phase of free[to]: at first all are free
        for (int item = blockIdx.x; item < items.n; item += gridDim.x) {
            GemmSource from;
            items.open(item, from);
            int early = from.first;
            if (EARLY) {
                for (; early < min(from.steps, from.first + STAGES); early++)
                    copy_weights<TILE_BYTES>(ring, early - from.first, from, early);
                pdl_wait();
            }
#pragma unroll 1
            for (int step = from.first; step < from.steps; step++) {
                barrier_wait(shared_address(free + to), wanted);
                copy_tokens(ring, to, from);
                if (!EARLY || step >= early) copy_weights<TILE_BYTES>(ring, to, from, step);
                cp_async_commit();
                if (++to == STAGES) to = 0, wanted ^= 1;
                if (n < GEMM_AHEAD) {
                    n++;
                    continue;
                }
                cp_async_wait<GEMM_AHEAD>();
                publish_shared();
                barrier_arrive(shared_address(full + ready));
                ready = ready + 1 == STAGES ? 0 : ready + 1;
            }
        }
        drain<GEMM_AHEAD - 1>(n, ready);
        return true;
    }

    // The last n stages, one by one; LEFT of them may be under way after the first.
    template <int LEFT>
    __device__ __forceinline__ void drain(int n, int ready) {
        if constexpr (LEFT >= 0) {
            if (n > LEFT) {
                cp_async_wait<LEFT>();
                publish_shared();
                barrier_arrive(shared_address(full + ready));
                ready = ready + 1 == STAGES ? 0 : ready + 1;
            }
            drain<LEFT - 1>(n, ready);
        }
    }

    // Both parts of one item: d0, d1 as in warpgroup.cuh, for N tokens.
    template <int QTYPE0, int QTYPE1, int N>
    __device__ __forceinline__ void multiply(
            int steps, float boost0, float boost1, float (&d0)[N / 2], float (&d1)[N / 2]) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        unsigned a0[4][4], a1[4][4];
        int before = at;  // slot of the stage before
#pragma unroll 1
        for (int k = 0; k < steps; k++) {
            barrier_wait(shared_address(full + at), phase);
            const unsigned char* x = ring + at * GEMM_X_BYTES;
            const unsigned char* tile =
                ring + STAGES * GEMM_X_BYTES + (at * GEMM_TILES + warp) * TILE_BYTES;
            products_wait<1>();  // a0 is free
            unpack_tile<QTYPE0>(load_staged<QTYPE0>(tile), boost0, a0);
            multiply_stage<N>(d0, a0, x, k > 0);
            products_wait<1>();  // a1 is free, and the stage before; loads wait so that products go first
            if (k > 0 && lane == 0) barrier_arrive(shared_address(free + before));
            unpack_tile<QTYPE1>(load_staged<QTYPE1>(tile + GEMM_TILES / 2 * TILE_BYTES), boost1, a1);
            multiply_stage<N>(d1, a1, x, k > 0);
            before = at;
            if (++at == STAGES) at = 0, phase ^= 1;
        }
        products_wait<0>();
        if (lane == 0) barrier_arrive(shared_address(free + before));
        hold(d0), hold(d1);
    }

    // The only part.
    template <int QTYPE, int N>
    __device__ __forceinline__ void multiply(int steps, float boost, float (&d)[N / 2]) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        unsigned a[2][4][4];
        int before = 0;  // slot of the stage before
        auto stage = [&](int k, unsigned (&own)[4][4]) {
            barrier_wait(shared_address(full + at), phase);
            const unsigned char* tile =
                ring + STAGES * GEMM_X_BYTES + (at * GEMM_TILES + warp) * TILE_BYTES;
            unpack_tile<QTYPE>(load_staged<QTYPE>(tile), boost, own);
            multiply_stage<N>(d, own, ring + at * GEMM_X_BYTES, k > 0);
            products_wait<1>();  // the stage before and its fragments are free
            if (k > 0 && lane == 0) barrier_arrive(shared_address(free + before));
            before = at;
            if (++at == STAGES) at = 0, phase ^= 1;
        };
        int k = 0;
#pragma unroll 1
        for (; k + 1 < steps; k += 2) stage(k, a[0]), stage(k + 1, a[1]);
        if (k < steps) stage(k, a[0]);
        products_wait<0>();
        if (lane == 0) barrier_arrive(shared_address(free + before));
        hold(d);
    }
#else
    GemmSource from;     // of the item that is being copied
    int item, step, to;  // that item, its stage; slot copied to

    __device__ __forceinline__ Gemm(const Items& items, void* shared)
        : items(items), ring(ring_of(shared)), item(blockIdx.x), step(0), to(0) {
        if (item < items.n) items.open(item, from), step = from.first;
        for (int i = 0; i < GEMM_AHEAD; i++) copy_next();
    }

    __device__ __forceinline__ bool copies() { return false; }

    __device__ __forceinline__ void copy_next() {
        if (item < items.n) {
            copy_tokens(ring, to, from);
            copy_weights<TILE_BYTES>(ring, to, from, step);
            to = to + 1 == STAGES ? 0 : to + 1;
            if (++step == from.steps) {
                item += gridDim.x;
                if (item < items.n) items.open(item, from), step = from.first;
            }
        }
        cp_async_commit();
    }

    template <int QTYPE0, int QTYPE1, int N>
    __device__ __forceinline__ void multiply(
            int steps, float boost0, float boost1, float (&d0)[N / 2], float (&d1)[N / 2]) {
        unsigned a[4][4];
#pragma unroll 1
        for (int k = 0; k < steps; k++) {
            cp_async_wait<GEMM_AHEAD - 1>();
            __syncthreads();
            copy_next();  // into the slot of the stage before, which all are done with
            const unsigned char* x = ring + at * GEMM_X_BYTES;
            const unsigned char* tile = ring + STAGES * GEMM_X_BYTES +
                                        (at * GEMM_TILES + (threadIdx.x >> 5)) * TILE_BYTES;
            at = at + 1 == STAGES ? 0 : at + 1;
            unpack_tile<QTYPE0>(load_staged<QTYPE0>(tile), boost0, a);
            multiply_stage<N>(d0, a, x, k > 0);
            unpack_tile<QTYPE1>(load_staged<QTYPE1>(tile + GEMM_TILES / 2 * TILE_BYTES), boost1, a);
            multiply_stage<N>(d1, a, x, k > 0);
        }
    }

    template <int QTYPE, int N>
    __device__ __forceinline__ void multiply(int steps, float boost, float (&d)[N / 2]) {
        unsigned a[4][4];
#pragma unroll 1
        for (int k = 0; k < steps; k++) {
            cp_async_wait<GEMM_AHEAD - 1>();
            __syncthreads();
            copy_next();
            const unsigned char* tile = ring + STAGES * GEMM_X_BYTES +
                                        (at * GEMM_TILES + (threadIdx.x >> 5)) * TILE_BYTES;
            unpack_tile<QTYPE>(load_staged<QTYPE>(tile), boost, a);
            multiply_stage<N>(d, a, ring + at * GEMM_X_BYTES, k > 0);
            at = at + 1 == STAGES ? 0 : at + 1;
        }
    }
#endif
};

// A barrier of the computing threads: the copying ones may have left.
__device__ __forceinline__ void gemm_sync() {
#ifdef WGMMA
    asm volatile("bar.sync 1, %0;" ::"n"(GEMM_FIRST_COPIER) : "memory");
#else
    __syncthreads();
#endif
}

// ---------------------------------------------------------------- results -------------------
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// float16 of lo and hi, the largest finite number instead of infinity.
__device__ __forceinline__ unsigned saturated_half2(float lo, float hi) {
    return half2_of(fminf(fmaxf(lo, -65504.f), 65504.f), fminf(fmaxf(hi, -65504.f), 65504.f));
}

// The transpose of an 8 x 8 matrix of 16-bit values held as an mma fragment.
#ifdef SIMT
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned out;
    simt::collective(&pair, [&](std::vector<void*>& s) {
        const int g = simt::lane() / 4, t = simt::lane() % 4;
        auto at = [&](int i, int j) { return *(unsigned*)s[4 * i + j / 2] >> 16 * (j & 1) & 0xFFFF; };
        out = at(2 * t, g) | at(2 * t + 1, g) << 16;
    });
    return out;
}
#else
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}
#endif

// Row of part p's registers d[.., 0, 1] in the 128 rows of a part; d[.., 2, 3] are 8 further down.
__device__ __forceinline__ int gemm_row() { return (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7); }
// Token of registers d[4 j], d[4 j + 2] is 8 j + this; d[4 j + 1], d[4 j + 3] the next.
__device__ __forceinline__ int gemm_token() { return 2 * (threadIdx.x & 3); }
