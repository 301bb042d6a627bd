// Op        products_stream: y[o] = s sum_c w[o][c] x[c] norm[c], s = 1 / sqrt(mean of x^2 + eps); WITH_NORM=0: s and
//           norm are 1. One token; for weights so large that only memory counts
// Shapes    y [rows], x [in], norm [in]; w in tiles (tiles.cuh) of N_COL_TILES column tiles
// Dtypes    w of type WTYPE0; x, norm, y, sums float32
// Grid      (ctas), 32 (N_WARPS + 1) threads. CTA c takes row tiles c, c + ctas, .., at most N_ROWS. A warp of its own
//           asks for whole row tiles, N_STAGES at a time; the others have some of the columns each. Shared bytes:
//           N_STAGES row tiles
// Assumes   `in` is 64 N_COL_TILES, no columns of another rank
// Numerics  matvec.cuh; warps in a fixed order. NMSE to float64 <= 1e-9
// Bound by  bytes of w
// Needs     9.0
// Variants  N_STAGES=3 N_ROWS=25 N_WARPS=8 N_CTAS=2 N_COL_TILES=32 WITH_NORM=1 WTYPE0=14;
//           N_STAGES=2 N_ROWS=17 N_WARPS=4 N_CTAS=3 N_COL_TILES=22 WITH_NORM=0 WTYPE0=6;
//           N_STAGES=3 N_ROWS=25 N_WARPS=8 N_CTAS=2 N_COL_TILES=32 WITH_NORM=1 WTYPE0=29
// Spills    none
// Sources   own
// Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#include "matvec_bulk.cuh"

constexpr int THREADS = 32 * N_WARPS + 32;

extern "C" __global__ void __launch_bounds__(THREADS, N_CTAS)
products_stream(float* y, const unsigned char* weight, const float* x, const float* norm, int rows,
                int in, float eps) {
    using Streams = RowStreams<N_COL_TILES, WTYPE0>;
    __shared__ float part[N_ROWS][N_WARPS][16], squared[N_WARPS];
    __shared__ RowBarrier full[N_STAGES], empty[N_STAGES];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row_tiles = (rows + 15) / 16, ctas = gridDim.x, n = (row_tiles - (int)blockIdx.x + ctas - 1) / ctas;
    if (threadIdx.x == 0)
        for (int i = 0; i < N_STAGES; i++) row_init(full + i, 1), row_init(empty + i, N_WARPS);
    __syncthreads();
    pdl_launch();
    if (warp == N_WARPS) {
        if (lane == 0) {
            const auto view = tile_view<WTYPE0>(weight, row_tiles, N_COL_TILES);
            Streams w;
            int stage = 0, parity = 1;
            for (int k = 0; k < n; k++) {
                if (k >= N_STAGES) row_wait(empty + stage, parity);
                w.start(view, (long long)(blockIdx.x + k * gridDim.x) * N_COL_TILES, 0, 0);
                row_expect(full + stage, Streams::nbytes);
                row_fetch(w, ring + stage * Streams::nbytes, full + stage);
                if (++stage == N_STAGES) stage = 0, parity ^= 1;
            }
        }
        pdl_wait();
    } else {
        RowX<OneXOf<N_ROWS, WTYPE0>, N_COL_TILES, N_WARPS> of;
        float squares = 0.f;
        pdl_wait();
        of.template take<WITH_NORM>(warp, x, norm, squares);
        squares = warp_sum(squares) * 0.5f;  // two lanes hold each value: for hi and for lo
        if (lane == 0) squared[warp] = squares;
        int stage = 0, parity = 0;
#pragma unroll 1
        for (int k = 0; k < n; k++) {
            row_wait(full + stage, parity);
            float acc[1][2];
            of.template product<Streams>(warp, ring + stage * Streams::nbytes, acc);
            __syncwarp();
            if (lane == 0) row_arrive(empty + stage);
            if ((lane & 3) == 0)
                part[k][warp][lane >> 2] = acc[0][0], part[k][warp][8 + (lane >> 2)] = acc[0][1];
            if (++stage == N_STAGES) stage = 0, parity ^= 1;
        }
    }
    __syncthreads();
    const float scale = WITH_NORM ? row_norm(squared, in, eps) : 1.f;
    for (int k = threadIdx.x >> 4; k < n; k += THREADS / 16) {
        const int row = threadIdx.x & 15, o = 16 * (blockIdx.x + k * gridDim.x) + row;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < N_WARPS; w++) sum += part[k][w][row];
        if (o < rows) y[o] = scale * sum;
    }
}
