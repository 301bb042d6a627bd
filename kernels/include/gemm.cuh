// Products of tiled weights with many tokens: a ring of stages in shared memory that runs ahead of
// the tensor cores, and the loop over it.
//
// Two warpgroups take 256 weight rows (GEMM_ROWS) and up to MOST tokens. Warp w has two row tiles:
// part 0 is row tile w, part 1 row tile 8 + w (or row tile w of a second weight: gate and up); with
// PARTS 1 there is no part 1, and 128 rows. A stage holds 64 columns: activations [MOST tokens][64]
// float16, 128-byte swizzle, and the packed bytes of the row tiles. While the tensor cores work on one
// part of a warp's rows (PARTS 1: on the stage before), the warp unpacks the other. CTAS fit an SM:
// with two, one computes while the other waits, and the next kernel's can start beside the last ones. With wgmma a third warpgroup copies; without, all warps copy, a barrier per stage. The ring
// knows nothing of work items' borders: the next item arrives while this item's results are stored.
// Sources: A from registers, unpacked in between, and a copying warpgroup with few registers as in
// CUTLASS's mixed-input kernels; own.
#pragma once
#include "mma.cuh"
#include "pdl.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

#ifndef MOST
#define MOST 128
#endif
#ifndef PARTS
#define PARTS 2
#endif
#ifndef CTAS
#define CTAS 1
#endif

constexpr int GEMM_TILES = 8 * PARTS, GEMM_ROWS = 16 * GEMM_TILES, GEMM_TOKENS = MOST;
constexpr int GEMM_X_BYTES = GEMM_TOKENS * 128;  // of a stage
#ifdef WGMMA
constexpr int GEMM_THREADS = 384, GEMM_COPIERS = 128, GEMM_FIRST_COPIER = 256;
constexpr int GEMM_AHEAD = STAGES > 3 ? STAGES - 3 : 0;  // stages whose copies are under way
#else
constexpr int GEMM_THREADS = 256, GEMM_COPIERS = 256, GEMM_FIRST_COPIER = 0;
constexpr int GEMM_AHEAD = STAGES - 1;
#endif
constexpr int GEMM_PASS = GEMM_COPIERS / 8;  // tokens of which all threads copy a piece each
constexpr int GEMM_OWN_TOKENS = (GEMM_TOKENS + GEMM_PASS - 1) / GEMM_PASS;  // that a thread has pieces of
constexpr int GEMM_OWN_TILES = GEMM_TILES * 32 / GEMM_COPIERS;   // that a warp copies

// ---------------------------------------------------------------- device helpers ------------
#ifdef SIMT
typedef unsigned char* SharedAt;
__device__ __forceinline__ SharedAt shared_at(unsigned char* p) { return p; }
template <class Pointer>
__device__ __forceinline__ void keep(Pointer&) {}
__device__ __forceinline__ void copy16(SharedAt to, int offset, const void* from, bool valid = true) {
    cp_async16(to + offset, from, valid);
}
// The transpose of an 8 x 8 matrix of 16-bit values held as an mma fragment.
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
typedef unsigned SharedAt;
__device__ __forceinline__ SharedAt shared_at(unsigned char* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
// The compiler takes the pointer as it is and doesn't build it anew from others.
__device__ __forceinline__ void keep(SharedAt& at) { asm volatile("" : "+r"(at)); }
__device__ __forceinline__ void keep(const unsigned char*& p) { asm volatile("" : "+l"(p)); }
// cp_async16 to a shared address and an offset, a constant once unrolled.
__device__ __forceinline__ void copy16(SharedAt to, int offset, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to + offset), "l"(from) : "memory");
}
__device__ __forceinline__ void copy16(SharedAt to, int offset, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to + offset), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}
#endif

// The ring's start in dynamic shared memory: the next multiple of 1024, which the swizzle needs.
__device__ __forceinline__ unsigned char* ring_of(void* shared) {
    return (unsigned char*)shared + (1024 - ((unsigned)__cvta_generic_to_shared(shared) & 1023) & 1023);
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }
__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

