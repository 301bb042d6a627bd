// A CTA's share of a product of few tokens: its warps split the column tiles of one or more row
// tiles, then add up through shared memory in the order of the warps.
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec.cuh"

// x of a product: `n` rows of `in` floats, `ldx` apart, that meet packed columns from `skip` on; with a
// norm, `in` is even, skip 0 and x times `norm` is meant.
struct FewIn {
    const float *x, *norm;
    long long ldx;
    int n, in, skip;
};

// ---------------------------------------------------------------- weights under way ---------
// DEPTH column tiles of each of several row tiles (Q: their types).
template <int DEPTH, int... Q>
struct FewTiles {
    __device__ __forceinline__ void load(int, int, int, bool) {}
    template <class X, int SUMS>
    __device__ __forceinline__ void add(int, const X&, int, float (*)[SUMS]) const {}
};
template <int DEPTH, int Q, int... REST>
struct FewTiles<DEPTH, Q, REST...> : FewTiles<DEPTH, REST...> {
    TileView<Q> view;
    long long first;  // tile: row tile * column tiles
    TileData<Q> w[DEPTH];

    __device__ __forceinline__ void load(int i, int col_tile, int lane, bool valid) {
        few_tile<Q>(view, first + col_tile, lane, valid, w[i]);
        FewTiles<DEPTH, REST...>::load(i, col_tile, lane, valid);
    }
    // acc[0] of this row tile, acc[1] of the next
    template <class X, int SUMS>
    __device__ __forceinline__ void add(int i, const X& x, int lane, float (*acc)[SUMS]) const {
        few_add<Q>(w[i], x, lane, acc[0]);
        FewTiles<DEPTH, REST...>::add(i, x, lane, acc + 1);
    }
};

// ---------------------------------------------------------------- x under way ---------------
// Up to 4 BLOCKS tokens; BLOCKS 0: one. What is fetched for a column tile becomes its fragment.
template <int DEPTH, int BLOCKS, bool NORM>
struct FewReader {
    static constexpr int tokens = 4 * BLOCKS, sums = 2 * BLOCKS;
    float squares[BLOCKS];  // of token 4 k + g / 2

    __device__ __forceinline__ FewReader() {
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) squares[k] = 0.f;
    }
    __device__ __forceinline__ void fetch_norm(const FewIn&, int, int, int, bool) {}
    __device__ __forceinline__ void fetch(const FewIn&, int, int, int, bool) {}
    __device__ __forceinline__ FewX<BLOCKS> fragment(
            const FewIn& in, int, int col_tile, int lane, bool valid) {
        FewX<BLOCKS> out;
        const unsigned a[4] = {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) {
            const int token = 4 * k + (lane >> 3);
            const float* row = in.x + token * in.ldx;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int c = 64 * col_tile + 16 * j + 2 * (lane & 3) - in.skip;
                float v[4], w[4];
                few_columns(row, c, valid && token < in.n ? in.in : 0, v);
                if constexpr (NORM) few_columns(in.norm, c, valid ? in.in : 0, w);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if constexpr (NORM) squares[k] += v[i] * v[i], v[i] *= w[i];
                    v[i] *= FEW_X;
                }
                few_split(v, lane & 4 ? ~0u : 0u, out.b[k][j]);
                float c4[4] = {0.f, 0.f, 0.f, 0.f};
                few_mma(c4, a, out.b[k][j]);
                out.ones[k][j] = c4[0] + c4[1];
            }
        }
        return out;
    }
    // The warp's sums of squares, one per token.
    __device__ __forceinline__ void store_squares(int lane, float* to) {
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) {
            squares[k] += __shfl_xor_sync(~0u, squares[k], 1);
            squares[k] += __shfl_xor_sync(~0u, squares[k], 2);
            if ((lane & 7) == 0) to[4 * k + (lane >> 3)] = squares[k];
        }
    }
};
template <int DEPTH, bool NORM>
struct FewReader<DEPTH, 0, NORM> {
    static constexpr int tokens = 1, sums = 2;
    float squares = 0.f;
    float v[DEPTH][4], norm[DEPTH][4];

