// Op        gemm_split: as gemm, the columns of a work item shared by a cluster's CTAs, which add up
//           gemm_gated_split: as gemm_gated, alike
// Shapes    as gemm and gemm_gated
// Dtypes    as gemm and gemm_gated
// Grid      CLUSTER CTAs (1, 2, 4, 8) an item of 128 PARTS rows (gated: half as many of each weight) and
//           TOKENS tokens, CTAS of them fit an SM; threads as gemm; shared bytes: 1024 + the larger of
//           STAGES * (128 MOST + 16 + 8 PARTS * bytes of a staged row tile), 4 TOKENS (128 PARTS + 4)
// Assumes   as gemm; at least CLUSTER column tiles; MOST = TOKENS = 32, 64, 96 or 128
// Numerics  as gemm, but for the order of sums: columns of a CTA, then CTAs by their rank
// Bound by  few tokens: latency of a launch, a stage's copy and two cluster barriers
// Sources   see include/gemm.cuh
// Variants  CLUSTER=8 PARTS=1 CTAS=2 Q0=12 Q1=-1 Q2=-1 OUT=0 TOKENS=64 MOST=64 STAGES=5 @9.0a;
//           CLUSTER=8 PARTS=1 CTAS=2 Q0=14 Q1=8 Q2=-1 OUT=1 TOKENS=64 MOST=64 STAGES=4 @9.0a;
//           CLUSTER=4 PARTS=1 CTAS=2 Q0=1 Q1=30 Q2=39 OUT=2 TOKENS=32 MOST=32 STAGES=4 @9.0a;
//           CLUSTER=4 PARTS=2 CTAS=1 Q0=12 Q1=-1 Q2=-1 OUT=1 TOKENS=128 MOST=128 STAGES=8 @9.0a;
//           GATED=1 CLUSTER=8 PARTS=1 CTAS=2 Q0=12 Q1=12 TOKENS=64 MOST=64 STAGES=5 @9.0a;
//           GATED=1 CLUSTER=2 PARTS=2 CTAS=1 Q0=12 Q1=14 TOKENS=96 MOST=96 STAGES=6 @9.0a;
//           Q0=12 Q1=14 Q2=-1 OUT=0 TOKENS=64 MOST=64 STAGES=4 PARTS=1; GATED=1 Q0=12 Q1=12 TOKENS=64
//           MOST=64 STAGES=4 PARTS=1
// Needs     8.0
// Spills    none
// Tested by tests/gpu/test_gemm.py, tests/kernels/test_gemm.py
#include "cluster.cuh"
#include "gemm.cuh"
#ifdef GATED
#include "gemm_gated.cuh"
#else
#include "gemm_dense.cuh"
#endif

constexpr int LD = GEMM_ROWS + 4;  // of sums [TOKENS][LD]: a warp's stores meet all banks

// ---------------------------------------------------------------- device helpers ------------
// This CTA's part of a cluster's item.
struct Shares {
    const Items& items;
    int n;  // of this grid

    static __device__ __forceinline__ int from(int steps, int rank) { return steps * rank / CLUSTER; }
    __device__ __forceinline__ void open(int item, GemmSource& source) const {
        items.open(item / CLUSTER, source);
        const int rank = cluster_rank(), steps = source.steps;
        source.narrow(from(steps, rank), from(steps, rank + 1));
    }
};

typedef Gemm<Shares, TILE_BYTES, true> Ring;

// With WGMMA the warps that copy x and those that store wait for the launch before by themselves.
__device__ __forceinline__ void begin() {
    pdl_launch();
#ifndef WGMMA
    pdl_wait();
#endif
}

// A barrier of the cluster's computing threads: the others leave, and don't count then.
__device__ __forceinline__ void sync() {
#if CLUSTER > 1
    cluster_sync();
#else
    gemm_sync();
#endif
}

// Stages of a CTA of so many.
__device__ __forceinline__ int own_steps(int steps) {
    return Shares::from(steps, cluster_rank() + 1) - Shares::from(steps, cluster_rank());
}

// One part's sums.
__device__ __forceinline__ void put(float* sums, const float (&d)[TOKENS / 2], int part) {
    float* to = sums + gemm_token() * LD + 128 * part + gemm_row();
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        to[8 * j * LD] = d[4 * j], to[(8 * j + 1) * LD] = d[4 * j + 1];
        to[8 * j * LD + 8] = d[4 * j + 2], to[(8 * j + 1) * LD + 8] = d[4 * j + 3];
    }
}

