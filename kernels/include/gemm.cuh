// Products of tiled weights with many tokens: a ring of stages in shared memory that runs ahead of
// the tensor cores, and the loop over it.
//
// Two warpgroups take 256 weight rows (GEMM_ROWS) and up to 128 tokens. Warp w has two row tiles:
// part 0 is row tile w, part 1 row tile 8 + w (or row tile w of a second weight: gate and up). A
// stage holds 64 columns: activations [128 tokens][64] float16, 128-byte swizzle, and the packed bytes
// of 16 row tiles. While the tensor cores work on one part of a warp's rows, the warp unpacks the
// other. With wgmma a third warpgroup copies; without, all warps copy, a barrier per stage. The ring
// knows nothing of work items' borders: the next item arrives while this item's results are stored.
// Sources: A from registers, unpacked in between, and a copying warpgroup with few registers as in
// CUTLASS's mixed-input kernels; own.
#pragma once
#include "mma.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

constexpr int GEMM_ROWS = 256, GEMM_TOKENS = 128, GEMM_TILES = 16;
constexpr int GEMM_X_BYTES = GEMM_TOKENS * 128;  // of a stage
#ifdef WGMMA
constexpr int GEMM_THREADS = 384, GEMM_COPIERS = 128, GEMM_FIRST_COPIER = 256;
#else
constexpr int GEMM_THREADS = 256, GEMM_COPIERS = 256, GEMM_FIRST_COPIER = 0;
constexpr int GEMM_AHEAD = STAGES - 1;  // stages whose copies are under way
#endif
constexpr int GEMM_OWN_TOKENS = GEMM_TOKENS * 8 / GEMM_COPIERS;  // that a thread copies pieces of
constexpr int GEMM_OWN_TILES = GEMM_TILES * 32 / GEMM_COPIERS;   // that a warp copies

// ---------------------------------------------------------------- device helpers ------------
#ifdef SIMT
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

// A lane's part of copying neighbouring row tiles of a weight: 512-byte rounds of q, one 16-byte
// piece of the rest.
struct TileSource {
    const unsigned char *q, *side;                      // of the first; side null: nothing
    int q_stride, side_stride, n;                       // to the next row tile; how many there are
    int q_bytes, side_bytes, side_shift;  // side of column tile k: (k >> side_shift) * side_bytes
};

// Row tiles from row_tile on, the first n of them; none may be there.
template <int QTYPE>
__device__ __forceinline__ TileSource tile_source(
        const unsigned char* w, int n_row_tiles, int n_col_tiles, int row_tile, int n) {
    using T = Tile<QTYPE>;
    using In = StagedTile<QTYPE>;
    const TileView<QTYPE> v = tile_view<QTYPE>(w, n_row_tiles, n_col_tiles);
    const long long at = (long long)row_tile * n_col_tiles;
    const int lane = threadIdx.x & 31, side = T::q_bytes + 16 * lane;  // place of the piece in the stage
    TileSource from{v.q + at * T::q_bytes + 16 * lane, nullptr, n_col_tiles * T::q_bytes, 0,
                    min(n, GEMM_OWN_TILES), T::q_bytes, 0, 0};
    if (side < In::m)
        from.side = v.s + at * T::s_bytes + (side - In::s), from.side_bytes = T::s_bytes;
    else if (side < In::d)
        from.side = v.m + at * T::m_bytes + (side - In::m), from.side_bytes = T::m_bytes;
    else if (side < In::h)
        from.side = v.d + (at >> 2) * T::d_bytes + (side - In::d), from.side_bytes = T::d_bytes,
        from.side_shift = 2;
    else if (side < In::end)
        from.side = v.h + at * T::h_bytes + (side - In::h), from.side_bytes = T::h_bytes;
    from.side_stride = (n_col_tiles >> from.side_shift) * from.side_bytes;
    return from;
}

// What a thread copies for one work item.
struct GemmSource {
    TileSource tiles;
    const unsigned short* x;
    int row[GEMM_OWN_TOKENS];  // of tokens gemm_own_token(i): 8 elements each, negative: none
    int steps, skip, cols;     // stages; packed column of x's first; x's columns
};

__device__ __forceinline__ int gemm_copier() { return threadIdx.x - GEMM_FIRST_COPIER; }
__device__ __forceinline__ int gemm_own_token(int i) {
    return (gemm_copier() >> 3) + GEMM_COPIERS / 8 * i;
}
// The part that this thread's warp copies, and its first row tile there.
__device__ __forceinline__ int gemm_own_part() { return gemm_copier() >= GEMM_COPIERS / 2; }
__device__ __forceinline__ int gemm_own_tile() {
    return (gemm_copier() >> 5) * GEMM_OWN_TILES & (GEMM_TILES / 2 - 1);
}

// Rows of tokens first .. (n in all) of x, `tokens` of them at most.
__device__ __forceinline__ void set_tokens(GemmSource& from, int first, int n, int tokens, long long ldx) {
#pragma unroll
    for (int i = 0; i < GEMM_OWN_TOKENS; i++) {
        const int t = gemm_own_token(i);
        from.row[i] = t < tokens && first + t < n ? (int)((first + t) * ldx >> 3) : -1;
    }
}