    __device__ __forceinline__ static int column(const FewIn& in, int col_tile, int lane) {
        return 64 * col_tile + 16 * (lane >> 3) + 2 * (lane & 3) - in.skip;
    }
    // May come before pdl_wait().
    __device__ __forceinline__ void fetch_norm(
            const FewIn& in, int i, int col_tile, int lane, bool valid) {
        if constexpr (NORM)
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const int at = column(in, col_tile, lane) + 4 * k;
                unsigned two[2];
                few_load<2>((const unsigned char*)(in.norm + at), valid && at < in.in, two);
                norm[i][k] = __uint_as_float(two[0]), norm[i][k + 1] = __uint_as_float(two[1]);
            }
    }
    __device__ __forceinline__ void fetch(
            const FewIn& in, int i, int col_tile, int lane, bool valid) {
        few_columns(in.x, column(in, col_tile, lane), valid ? in.in : 0, v[i]);
    }
    __device__ __forceinline__ FewX<0> fragment(const FewIn&, int i, int, int lane, bool) {
        float in[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            in[k] = v[i][k] * FEW_X;
            if constexpr (NORM) squares += v[i][k] * v[i][k], in[k] *= norm[i][k];
        }
        return few_x(in, lane);
    }
    __device__ __forceinline__ void store_squares(int lane, float* to) {
        const float sum = warp_sum(squares) * 0.5f;  // two lanes hold each value: for hi and for lo
        if (lane == 0) to[0] = sum;
    }
};

// ---------------------------------------------------------------- a CTA ---------------------
template <int WARPS, int ROW_TILES, int TOKENS>
struct FewSums {
    float part[WARPS][ROW_TILES][TOKENS][16], squares[WARPS][TOKENS];

    // Row `row` of row tile r for a token, over all warps.
    __device__ __forceinline__ float sum(int r, int token, int row) const {
        float out = part[0][r][token][row];
#pragma unroll
        for (int w = 1; w < WARPS; w++) out += part[w][r][token][row];
        return out;
    }
    // 1 / sqrt(mean of squares + eps)
    __device__ __forceinline__ float norm(int token, int in, float eps) const {
        float out = squares[0][token];
#pragma unroll
        for (int w = 1; w < WARPS; w++) out += squares[w][token];
        return rsqrtf(out / in + eps);
    }
};

// A warp's accumulators to shared memory.
template <int WARPS, int ROW_TILES, int TOKENS, int SUMS>
__device__ __forceinline__ void few_store(
        FewSums<WARPS, ROW_TILES, TOKENS>& to, float (&acc)[ROW_TILES][SUMS]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        if constexpr (TOKENS == 1) {
            few_rows(acc[r]);
            if (t == 0) to.part[warp][r][0][g] = acc[r][0], to.part[warp][r][0][g + 8] = acc[r][1];
        } else {
#pragma unroll
            for (int k = 0; k < TOKENS / 4; k++) {
                to.part[warp][r][4 * k + t][g] = acc[r][2 * k];
                to.part[warp][r][4 * k + t][g + 8] = acc[r][2 * k + 1];
            }
        }
    }
}

// All of a CTA's product: the warps' sums are in `to` after the caller's __syncthreads(). tiles: views and
// first tiles are set. Weights are fetched before pdl_wait(), which every thread passes here.
template <int WARPS, int DEPTH, int BLOCKS, bool NORM, int... Q>
__device__ __forceinline__ void few_cta(
        FewSums<WARPS, sizeof...(Q), (BLOCKS ? 4 * BLOCKS : 1)>& to, FewTiles<DEPTH, Q...>& tiles,
        const FewIn& in, int n_col_tiles) {
    using Reader = FewReader<DEPTH, BLOCKS, NORM>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int from = n_col_tiles * warp / WARPS, end = n_col_tiles * (warp + 1) / WARPS;
    Reader x;
    float acc[sizeof...(Q)][Reader::sums];
#pragma unroll
    for (int r = 0; r < sizeof...(Q); r++)
#pragma unroll
        for (int i = 0; i < Reader::sums; i++) acc[r][i] = 0.f;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        tiles.load(i, from + i, lane, from + i < end);
        x.fetch_norm(in, i, from + i, lane, from + i < end);
    }
    pdl_wait();
#pragma unroll
    for (int i = 0; i < DEPTH; i++) x.fetch(in, i, from + i, lane, from + i < end);
    for (int at = from; at < end; at += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const int next = at + i + DEPTH;
            const auto b = x.fragment(in, i, at + i, lane, at + i < end);
            tiles.add(i, b, lane, acc);
            tiles.load(i, next, lane, next < end);
            x.fetch_norm(in, i, next, lane, next < end);
            x.fetch(in, i, next, lane, next < end);
        }
    }
    few_store(to, acc);
    if constexpr (NORM) x.store_squares(lane, to.squares[warp]);
}