// A CTA's sums of its columns, into `sums`: both parts of one weight, or of two (part 1 of QTYPE1).
template <int QTYPE0, int QTYPE1>
__device__ __forceinline__ void multiply(
        Ring& ring, float* sums, int steps, const unsigned char* w0, const unsigned char* w1) {
    float d0[TOKENS / 2];
#if PARTS == 2
    float d1[TOKENS / 2];
    ring.template multiply<QTYPE0, QTYPE1, TOKENS>(
        own_steps(steps), tile_boost<QTYPE0>(w0), tile_boost<QTYPE1>(w1), d0, d1);
#else
    if (QTYPE0 == QTYPE1 || threadIdx.x < 128)
        ring.template multiply<QTYPE0, TOKENS>(
            own_steps(steps), tile_boost<QTYPE0>(threadIdx.x < 128 ? w0 : w1), d0);
    else
        ring.template multiply<QTYPE1, TOKENS>(own_steps(steps), tile_boost<QTYPE1>(w1), d0);
#endif
    gemm_sync();  // nobody reads the ring any more
    put(sums, d0, 0);
#if PARTS == 2
    put(sums, d1, 1);
#endif
}

// Four neighbouring rows of a token, added up over the cluster.
__device__ __forceinline__ void total(const float* sums, float (&sum)[4]) {
#if CLUSTER > 1
    float part[CLUSTER][4];
#pragma unroll
    for (int i = 0; i < CLUSTER; i++)
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(part[i][0]), "=f"(part[i][1]), "=f"(part[i][2]), "=f"(part[i][3])
                     : "r"(peer_address(sums, i)));
#pragma unroll
    for (int j = 0; j < 4; j++) {
        sum[j] = part[0][j];
#pragma unroll
        for (int i = 1; i < CLUSTER; i++) sum[j] += part[i][j];
    }
#else
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] = sums[j];
#endif
}

