// Op        gemm: y_i[b][t][o] = scale * sum_c w_i[b][o][c] x[b][t][c] of up to three weights (i)
// Shapes    y_i [n, rows_i] at row stride ldy_i (and yb_i between batches b: heads); x [n, cols] at
//           row stride ldx (xb between batches); w_i tiled, padded row and column tiles as counts
// Dtypes    weights any tiled type (Q0, Q1, Q2; -1: none), as float16 times their boost; x float16 of
//           value / 16 (scale 16) or of the value (scale 1); sums float32; y by OUT: 0 float32, 1 added
//           to float32, 2 float16
// Grid      any number of CTAs (one fits an SM), which share the work items; 256 threads and with wgmma
//           128 more; shared bytes: 1024 + STAGES * (16400 + 16 * bytes of a staged row tile)
// Assumes   x 16-byte aligned, ldx and xb multiples of 8, its rows finite up to a multiple of 8;
//           float16 outputs with ldy and yb multiples of 8 that leave room for rows rounded up to 8;
//           TOKENS of an item: 32, 64, 96 or 128
// Numerics  a weight is rounded to float16 once (its scale before), x once; sums in the order of the
//           tensor cores. NMSE 1e-11 against the same rounding in float64, 2e-7 against none
// Bound by  tensor cores: 2 n rows cols operations; few tokens: bytes of the weights
// Sources   see include/gemm.cuh
// Variants  Q0=12 Q1=-1 Q2=-1 OUT=0 TOKENS=128 STAGES=4; Q0=14 Q1=8 Q2=-1 OUT=0 TOKENS=128 STAGES=4;
//           Q0=12 Q1=-1 Q2=-1 OUT=1 TOKENS=64 STAGES=4; Q0=1 Q1=-1 Q2=-1 OUT=2 TOKENS=96 STAGES=4;
//           Q0=30 Q1=30 Q2=30 OUT=0 TOKENS=32 STAGES=4; Q0=39 Q1=20 Q2=39 OUT=0 TOKENS=32 STAGES=4
// Needs     8.0
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "gemm_dense.cuh"
#include "gemm_store.cuh"

// ---------------------------------------------------------------- device helpers ------------
// d0, d1 of one item; gives what the sums are to be divided by.
template <int QTYPE, class Ring>
__device__ __forceinline__ float multiply(
        Ring& ring, const Segment& s, float (&d0)[TOKENS / 2], float (&d1)[TOKENS / 2]) {
    const float boost = tile_boost<QTYPE>(s.w);
    ring.template multiply<QTYPE, QTYPE, TOKENS>(s.col_tiles, boost, boost, d0, d1);
    return tile_unboost<QTYPE>(s.w);
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1)
gemm(void* y0, const unsigned char* w0, int rows0, int row_tiles0, int col_tiles0, int skip0,
     long long ldy0, long long yb0, void* y1, const unsigned char* w1, int rows1, int row_tiles1,
     int col_tiles1, int skip1, long long ldy1, long long yb1, void* y2, const unsigned char* w2,
     int rows2, int row_tiles2, int col_tiles2, int skip2, long long ldy2, long long yb2,
     const unsigned short* x, int n, int cols, int batches, long long ldx, long long xb, float scale) {
    extern __shared__ uint4 shared[];
    __shared__ Items items;  // spares registers
    pdl_launch();
    pdl_wait();
    items.s0 = {y0, w0, rows0, row_tiles0, col_tiles0, skip0, ldy0, yb0};
    items.s1 = {y1, w1, rows1, row_tiles1, col_tiles1, skip1, ldy1, yb1};
    items.s2 = {y2, w2, rows2, row_tiles2, col_tiles2, skip2, ldy2, yb2};
    items.set(x, n, cols, batches, ldx, xb);
    __syncthreads();  // every thread wrote the same
    Gemm<Items, TILE_BYTES> ring(items, shared);
    if (ring.copies()) return;
    for (int item = blockIdx.x; item < items.n; item += gridDim.x) {
        int rows, token, batch;
        const int i = items.where(item, rows, token, batch);
        const Segment s = items.segment(i);
        float d0[TOKENS / 2], d1[TOKENS / 2], factor = scale;
        if (T1 != T0 && i == 1) factor *= multiply<T1>(ring, s, d0, d1);
        else if (T2 != T0 && i == 2) factor *= multiply<T2>(ring, s, d0, d1);
        else factor *= multiply<T0>(ring, s, d0, d1);
        const int row0 = rows * GEMM_ROWS, left = n - token;
        const long long at = batch * s.yb + token * s.ldy;
#if OUT == 2
        const StridedRows<unsigned short> to{(unsigned short*)s.y + at, s.ldy};
        store_half<TOKENS>([&](int i) { return d0[i] * factor; }, row0, s.rows, left, to);
        store_half<TOKENS>([&](int i) { return d1[i] * factor; }, row0 + 128, s.rows, left, to);
#elif OUT == 1
        const StridedRows<float> to{(float*)s.y + at, s.ldy};
        add_float<TOKENS>(d0, d1, factor, row0, s.rows, left, to);
#else
        const StridedRows<float> to{(float*)s.y + at, s.ldy};
        store_float<TOKENS>(d0, d1, factor, row0, s.rows, left, to);
#endif
    }
}
