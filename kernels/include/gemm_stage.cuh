// The stages of gemm.cuh's ring: what lies in one, and how threads copy it there.
//
// A stage holds 64 columns: activations [MOST tokens][64] float16, 128-byte swizzle, and the packed
// bytes of GEMM_TILES row tiles. With wgmma a third warpgroup copies; without, all warps do.
// Sources: own.
#pragma once
#include "mma.cuh"
#include "tiles.cuh"
#include "warpgroup.cuh"

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
#endif

// The ring's start in dynamic shared memory: the next multiple of 1024, which the swizzle needs.
__device__ __forceinline__ unsigned char* ring_of(void* shared) {
    return (unsigned char*)shared + (1024 - ((unsigned)__cvta_generic_to_shared(shared) & 1023) & 1023);
}

__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

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