// A thread's part of this CTA's tokens (of the first n) and every fourth of `rows` rows, UNROLL at a
// time: load(i, token, row) all, add(i, their place in sums), store(i, token, row).
constexpr int UNROLL = 2;  // loads under way
template <class Load, class Add, class Store>
__device__ __forceinline__ void for_own(
        int rows, int n, const float* sums, Load load, Add add, Store store) {
    constexpr int OWN = (TOKENS + CLUSTER - 1) / CLUSTER;
    const int quads = rows / 4, first = cluster_rank() * OWN, last = min(n, min(first + OWN, TOKENS));
    const int count = (last - first) * quads;
    for (int at = threadIdx.x; at < count; at += UNROLL * 256) {
        int token[UNROLL], row[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {  // the last ones twice
            const int own = min(at + 256 * i, count - 1);
            token[i] = first + own / quads, row[i] = own % quads * 4;
            load(i, token[i], row[i]);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) add(i, sums + token[i] * LD + row[i]);
#pragma unroll
        for (int i = 0; i < UNROLL; i++)
            if (at + 256 * i < count) store(i, token[i], row[i]);
    }
}

// ---------------------------------------------------------------- kernels -------------------
#ifdef GATED
extern "C" __global__ void __cluster_bounds__(GEMM_THREADS, CTAS)
gemm_gated_split(unsigned short* h, const unsigned char* gate, const unsigned char* up,
                 const unsigned short* x, int n, int rows, int row_tiles, int col_tiles, int cols,
                 int skip, long long ldh, long long ldx) {
    extern __shared__ uint4 shared[];
    __shared__ Items items;  // spares registers
    begin();
    items.set(gate, up, x, ldx, n, rows, row_tiles, col_tiles, cols, skip);
    __syncthreads();  // every thread wrote the same
    const Shares shares{items, (int)gridDim.x};
    Ring ring(shares, shared);
    if (ring.copies()) return;
    const int item = blockIdx.x / CLUSTER;
    float* sums = (float*)ring.ring;
    multiply<Q0, Q1>(ring, sums, col_tiles, gate, up);
    const float gate_scale = 16.f * tile_unboost<Q0>(gate), up_scale = tile_unboost<Q1>(up);
    const int row0 = items.row(item), token0 = items.token(item);
    pdl_wait();  // before stores
    sync();
    float g[UNROLL][4], u[UNROLL][4];
    for_own(
        GEMM_ROWS / 2, n - token0, sums, [](int, int, int) {},
        [&](int i, const float* at) { total(at, g[i]), total(at + GEMM_ROWS / 2, u[i]); },
        [&](int i, int token, int row) {
            float y[4];
#pragma unroll
            for (int j = 0; j < 4; j++) y[j] = silu(g[i][j] * gate_scale) * (u[i][j] * up_scale);
            if (row0 + row < (rows + 7) / 8 * 8)
                *(uint2*)(h + (token0 + token) * ldh + row0 + row) =
                    make_uint2(saturated_half2(y[0], y[1]), saturated_half2(y[2], y[3]));
        });
    sync();  // others may still read this CTA's sums
}
#else
extern "C" __global__ void __cluster_bounds__(GEMM_THREADS, CTAS)
gemm_split(void* y0, const unsigned char* w0, int rows0, int row_tiles0, int col_tiles0, int skip0,
           long long ldy0, long long yb0, void* y1, const unsigned char* w1, int rows1,
           int row_tiles1, int col_tiles1, int skip1, long long ldy1, long long yb1, void* y2,
           const unsigned char* w2, int rows2, int row_tiles2, int col_tiles2, int skip2,
           long long ldy2, long long yb2, const unsigned short* x, int n, int cols, int batches,
           long long ldx, long long xb, float scale) {
    extern __shared__ uint4 shared[];
    __shared__ Items items;  // spares registers
    begin();
    items.s0 = {y0, w0, rows0, row_tiles0, col_tiles0, skip0, ldy0, yb0};
    items.s1 = {y1, w1, rows1, row_tiles1, col_tiles1, skip1, ldy1, yb1};
    items.s2 = {y2, w2, rows2, row_tiles2, col_tiles2, skip2, ldy2, yb2};
    items.set(x, n, cols, batches, ldx, xb);
    __syncthreads();  // every thread wrote the same
    const Shares shares{items, (int)gridDim.x};
    Ring ring(shares, shared);
    if (ring.copies()) return;
    int rows, token0, batch;
    const int i = items.where(blockIdx.x / CLUSTER, rows, token0, batch);
    const Segment s = items.segment(i);
    float* sums = (float*)ring.ring;
    if (T1 != T0 && i == 1) multiply<T1, T1>(ring, sums, s.col_tiles, s.w, s.w);
    else if (T2 != T0 && i == 2) multiply<T2, T2>(ring, sums, s.col_tiles, s.w, s.w);
    else multiply<T0, T0>(ring, sums, s.col_tiles, s.w, s.w);
    const float factor = scale * (i == 0   ? tile_unboost<T0>(s.w)
                                  : i == 1 ? tile_unboost<T1>(s.w)
                                           : tile_unboost<T2>(s.w));
    pdl_wait();  // before stores, and loads of what is added to
    sync();
    const long long y_at = batch * s.yb + token0 * s.ldy + rows * GEMM_ROWS;
    const int left = s.rows - rows * GEMM_ROWS;  // padded to 8 in float16 outputs
    float sum[UNROLL][4];
#if OUT < 2
    alignas(16) float old[UNROLL][4];
    float* y = (float*)s.y + y_at;
    const bool whole = (s.ldy | (long long)(size_t)y >> 2 | left) % 4 == 0;
#endif
    for_own(
        GEMM_ROWS, n - token0, sums,
        [&](int i, int token, int row) {
#if OUT == 1
            if (whole && row < left)
                *(float4*)old[i] = *(const float4*)(y + token * s.ldy + row);
            else
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (row + j < left) old[i][j] = y[token * s.ldy + row + j];
#endif
        },
        [&](int i, const float* at) { total(at, sum[i]); },
        [&](int i, int token, int row) {
#if OUT == 2
            if (row < (left + 7) / 8 * 8)
                *(uint2*)((unsigned short*)s.y + y_at + token * s.ldy + row) =
                    make_uint2(saturated_half2(sum[i][0] * factor, sum[i][1] * factor),
                               saturated_half2(sum[i][2] * factor, sum[i][3] * factor));
#else
            alignas(16) float now[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                now[j] = (OUT == 1 ? old[i][j] : 0.f) + sum[i][j] * factor;
            if (whole && row < left) {
                *(float4*)(y + token * s.ldy + row) = *(const float4*)now;
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (row + j < left) y[token * s.ldy + row + j] = now[j];
            }
#endif
        });
    sync();  // others may still read this CTA's sums
}
#endif
