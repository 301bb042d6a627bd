// Work items of products of up to three weights (Q0, Q1, Q2; -1: none) with one input, TOKENS tokens
// each.
#pragma once
#include "gemm.cuh"

constexpr int TILE_BYTES =
    max_of(StagedTile<Q0>::end, max_of(StagedTile<Q1>::end, StagedTile<Q2>::end));

// One weight and where its product goes.
struct Segment {
    void* y;
    const unsigned char* w;
    int rows, row_tiles, col_tiles, skip;  // row tiles of a batch
    long long ldy, yb;
    __device__ __forceinline__ int items() const { return (rows + GEMM_ROWS - 1) / GEMM_ROWS; }
};

// Absent segments count as the first one's type.
constexpr int T0 = Q0, T1 = Q1 >= 0 ? Q1 : Q0, T2 = Q2 >= 0 ? Q2 : Q0;

// The order of work items: weight rows fastest, then tokens, then batches.
struct Items {
    Segment s0, s1, s2;
    const unsigned short* x;
    long long ldx, xb;
    int n_tokens, cols, batches, n_row_items, n_token_items, n;

    // All but the segments, once these are set.
    __device__ __forceinline__ void set(
            const unsigned short* from, int tokens, int columns, int n_batches, long long row, long long b) {
        x = from, n_tokens = tokens, cols = columns, batches = n_batches, ldx = row, xb = b;
        n_row_items = s0.items() + (Q1 >= 0 ? s1.items() : 0) + (Q2 >= 0 ? s2.items() : 0);
        n_token_items = (tokens + TOKENS - 1) / TOKENS, n = n_row_items * n_token_items * batches;
    }
    __device__ __forceinline__ Segment segment(int i) const {
        if (Q2 >= 0 && i == 2) return s2;
        return Q1 >= 0 && i == 1 ? s1 : s0;
    }
    // The segment of an item, its number of GEMM_ROWS rows there, its tokens' first, its batch.
    __device__ __forceinline__ int where(int item, int& rows, int& token, int& batch) const {
        rows = item % n_row_items, item /= n_row_items;
        token = item % n_token_items * TOKENS, batch = item / n_token_items;
        if (Q1 < 0 || rows < s0.items()) return 0;
        rows -= s0.items();
        if (Q2 < 0 || rows < s1.items()) return 1;
        rows -= s1.items();
        return 2;
    }
    template <int QTYPE>
    __device__ __forceinline__ void set_tiles(
            GemmSource& from, const Segment& s, int rows, int batch) const {
        const int part = PARTS > 1 ? gemm_own_part() : 0;
        const int row_tile = rows * GEMM_TILES + 8 * part + gemm_own_tile();
        from.set_tiles<QTYPE>(s.w, batches * s.row_tiles, s.col_tiles,
                              batch * s.row_tiles + row_tile, s.row_tiles - row_tile);
    }
    __device__ __forceinline__ void open(int item, GemmSource& from) const {
        int rows, token, batch;
        const int i = where(item, rows, token, batch);
        const Segment s = segment(i);
        if (T1 != T0 && i == 1) set_tiles<T1>(from, s, rows, batch);
        else if (T2 != T0 && i == 2) set_tiles<T2>(from, s, rows, batch);
        else set_tiles<T0>(from, s, rows, batch);
        from.set_x(x + batch * xb + token * ldx, min(n_tokens - token, TOKENS), s.col_tiles, s.skip,
                   cols, [&](int t) { return t * ldx; });
    }
};