// float16 of lo and hi, the largest finite number instead of infinity.
__device__ __forceinline__ unsigned saturated_half2(float lo, float hi) {
    return half2_of(fminf(fmaxf(lo, -65504.f), 65504.f), fminf(fmaxf(hi, -65504.f), 65504.f));
}

// Where a row tile's packed bytes lie in a stage: q, then s, m, d, h.
template <int QTYPE>
struct StagedTile {
    using T = Tile<QTYPE>;
    static constexpr int s = T::q_bytes, m = s + T::s_bytes, d = m + T::m_bytes, h = d + T::d_bytes;
    static constexpr int end = h + T::h_bytes;
};

template <> struct StagedTile<-1> {
    static constexpr int end = 0;
};

__device__ __forceinline__ int gemm_copier() { return threadIdx.x - GEMM_FIRST_COPIER; }
// The part that this thread's warp copies, and its first row tile there.
__device__ __forceinline__ int gemm_own_part() { return gemm_copier() >= GEMM_COPIERS / 2; }
__device__ __forceinline__ int gemm_own_tile() {
    return (gemm_copier() >> 5) * GEMM_OWN_TILES & 7;
}

// A thread's part of copying a work item, as addresses in its next stage: a copy's address registers
// are busy for a while, so none is used for two copies of a stage. Its pieces are
//   x: 16 bytes of tokens copier / 8 + GEMM_PASS * i
//   q: 16 bytes of each 512 of its warp's row tiles; side: at most 16 bytes of the rest of them
struct GemmSource {
    const unsigned char *x[GEMM_OWN_TOKENS], *q[GEMM_OWN_TILES], *side[GEMM_OWN_TILES];
    int tokens, tiles;                   // how many of them there are
    int q_bytes, side_bytes, side_mask;  // side goes on every stage, or every fourth: mask 3
    int first, steps;                    // stages: from the first on, before `steps`
    int column, cols;                    // this thread's column of x; columns of x

    // The first `n` (at least 1, a multiple of GEMM_PASS is copied) tokens: offset(t) is token t's
    // first element in x, in which the packed columns begin `skip` before the first.
    template <class Offset>
    __device__ __forceinline__ void set_x(
            const unsigned short* from, int n, int n_steps, int skip, int n_cols, Offset offset) {
        column = 8 * (gemm_copier() & 7) - skip, cols = n_cols, first = 0, steps = n_steps;
        tokens = (n + GEMM_PASS - 1) / GEMM_PASS;
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TOKENS; i++) {
            const int t = min((gemm_copier() >> 3) + GEMM_PASS * i, n - 1);
            x[i] = (const unsigned char*)(from + offset(t) + column);
        }
    }

    // Row tiles from row_tile on, the first n of them (none may be there).
    template <int QTYPE>
    __device__ __forceinline__ void set_tiles(
            const unsigned char* w, int n_row_tiles, int n_col_tiles, int row_tile, int n) {
        using T = Tile<QTYPE>;
        using In = StagedTile<QTYPE>;
        const TileView<QTYPE> v = tile_view<QTYPE>(w, n_row_tiles, n_col_tiles);
        const int lane = threadIdx.x & 31, first_side = T::thin ? 0 : T::q_bytes;
        const int at = first_side + 16 * lane;  // place of side in the stage
        tiles = min(n, GEMM_OWN_TILES), q_bytes = first_side, side_bytes = 0, side_mask = 0;
        const unsigned char* plane = nullptr;
        if (T::thin && at < In::s) plane = v.q + at, side_bytes = T::q_bytes;  // all of it is side
        else if (at < In::m) plane = v.s + (at - In::s), side_bytes = T::s_bytes;
        else if (at < In::d) plane = v.m + (at - In::m), side_bytes = T::m_bytes;
        else if (at < In::h) plane = v.d + (at - In::d), side_bytes = T::d_bytes, side_mask = 3;
        else if (at < In::end) plane = v.h + (at - In::h), side_bytes = T::h_bytes;
        const int side_tiles = n_col_tiles >> (side_mask ? 2 : 0);
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TILES; i++) {
            q[i] = v.q + (long long)(row_tile + i) * n_col_tiles * T::q_bytes + 16 * lane;
            side[i] = plane + (long long)(row_tile + i) * side_tiles * side_bytes;
        }
    }

    // Stages from..to - 1 alone, once all is set.
    __device__ __forceinline__ void narrow(int from, int to) {
        first = from, steps = to, column += 64 * from;
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TOKENS; i++) x[i] += 128 * from;
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TILES; i++)
            q[i] += from * q_bytes, side[i] += (side_mask ? from >> 2 : from) * side_bytes;
    }
};