// The part of one stage's copies that is this thread's. Row tiles and tokens that aren't there leave
// what was there: it reaches only results that nobody stores.
template <int TILE_BYTES>
__device__ __forceinline__ void copy_stage(
        unsigned char* ring, int slot, const GemmSource& from, int step) {
    const int piece = gemm_copier() & 7, token = gemm_copier() >> 3;
    const int first = 64 * step - from.skip, column = first + 8 * piece;
    const unsigned short* x = from.x + column;
    unsigned char* to = ring + slot * GEMM_X_BYTES + token * 128 + ((piece ^ (token & 7)) << 4);
    if (first >= 0 && first + 64 <= from.cols) {
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TOKENS; i++)
            if (from.row[i] >= 0) cp_async16(to + i * (GEMM_COPIERS * 16), x + 8LL * from.row[i]);
    } else {  // zeros outside of x
        const bool valid = column >= 0 && column < from.cols;
#pragma unroll
        for (int i = 0; i < GEMM_OWN_TOKENS; i++)
            if (from.row[i] >= 0)
                cp_async16(to + i * (GEMM_COPIERS * 16), valid ? x + 8LL * from.row[i] : from.x, valid);
    }
    to = ring + STAGES * GEMM_X_BYTES + 16 * (threadIdx.x & 31) +
         (slot * GEMM_TILES + (gemm_copier() >> 5) * GEMM_OWN_TILES) * TILE_BYTES;
    const TileSource& tiles = from.tiles;
    const unsigned char* q = tiles.q + (long long)step * tiles.q_bytes;
    const unsigned char* side = tiles.side + (long long)(step >> tiles.side_shift) * tiles.side_bytes;
#pragma unroll
    for (int i = 0; i < GEMM_OWN_TILES; i++) {
        if (i >= tiles.n) break;
#pragma unroll
        for (int u = 0; u < 4; u++)
            if (512 * u < tiles.q_bytes) cp_async16(to + 512 * u, q + 512 * u);
        if (tiles.side) cp_async16(to + tiles.q_bytes, side);
        q += tiles.q_stride, side += tiles.side_stride, to += TILE_BYTES;
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
    const unsigned long long b = wgmma_descriptor(x);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma_f16<N>(d, a[j], b + 2 * j, accumulate || j > 0);
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
            for (int i = 0; i < 2; i++) {
                const unsigned b_block[2] = {b[2 * i], b[2 * i + 1]};
                mma_f16(reinterpret_cast<float(&)[4]>(d[n / 2 + 4 * i]), a[j], b_block);
            }
        }
#endif
}

// The ring. Items is the kernel's: n items of this grid, open(item, GemmSource&).
template <class Items, int TILE_BYTES>
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
            registers_up<232>();
            return false;
        }
        registers_down<40>();
        int to = 0;           // slot copied to
        unsigned wanted = 1;  // phase of free[to]: at first all are free
        for (int item = blockIdx.x; item < items.n; item += gridDim.x) {
            GemmSource from;
            items.open(item, from);
#pragma unroll 1
            for (int step = 0; step < from.steps; step++) {
                barrier_wait(free + to, wanted);
                copy_stage<TILE_BYTES>(ring, to, from, step);
                barrier_arrive_copied(full + to);
                if (++to == STAGES) to = 0, wanted ^= 1;
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
        return true;
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
            wgmma_publish();  // here, because whoever copies would wait for all its copies
            const unsigned char* x = ring + at * GEMM_X_BYTES;
            const unsigned char* tile =
                ring + STAGES * GEMM_X_BYTES + (at * GEMM_TILES + warp) * TILE_BYTES;
            const TileData<QTYPE0> w0 = load_staged<QTYPE0>(tile);
            wgmma_wait<1>();  // a0 is free
            unpack_tile<QTYPE0>(w0, boost0, a0);
            multiply_stage<N>(d0, a0, x, k > 0);
            const TileData<QTYPE1> w1 = load_staged<QTYPE1>(tile + GEMM_TILES / 2 * TILE_BYTES);
            wgmma_wait<1>();  // a1 is free, and the stage before
            if (k > 0 && lane == 0) barrier_arrive(free + before);
            unpack_tile<QTYPE1>(w1, boost1, a1);
            multiply_stage<N>(d1, a1, x, k > 0);
            before = at;
            if (++at == STAGES) at = 0, phase ^= 1;
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(free + before);
        wgmma_hold(d0), wgmma_hold(d1);
    }
#else
    GemmSource from;     // of the item that is being copied
    int item, step, to;  // that item, its stage; slot copied to

    __device__ __forceinline__ Gemm(const Items& items, void* shared)
        : items(items), ring(ring_of(shared)), item(blockIdx.x), step(0), to(0) {
        if (item < items.n) items.open(item, from);
        for (int i = 0; i < GEMM_AHEAD; i++) copy_next();
    }

    __device__ __forceinline__ bool copies() { return false; }

    __device__ __forceinline__ void copy_next() {
        if (item < items.n) {
            copy_stage<TILE_BYTES>(ring, to, from, step);
            to = to + 1 == STAGES ? 0 : to + 1;
            if (++step == from.steps) {
                step = 0, item += gridDim.x;
                if (item < items.n) items.open(item, from);
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
#endif
};

// Row of part p's registers d[.., 0, 1] in the 128 rows of a part; d[.., 2, 3] are 8 further down.
__device__ __forceinline__ int gemm_row() { return (threadIdx.x >> 5) * 16 + (threadIdx.x >> 2 & 7); }
// Token of registers d[4 j], d[4 j + 2] is 8 j + this; d[4 j + 1], d[4 j + 3] the next.
__device__ __forceinline__ int gemm_token() { return 2 * (threadIdx.x & 3); }
