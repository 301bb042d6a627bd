// Op        mla_short: absorbed attention of one token over few cache rows in one launch, what latent.cu,
//           mla_decode_mma.cu and mla_combine.cu do in three:
//           cache row pos = (rms_norm(c_kv) norm, rope(k_pe)); q = temper (k_b q_nope, rope(q_pe));
//           o = v_b softmax(scale q . row_j) row_j[:r] over j <= pos
// Shapes    o [h * v], cache [n_ctx, r + p], q [h, k + p], c_kv [r], k_pe [p], norm [r], k_b [h, r, k] and
//           v_b [h, v, r] in tiles, cos and sin [p / 2], pos [1] (-1: no token)
// Dtypes    cache float16; k_b WTYPE0, v_b WTYPE1; the rest float32. Queries, rows and probabilities are rounded to
//           float16 (-gap f16); sums float32
// Grid      (8 h), 256 threads, clusters of 8: a head. CTA i computes queries 64 i .., attends to its share of the
//           rows, merges columns 64 i .. of all shares and multiplies them with its columns of v_b.
//           Shared bytes: N_ROWS (r + p + 8) 2
// Assumes   r = 512 = R, k = K a multiple of 2, p = P a multiple of 16, v = V; pos < 8 N_ROWS, N_ROWS a
//           multiple of 32; pos and rows below it are complete when this kernel starts (rope.cu sees to it)
// Numerics  k_b and v_b as in matvec.cuh; scores are summed by 8 warps in order; a fixed order everywhere
// Bound by  latency: three exchanges in a cluster; beyond some hundred rows reading them h times from L2
// Needs     9.0
// Variants  R=512 K=128 P=64 V=128 N_ROWS=64 WTYPE0=8 WTYPE1=8; R=512 K=192 P=64 V=256 N_ROWS=64 WTYPE0=12 WTYPE1=14
// Spills    none
// Sources   online softmax: arXiv 1805.02867; split-KV: arXiv 2311.01282; own
// Tested by tests/gpu/test_cuda_attention.py
#include <cuda_fp16.h>

#include "bulk_copy.cuh"
#include "matvec_cta.cuh"
#include "mla_splits.cuh"
#include "mma.cuh"

constexpr int W = R + P, LD = W + 8, STEPS = W / 16;
constexpr int EDGE0 = Tile<WTYPE0>::edge, TILES0 = (K + EDGE0 - 1) / EDGE0 * EDGE0 / 64;
constexpr int USED0 = (K + 63) / 64, DEPTH0 = (USED0 + 1) / 2;  // column tiles of k_b; of a warp
constexpr int TILES1 = R / 64, ROW_TILES1 = (V + 15) / 16, OWN1 = (ROW_TILES1 + 7) / 8;
static_assert(R == 512 && W % 16 == 0 && N_ROWS % 32 == 0, "64 columns a CTA, whole steps");

// ---------------------------------------------------------------- device helpers ------------
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where CTA `rank` of the cluster has what `mine` is here.
__device__ __forceinline__ unsigned there(const void* mine, int rank) {
    unsigned at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at) : "r"(shared_address(mine)), "r"(rank));
    return at;
}
__device__ __forceinline__ void send(unsigned at, float a, float b) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void send(unsigned at, unsigned a) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at), "r"(a) : "memory");
}
__device__ __forceinline__ unsigned halves(float a, float b) {
    const __half2 two = __floats2half2_rn(a, b);
    return *(const unsigned*)&two;
}

// ---------------------------------------------------------------- kernels -------------------
extern __shared__ uint4 attention_memory[];

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(256)
mla_short(float* o, __half* cache, const float* q, const float* c_kv, const float* k_pe,
          const float* norm, const unsigned char* k_b, const unsigned char* v_b, const float* cosine,
          const float* sine, const int* pos, int h, float eps, float scale, float warmth, int length) {
    __half* tile = (__half*)attention_memory;  // [N_ROWS][LD]
    __align__(16) __shared__ __half query[W];
    __align__(16) __shared__ float lat[2][64], score[8][N_ROWS], squared[8];
    __align__(16) __shared__ float shares[8][64], stats[8][2], outs[8][OWN1][16];  // from each CTA
    __shared__ unsigned long long bar;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.x / 8, rank = blockIdx.x % 8;
    pdl_launch();
    cluster_arrive();  // seen once all eight have started

    // ---- what is there before the predecessor ends: weights and old rows
    const int last = position(pos, 0), n_kv = last + 1;
    const int share = max(16, ((n_kv + 7) / 8 + 15) / 16 * 16), start = rank * share;
    const int rows = max(0, min(share, n_kv - start));  // of this CTA
    const int old = max(0, min(rows, last - start));
    const int fresh = last - start;  // where this token's row goes, if that is here
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&bar), 1);
        barriers_ready();
        barrier_expect(shared_address(&bar), old * 2 * W);
    }
    __syncthreads();
    for (int i = warp + 8 * lane; i < old; i += 256)
        bulk_load(shared_address(tile + i * LD), cache + (long long)(start + i) * W, 2 * W,
                  shared_address(&bar));
    TileData<WTYPE0> w0[DEPTH0];
    TileData<WTYPE1> w1[OWN1];
    const auto of_k = tile_view<WTYPE0>(k_b, (long long)h * (R / 16), TILES0);
    const auto of_v = tile_view<WTYPE1>(v_b, (long long)h * ROW_TILES1, TILES1);