// Whether a stage has room for this thread's token of pass i.
__device__ __forceinline__ bool own_token(int i) {
    return GEMM_TOKENS % GEMM_PASS == 0 || (gemm_copier() >> 3) + GEMM_PASS * i < GEMM_TOKENS;
}

// This thread's part of copying the next stage of `from`. Row tiles and tokens that aren't there leave
// what was there: it reaches only results that nobody stores.
__device__ __forceinline__ void copy_tokens(unsigned char* ring, int slot, GemmSource& from) {
    const int piece = gemm_copier() & 7, token = gemm_copier() >> 3, first = from.column - 8 * piece;
    SharedAt to = shared_at(ring + slot * GEMM_X_BYTES + token * 128 + ((piece ^ (token & 7)) << 4));
    keep(to);
    if (first >= 0 && first + 64 <= from.cols) {
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TOKENS; i++)
            if (i < from.tokens && own_token(i)) copy16(to, i * (GEMM_COPIERS * 16), from.x[i]);
    } else {  // zeros outside of x
        const bool valid = from.column >= 0 && from.column < from.cols;
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TOKENS; i++)
            if (i < from.tokens && own_token(i)) copy16(to, i * (GEMM_COPIERS * 16), from.x[i], valid);
    }
    from.column += 64;
#pragma unroll
    for (int i = 0; i < GEMM_OWN_TOKENS; i++) from.x[i] += 128, keep(from.x[i]);
}

// The same of weights; `step` is the stage's number.
template <int TILE_BYTES>
__device__ __forceinline__ void copy_weights(unsigned char* ring, int slot, GemmSource& from, int step) {
    SharedAt to = shared_at(ring + STAGES * GEMM_X_BYTES + 16 * (threadIdx.x & 31) +
                            (slot * GEMM_TILES + (gemm_copier() >> 5) * GEMM_OWN_TILES) * TILE_BYTES);
    SharedAt to_side = to + from.q_bytes;
    keep(to), keep(to_side);
    const int more = (step & from.side_mask) == from.side_mask ? from.side_bytes : 0;
#pragma unroll
    for (int i = 0; i < GEMM_OWN_TILES; i++) {
#pragma unroll
        for (int u = 0; u < 4; u++)
            if (512 * u < from.q_bytes && i < from.tiles)
                copy16(to, i * TILE_BYTES + 512 * u, from.q[i] + 512 * u);
        if (from.side_bytes && i < from.tiles) copy16(to_side, i * TILE_BYTES, from.side[i]);
        from.q[i] += from.q_bytes, from.side[i] += more;
        keep(from.q[i]), keep(from.side[i]);
    }
}

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
    unsigned long long b[4];
