// Work items of two weights with one input whose products meet: gate (Q0) and up (Q1), GEMM_ROWS / 2
// rows of each and TOKENS tokens.
#pragma once
#include "gemm.cuh"

constexpr int TILE_BYTES = max_of(StagedTile<Q0>::end, StagedTile<Q1>::end);

// Weight rows fastest, then tokens.
struct Items {
    const unsigned char *gate, *up;
    const unsigned short* x;
    long long ldx;
    int row_tiles, col_tiles, n_tokens, cols, skip, n_row_items, n;

    __device__ __forceinline__ void set(
            const unsigned char* first, const unsigned char* second, const unsigned short* from,
            long long stride, int tokens, int rows, int n_row_tiles, int n_col_tiles, int columns,
            int columns_before) {
        gate = first, up = second, x = from, ldx = stride, n_tokens = tokens;
        row_tiles = n_row_tiles, col_tiles = n_col_tiles, cols = columns, skip = columns_before;
        n_row_items = (rows + GEMM_ROWS / 2 - 1) / (GEMM_ROWS / 2);
        n = n_row_items * ((tokens + TOKENS - 1) / TOKENS);
    }
    // An item's first row and token.
    __device__ __forceinline__ int row(int item) const { return item % n_row_items * (GEMM_ROWS / 2); }
    __device__ __forceinline__ int token(int item) const { return item / n_row_items * TOKENS; }

    __device__ __forceinline__ void open(int item, GemmSource& from) const {
        const int own = gemm_own_tile() & (GEMM_TILES / 2 - 1);
        const int row_tile = row(item) / 16 + own, n = row_tiles - row_tile;
        if (Q0 == Q1 || gemm_own_part() == 0)
            from.set_tiles<Q0>(gemm_own_part() ? up : gate, row_tiles, col_tiles, row_tile, n);
        else
            from.set_tiles<Q1>(up, row_tiles, col_tiles, row_tile, n);
        from.set_x(x + token(item) * ldx, min(n_tokens - token(item), TOKENS), col_tiles, skip, cols,
                   [&](int t) { return t * ldx; });
    }
};