#pragma unroll
    for (int i = 0; i < DEPTH0; i++) {
        const int col_tile = (warp & 1) + 2 * i;
        few_tile<WTYPE0>(of_k, ((long long)head * (R / 16) + 4 * rank + warp / 2) * TILES0 + col_tile,
                         lane, col_tile < USED0, w0[i]);
    }
#pragma unroll
    for (int k = 0; k < OWN1; k++)
        few_tile<WTYPE1>(of_v, ((long long)head * ROW_TILES1 + warp + 8 * k) * TILES1 + rank, lane,
                         warp + 8 * k < ROW_TILES1, w1[k]);
    const float2 weight = *(const float2*)(norm + 2 * threadIdx.x);
    for (int i = threadIdx.x + rows * (W / 8); i < (rows + 15) / 16 * 16 * (W / 8); i += 256)
        *(uint4*)(tile + i / (W / 8) * LD + i % (W / 8) * 8) = make_uint4(0, 0, 0, 0);
    const float warmer =
        warmth == 0.f || last < 0 ? 1.f : 1.f + warmth * log1pf((float)(last / length));
    pdl_wait();

    // ---- the query, 64 columns of it, and the token's own row
    const float* queries = q + (long long)head * (K + P);
    const bool owner = rows > 0 && fresh >= 0 && fresh < share;
    float acc[2] = {0.f, 0.f}, v[DEPTH0][4];
    float2 x = make_float2(0.f, 0.f), pe = x, pair = x, turn = x;
#pragma unroll
    for (int i = 0; i < DEPTH0; i++)
        few_columns(queries, 64 * ((warp & 1) + 2 * i) + 16 * (lane >> 3) + 2 * t, K, v[i]);
    if (owner) x = *(const float2*)(c_kv + 2 * threadIdx.x);
    if (threadIdx.x < P / 2) {
        turn = make_float2(cosine[threadIdx.x], sine[threadIdx.x]);
        pair = *(const float2*)(queries + K + 2 * threadIdx.x);
        if (owner) pe = *(const float2*)(k_pe + 2 * threadIdx.x);
    }
#pragma unroll
    for (int i = 0; i < DEPTH0; i++) {
#pragma unroll
        for (int k = 0; k < 4; k++) v[i][k] *= FEW_X;
        few_add<WTYPE0>(w0[i], few_x(v[i], lane), lane, acc);
    }
    few_rows(acc);
    if (t == 0)
        lat[warp & 1][16 * (warp / 2) + g] = acc[0], lat[warp & 1][16 * (warp / 2) + 8 + g] = acc[1];
    if (threadIdx.x < P / 2)
        *(unsigned*)(query + R + 2 * threadIdx.x) =
            halves((pair.x * turn.x - pair.y * turn.y) * warmer, (pair.x * turn.y + pair.y * turn.x) * warmer);
    const float square = warp_sum(x.x * x.x + x.y * x.y);
    if (lane == 0) squared[warp] = square;
    cluster_wait();  // all eight have started
    __syncthreads();
    if (owner) {
        float sum = squared[0];
#pragma unroll
        for (int i = 1; i < 8; i++) sum += squared[i];
        const float root = sqrtf(sum / R + eps);
        const unsigned two = halves(x.x / root * weight.x, x.y / root * weight.y);
        *(unsigned*)(tile + fresh * LD + 2 * threadIdx.x) = two;
        const unsigned end = halves(pe.x * turn.x - pe.y * turn.y, pe.x * turn.y + pe.y * turn.x);
        if (threadIdx.x < P / 2) *(unsigned*)(tile + fresh * LD + R + 2 * threadIdx.x) = end;
        if (head == 0) {
            unsigned* row = (unsigned*)(cache + (long long)last * W);
            row[threadIdx.x] = two;
            if (threadIdx.x < P / 2) row[R / 2 + threadIdx.x] = end;
        }
    }
    send(there(query + 64 * rank + 2 * lane, warp),
         halves((lat[0][2 * lane] + lat[1][2 * lane]) * warmer,
                (lat[0][2 * lane + 1] + lat[1][2 * lane + 1]) * warmer));
    cluster_arrive();
    cluster_wait();

    // ---- scores: each warp has some columns of all rows; the query is one column of B
    barrier_wait(shared_address(&bar), 0);
    constexpr int BANDS = N_ROWS / 16;
    float sums[BANDS][4];