#pragma unroll
    for (int j = 0; j < 4; j++) b[j] = wgmma_descriptor(x, 32 * j);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma_f16<N>(d, a[j], b[j], accumulate || j > 0);
    wgmma_commit();
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
            barrier_init(full + threadIdx.x, GEMM_COPIERS);
            barrier_init(free + threadIdx.x, GEMM_FIRST_COPIER / 32);
        }
        wgmma_publish();
        __syncthreads();
    }

    // Runs the copying warpgroup, which then has nothing more to do: true.
    __device__ __forceinline__ bool copies() {
        if (threadIdx.x < GEMM_FIRST_COPIER) {
            registers_up<CTAS == 1 ? 216 : 96>();
            return false;
        }
        registers_down<CTAS == 1 ? 72 : 48>();
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
                barrier_wait(free + to, wanted);
                copy_tokens(ring, to, from);
                if (!EARLY || step >= early) copy_weights<TILE_BYTES>(ring, to, from, step);
                cp_async_commit();
                if (++to == STAGES) to = 0, wanted ^= 1;
                if (n < GEMM_AHEAD) {
                    n++;
                    continue;
                }
                cp_async_wait<GEMM_AHEAD>();
                wgmma_publish();
                barrier_arrive(full + ready);
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
                wgmma_publish();
                barrier_arrive(full + ready);
                ready = ready + 1 == STAGES ? 0 : ready + 1;
            }
            drain<LEFT - 1>(n, ready);
        }
    }

    // Both parts of one item: d0, d1 as in wgmma.cuh, for N tokens.
    template <int QTYPE0, int QTYPE1, int N>
    __device__ __forceinline__ void multiply(
            int steps, float boost0, float boost1, float (&d0)[N / 2], float (&d1)[N / 2]) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        unsigned a0[4][4], a1[4][4];
        int before = at;  // slot of the stage before
#pragma unroll 1
        for (int k = 0; k < steps; k++) {
            barrier_wait(full + at, phase);
            const unsigned char* x = ring + at * GEMM_X_BYTES;
            const unsigned char* tile =
                ring + STAGES * GEMM_X_BYTES + (at * GEMM_TILES + warp) * TILE_BYTES;
            wgmma_wait<1>();  // a0 is free
            unpack_tile<QTYPE0>(load_staged<QTYPE0>(tile), boost0, a0);
            multiply_stage<N>(d0, a0, x, k > 0);
            wgmma_wait<1>();  // a1 is free, and the stage before; loads wait so that products go first
            if (k > 0 && lane == 0) barrier_arrive(free + before);
            unpack_tile<QTYPE1>(load_staged<QTYPE1>(tile + GEMM_TILES / 2 * TILE_BYTES), boost1, a1);
            multiply_stage<N>(d1, a1, x, k > 0);
            before = at;
            if (++at == STAGES) at = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(free + before);
        wgmma_hold(d0), wgmma_hold(d1);
    }

    // The only part.
    template <int QTYPE, int N>
    __device__ __forceinline__ void multiply(int steps, float boost, float (&d)[N / 2]) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        unsigned a[2][4][4];
        int before = 0;  // slot of the stage before
        auto stage = [&](int k, unsigned (&own)[4][4]) {
            barrier_wait(full + at, phase);
            const unsigned char* tile =
                ring + STAGES * GEMM_X_BYTES + (at * GEMM_TILES + warp) * TILE_BYTES;
            unpack_tile<QTYPE>(load_staged<QTYPE>(tile), boost, own);
            multiply_stage<N>(d, own, ring + at * GEMM_X_BYTES, k > 0);
            wgmma_wait<1>();  // the stage before and its fragments are free
            if (k > 0 && lane == 0) barrier_arrive(free + before);
            before = at;
            if (++at == STAGES) at = 0, phase ^= 1;
        };
        int k = 0;
#pragma unroll 1
        for (; k + 1 < steps; k += 2) stage(k, a[0]), stage(k + 1, a[1]);
        if (k < steps) stage(k, a[0]);
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(free + before);
        wgmma_hold(d);
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

// Row of part p's registers d[.., 0, 1] in the 128 rows of a part; d[.., 2, 3] are 8 further down.
__device__ __forceinline__ int gemm_row() { return (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7); }
// Token of registers d[4 j], d[4 j + 2] is 8 j + this; d[4 j + 1], d[4 j + 3] the next.
__device__ __forceinline__ int gemm_token() { return 2 * (threadIdx.x & 3); }
