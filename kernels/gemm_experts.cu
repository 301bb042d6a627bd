// Op        gemm_experts_up: h[i][o] = silu(gate_e[o] . x[t]) * (up_e[o] . x[t]) / 16
//           gemm_experts_down: y[s][o] = down_e[o] . h[i] / 16
//           where place i of the sorted list holds slot s = slots[i] of token t = s / n_used and expert e
// Shapes    h [n * n_used, f] at row stride ldh, x [n, d] at row stride ldx, y [n * n_used, d] at ldy;
//           gate, up, down tiled [held experts, row tiles, column tiles]; gate and up may be two halves
//           of one weight: up_tile is the first row tile of up in an expert's, of which it has row_tiles
//           slots, tiles, ends: moe_sort
// Dtypes    weights any tiled type (Q0, and Q1 for up) as float16 times their boost; x, h and y float16
//           of value / 16, h and y saturating; sums float32
// Grid      any number of CTAs (CTAS fit an SM), which share the work items: (tile of tokens, 256
//           rows; up: 128 of gate and of up); threads and shared bytes as gemm
// Assumes   tiles of MOST tokens at most, 128, 64 or 32: as gemm; gate and up with the same number of column tiles; y of slots whose expert is not
//           held is not written
// Numerics  as gemm; a token's result does not depend on its place in the list
// Bound by  tensor cores: 6 n n_used f d operations; few tokens: bytes of the chosen experts
// Sources   see include/gemm.cuh
// Variants  GATED=1 Q0=12 Q1=12 STAGES=4; Q0=6 Q1=-1 STAGES=4; GATED=1 Q0=12 Q1=14 STAGES=4;
//           Q0=14 Q1=-1 STAGES=4; GATED=1 Q0=12 Q1=12 MOST=32 CTAS=2 STAGES=7 @9.0a;
//           GATED=1 Q0=12 Q1=14 MOST=32 STAGES=8; GATED=1 Q0=12 Q1=12 MOST=64 STAGES=8;
//           GATED=1 Q0=12 Q1=14 MOST=64 STAGES=8; Q0=6 Q1=-1 MOST=64 STAGES=8;
//           Q0=6 Q1=-1 MOST=32 CTAS=2 STAGES=7 @9.0a
// Needs     8.0
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "gemm.cuh"
#include "gemm_store.cuh"
#include "pdl.cuh"

// ---------------------------------------------------------------- device helpers ------------
// What moe_sort made: tiles of up to MOST neighbours in the list with the same expert.
struct Tokens {
    const int *slots, *tiles;
    // Expert of a tile, its first place in the list, its tokens.
    __device__ __forceinline__ int3 tile(int i) const {
        return make_int3(tiles[4 * i], tiles[4 * i + 1], tiles[4 * i + 2]);
    }
};

struct Items {
    Tokens tokens;
    const unsigned char *w0, *w1;
    const unsigned short* x;
    long long ldx;
    int n_used, row_tiles, w1_tile, part_tiles, col_tiles, held, cols, skip, n_row_items, n;

    __device__ __forceinline__ void open(int item, GemmSource& from) const {
        const int3 tile = tokens.tile(item / n_row_items);
        const int total = held * row_tiles, base = tile.x * row_tiles;
#ifdef GATED
        const int row_tile = item % n_row_items * 8 + gemm_own_tile(), n = part_tiles - row_tile;
        if (Q0 == Q1 || gemm_own_part() == 0)
            from.set_tiles<Q0>(
                gemm_own_part() ? w1 : w0, total, col_tiles,
                base + row_tile + (gemm_own_part() ? w1_tile : 0), n);
        else
            from.set_tiles<Q1>(w1, total, col_tiles, base + row_tile + w1_tile, n);
#else
        const int row_tile = item % n_row_items * 16 + 8 * gemm_own_part() + gemm_own_tile();
        from.set_tiles<Q0>(w0, total, col_tiles, base + row_tile, part_tiles - row_tile);
#endif
        from.set_x(x, tile.z, col_tiles, skip, cols, [&](int t) {
#ifdef GATED
            return tokens.slots[tile.y + t] / n_used * ldx;
#else
            return (tile.y + t) * ldx;
#endif
        });
    }
};