#pragma unroll
    for (int m = 0; m < BANDS; m++) sums[m][0] = sums[m][1] = sums[m][2] = sums[m][3] = 0.f;
#pragma unroll
    for (int i = 0; i < (STEPS + 7) / 8; i++) {
        const int step = warp + 8 * i;
        if (step >= STEPS) break;
        const unsigned b[2] = {g ? 0u : *(const unsigned*)(query + 16 * step + 2 * t),
                               g ? 0u : *(const unsigned*)(query + 16 * step + 8 + 2 * t)};
#pragma unroll
        for (int m = 0; m < BANDS; m++) {
            if (16 * m >= rows) break;
            unsigned a[4];
            ldmatrix(a, tile + (16 * m + (lane & 15)) * LD + 16 * step + 8 * (lane >> 4));
            mma_f16(sums[m], a, b);
        }
    }
#pragma unroll
    for (int m = 0; m < BANDS; m++)
        if (t == 0) score[warp][16 * m + g] = sums[m][0], score[warp][16 * m + 8 + g] = sums[m][2];
    __syncthreads();

    // ---- probabilities: every warp for itself, row lane + 32 i
    constexpr int HELD = N_ROWS / 32;
    const float none = __int_as_float(0xff800000);
    float p[HELD], top = none, total = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int row = lane + 32 * i;
        p[i] = 0.f;
#pragma unroll
        for (int w = 0; w < 8; w++) p[i] += score[w][row];
        p[i] = row < rows ? p[i] * (scale * 1.4426950408889634f) : none;
        top = fmaxf(top, p[i]);
    }
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        p[i] = rows > 0 ? exp2f(p[i] - top) : 0.f;
        total += p[i];
    }
    total = warp_sum(total);

    // ---- values: a warp's 64 columns; the probabilities are one row of A
    float out[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
#pragma unroll
    for (int k = 0; k < BANDS; k++) {
        if (16 * k >= rows) break;
        float of[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            of[i] = __shfl_sync(~0u, p[k / 2], 16 * (k & 1) + 8 * (i / 2) + 2 * t + (i & 1));
        const unsigned a[4] = {g ? 0u : halves(of[0], of[1]), 0u, g ? 0u : halves(of[2], of[3]), 0u};
#pragma unroll
        for (int u = 0; u < 4; u++) {
            unsigned b[4];
            ldmatrix_trans(b, tile + (16 * k + (lane & 15)) * LD + 64 * warp + 16 * u + 8 * (lane >> 4));
            const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            mma_f16(out[2 * u], a, b0);
            mma_f16(out[2 * u + 1], a, b1);
        }
    }
    if (g == 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) send(there(&shares[rank][8 * i + 2 * t], warp), out[i][0], out[i][1]);
    }
    if (lane == 0) send(there(stats[rank], warp), top, total);
    cluster_arrive();
    cluster_wait();

    // ---- all shares of this CTA's 64 columns merged, and taken out of latent space
    float peak = none, weights = 0.f, merged[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 8; i++) peak = fmaxf(peak, stats[i][0]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float w = stats[i][0] > none ? exp2f(stats[i][0] - peak) : 0.f;
        weights += w * stats[i][1];
#pragma unroll
        for (int k = 0; k < 4; k++)
            merged[k] += w * shares[i][16 * (lane >> 3) + 2 * t + (k & 1) + 8 * (k / 2)];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) merged[k] = weights > 0.f ? merged[k] / weights * FEW_X : 0.f;
    const FewX<0> in = few_x(merged, lane);
#pragma unroll
    for (int k = 0; k < OWN1; k++) {
        float rows_of[2] = {0.f, 0.f};
        few_add<WTYPE1>(w1[k], in, lane, rows_of);
        few_rows(rows_of);
        if (t == 0) {
            send(there(&outs[rank][k][g], warp), __float_as_uint(rows_of[0]));
            send(there(&outs[rank][k][8 + g], warp), __float_as_uint(rows_of[1]));
        }
    }
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < 16 * OWN1) {
        const int k = threadIdx.x / 16, at = 16 * (rank + 8 * k) + threadIdx.x % 16;
        float sum = outs[0][k][threadIdx.x % 16];
#pragma unroll
        for (int i = 1; i < 8; i++) sum += outs[i][k][threadIdx.x % 16];
        if (at < V) o[(long long)head * V + at] = sum;
    }
}