// Items of one width after the other: tiles are in order of their width, `ends` counts those so far.
#define FOR_EACH_WIDTH(RUN) RUN(MOST, 0) RUN(MOST / 4 * 3, 1) RUN(MOST / 2, 2) RUN(MOST / 4, 3)

// ---------------------------------------------------------------- kernels -------------------
#ifdef GATED
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, CTAS)
gemm_experts_up(unsigned short* h, const unsigned char* gate, const unsigned char* up,
                const unsigned short* x, const int* slots, const int* tiles, const int* ends,
                int n_used, int f, int row_tiles, int up_tile, int col_tiles, int held, int cols,
                int skip, long long ldh, long long ldx) {
    extern __shared__ uint4 shared[];
    __shared__ Items items;  // spares registers
    pdl_launch();
    pdl_wait();
    const int n_row_items = (f + 127) / 128;
    items = {{slots, tiles}, gate, up, x, ldx, n_used, row_tiles, up_tile, (f + 15) / 16, col_tiles,
             held, cols, skip, n_row_items, ends[3] * n_row_items};
    __syncthreads();  // every thread wrote the same
    const float gate_boost = tile_boost<Q0>(gate), up_boost = tile_boost<Q1>(up);
    const float gate_scale = 16.f * tile_unboost<Q0>(gate), up_scale = tile_unboost<Q1>(up);
    Gemm<Items, max_of(StagedTile<Q0>::end, StagedTile<Q1>::end)> ring(items, shared);
    if (ring.copies()) return;
    int item = blockIdx.x;
#define RUN(N, I)                                                                              \
    for (const int end = ends[I] * n_row_items; item < end; item += gridDim.x) {               \
        const int3 tile = items.tokens.tile(item / n_row_items);                               \
        float g[N / 2], u[N / 2];                                                              \
        ring.template multiply<Q0, Q1, N>(col_tiles, gate_boost, up_boost, g, u);              \
        store_half<N>([&](int i) { return silu(g[i] * gate_scale) * (u[i] * up_scale); },      \
                      item % n_row_items * 128, f, tile.z,                                     \
                      StridedRows<unsigned short>{h + tile.y * ldh, ldh});                     \
    }
    FOR_EACH_WIDTH(RUN)
}
#else
// y rows by slot.
struct SlotRows {
    unsigned short* y;
    const int* slots;
    long long ldy;
    __device__ __forceinline__ unsigned short* operator()(int token) const {
        return y + slots[token] * ldy;
    }
};

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, CTAS)
gemm_experts_down(unsigned short* y, const unsigned char* down, const unsigned short* h,
                  const int* slots, const int* tiles, const int* ends, int d, int row_tiles,
                  int col_tiles, int held, int cols, int skip, long long ldy, long long ldh) {
    extern __shared__ uint4 shared[];
    __shared__ Items items;
    pdl_launch();
    pdl_wait();
    const int n_row_items = (d + GEMM_ROWS - 1) / GEMM_ROWS;
    items = {{slots, tiles}, down, down, h, ldh, 1, row_tiles, 0, row_tiles, col_tiles,
             held, cols, skip, n_row_items, ends[3] * n_row_items};
    __syncthreads();
    const float boost = tile_boost<Q0>(down), scale = tile_unboost<Q0>(down);
    Gemm<Items, StagedTile<Q0>::end> ring(items, shared);
    if (ring.copies()) return;
    int item = blockIdx.x;
#define RUN(N, I)                                                                              \
    for (const int end = ends[I] * n_row_items; item < end; item += gridDim.x) {               \
        const int3 tile = items.tokens.tile(item / n_row_items);                               \
        const SlotRows to{y, slots + tile.y, ldy};                                             \
        const int row0 = item % n_row_items * GEMM_ROWS;                                       \
        float d0[N / 2], d1[N / 2];                                                            \
        ring.template multiply<Q0, Q0, N>(col_tiles, boost, boost, d0, d1);                    \
        store_half<N>([&](int i) { return d0[i] * scale; }, row0, d, tile.z, to);              \
        store_half<N>([&](int i) { return d1[i] * scale; }, row0 + 128, d, tile.z, to);        \
    }
    FOR_EACH_WIDTH(RUN)
}
#endif
