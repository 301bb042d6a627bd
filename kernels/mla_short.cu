// Op        mla_short: absorbed attention of one token over few cache rows in one launch, what latent.cu,
//           mla_decode_mma.cu and mla_combine.cu do in three:
//           cache row pos = (rms_norm(c_kv) norm, rope(k_pe)); q = temper (k_b q_nope, rope(q_pe));
//           o = v_b softmax(scale q . row_j) row_j[:r] over j <= pos
// Shapes    o [h * v], cache [n_ctx, r + p], q [h, k + p], c_kv [r], k_pe [p], norm [r], k_b [h, r, k] and
//           v_b [h, v, r] in tiles, cos and sin [p / 2], pos [1] (-1: no token)
// Dtypes    cache float16; k_b WTYPE0, v_b WTYPE1; the rest float32. Queries, rows and probabilities are rounded to
//           float16 (-gap f16); sums float32
// Grid      (8 h / HEADS), 256 threads, clusters of 8: HEADS heads, which share what is read of the cache. CTA i
//           computes queries 64 i .., attends to its share of the rows, merges columns 64 i .. of all shares and
//           multiplies them with its columns of v_b. Shared bytes: N_ROWS (r + p + 8) 2
// Assumes   r = 512 = R, k = K a multiple of 2, p = P a multiple of 16, v = V; pos < 8 N_ROWS, N_ROWS a
//           multiple of 32; HEADS at most 8, divides h; pos and rows below it are complete when this kernel starts (rope.cu sees to it)
// Numerics  k_b and v_b as in matvec.cuh; scores are summed by 8 warps in order; a fixed order everywhere
// Bound by  latency: three exchanges in a cluster; beyond some hundred rows reading them h times from L2
// Needs     9.0
// Variants  R=512 K=128 P=64 V=128 N_ROWS=64 HEADS=1 WTYPE0=8 WTYPE1=8;
//           R=512 K=128 P=64 V=128 N_ROWS=64 HEADS=4 WTYPE0=8 WTYPE1=8;
//           R=512 K=192 P=64 V=256 N_ROWS=64 HEADS=2 WTYPE0=12 WTYPE1=14
// Spills    none
// Sources   online softmax: arXiv 1805.02867; split-KV: arXiv 2311.01282; own
// Tested by tests/gpu/test_cuda_attention.py
#include <cuda_fp16.h>

#define CLUSTER 8
#include "bulk_copy.cuh"
#include "cluster.cuh"
#include "matvec_cta.cuh"
#include "mla_splits.cuh"
#include "mma.cuh"

constexpr int W = R + P, LD = W + 8, STEPS = W / 16;
constexpr int EDGE0 = Tile<WTYPE0>::edge, TILES0 = (K + EDGE0 - 1) / EDGE0 * EDGE0 / 64;
constexpr int USED0 = (K + 63) / 64, DEPTH0 = (USED0 + 1) / 2;  // column tiles of k_b; of a warp
constexpr int TILES1 = R / 64, ROW_TILES1 = (V + 15) / 16, OWN1 = (ROW_TILES1 + 7) / 8;
constexpr int CTAS = HEADS * (DEPTH0 + OWN1) > 2 ? 2 : 3;  // on an SM
static_assert(R == 512 && W % 16 == 0 && N_ROWS % 32 == 0, "64 columns a CTA, whole steps");
static_assert(HEADS <= 8 && HEADS * (P / 2) <= 256, "heads are columns of B; a thread a pair of q_pe");

// ---------------------------------------------------------------- device helpers ------------
__device__ __forceinline__ unsigned halves(float a, float b) {
    const __half2 two = __floats2half2_rn(a, b);
    return *(const unsigned*)&two;
}

// ---------------------------------------------------------------- kernels -------------------
extern __shared__ uint4 attention_memory[];

extern "C" __global__ void __cluster_bounds__(256, CTAS)
mla_short(float* o, __half* cache, const float* q, const float* c_kv, const float* k_pe,
          const float* norm, const unsigned char* k_b, const unsigned char* v_b, const float* cosine,
          const float* sine, const int* pos, int h, float eps, float scale, float warmth, int length) {
    __half* tile = (__half*)attention_memory;  // [N_ROWS][LD]
    __align__(16) __shared__ __half query[HEADS][W];
    __align__(16) __shared__ float lat[HEADS][2][64], score[HEADS][8][N_ROWS], squared[8];
    // from each CTA
    __align__(16) __shared__ float shares[8][HEADS][64], stats[8][HEADS][2], outs[8][HEADS * OWN1][16];
    __shared__ unsigned long long bar;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.x / 8 * HEADS, rank = blockIdx.x % 8;  // the first head
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
    TileData<WTYPE0> w0[HEADS][DEPTH0];
    TileData<WTYPE1> w1[HEADS][OWN1];
    const auto of_k = tile_view<WTYPE0>(k_b, (long long)h * (R / 16), TILES0);
    const auto of_v = tile_view<WTYPE1>(v_b, (long long)h * ROW_TILES1, TILES1);
#pragma unroll
    for (int a = 0; a < HEADS; a++) {
#pragma unroll
        for (int i = 0; i < DEPTH0; i++) {
            const int col_tile = (warp & 1) + 2 * i;
            const long long row_tile = (long long)(head + a) * (R / 16) + 4 * rank + warp / 2;
            few_tile<WTYPE0>(of_k, row_tile * TILES0 + col_tile, lane, col_tile < USED0, w0[a][i]);
        }
#pragma unroll
        for (int k = 0; k < OWN1; k++)
            few_tile<WTYPE1>(of_v, ((long long)(head + a) * ROW_TILES1 + warp + 8 * k) * TILES1 + rank,
                             lane, warp + 8 * k < ROW_TILES1, w1[a][k]);
    }
    const float2 weight = *(const float2*)(norm + 2 * threadIdx.x);
    for (int i = threadIdx.x + rows * (W / 8); i < (rows + 15) / 16 * 16 * (W / 8); i += 256)
        *(uint4*)(tile + i / (W / 8) * LD + i % (W / 8) * 8) = make_uint4(0, 0, 0, 0);
    const float warmer =
        warmth == 0.f || last < 0 ? 1.f : 1.f + warmth * log1pf((float)(last / length));
    pdl_wait();

    // ---- the query, 64 columns of it, and the token's own row
    const float* queries = q + (long long)head * (K + P);
    const bool owner = rows > 0 && fresh >= 0 && fresh < share;
    const bool turns = threadIdx.x < HEADS * (P / 2);  // a pair of a head's q_pe
    const int of_head = threadIdx.x / (P / 2), at_pair = threadIdx.x % (P / 2);
    float v[HEADS][DEPTH0][4];
    float2 x = make_float2(0.f, 0.f), pe = x, pair = x, turn = x;
#pragma unroll
    for (int a = 0; a < HEADS; a++)
#pragma unroll
        for (int i = 0; i < DEPTH0; i++)
            few_columns(queries + a * (K + P), 64 * ((warp & 1) + 2 * i) + 16 * (lane >> 3) + 2 * t, K,
                        v[a][i]);
    if (owner) x = *(const float2*)(c_kv + 2 * threadIdx.x);
    if (turns) {
        turn = make_float2(cosine[at_pair], sine[at_pair]);
        pair = *(const float2*)(queries + of_head * (K + P) + K + 2 * at_pair);
        if (owner) pe = *(const float2*)(k_pe + 2 * at_pair);
    }
#pragma unroll
    for (int a = 0; a < HEADS; a++) {
        float acc[2] = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < DEPTH0; i++) {
#pragma unroll
            for (int k = 0; k < 4; k++) v[a][i][k] *= FEW_X;
            few_add<WTYPE0>(w0[a][i], few_x(v[a][i], lane), lane, acc);
        }
        few_rows(acc);
        if (t == 0)
            lat[a][warp & 1][16 * (warp / 2) + g] = acc[0],
            lat[a][warp & 1][16 * (warp / 2) + 8 + g] = acc[1];
    }
    if (turns)
        *(unsigned*)(query[of_head] + R + 2 * at_pair) =
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
#pragma unroll
    for (int a = 0; a < HEADS; a++)
        store_there(peer_address(query[a] + 64 * rank + 2 * lane, warp),
                    halves((lat[a][0][2 * lane] + lat[a][1][2 * lane]) * warmer,
                           (lat[a][0][2 * lane + 1] + lat[a][1][2 * lane + 1]) * warmer));
    cluster_sync();

    // ---- scores: each warp has some columns of all rows; a query is a column of B
    barrier_wait(shared_address(&bar), 0);
    constexpr int BANDS = N_ROWS / 16;
    float sums[BANDS][4];
#pragma unroll
    for (int m = 0; m < BANDS; m++) sums[m][0] = sums[m][1] = sums[m][2] = sums[m][3] = 0.f;
#pragma unroll
    for (int i = 0; i < (STEPS + 7) / 8; i++) {
        const int step = warp + 8 * i;
        if (step >= STEPS) break;
        unsigned b[2] = {0u, 0u};
        if (g < HEADS) {
            b[0] = *(const unsigned*)(query[g] + 16 * step + 2 * t);
            b[1] = *(const unsigned*)(query[g] + 16 * step + 8 + 2 * t);
        }
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
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (2 * t + i < HEADS) {
                score[2 * t + i][warp][16 * m + g] = sums[m][i];
                score[2 * t + i][warp][16 * m + 8 + g] = sums[m][2 + i];
            }
    __syncthreads();

    // ---- probabilities: every warp for itself, row lane + 32 i
    constexpr int HELD = N_ROWS / 32;
    const float none = __int_as_float(0xff800000);
    float p[HEADS][HELD], top[HEADS], total[HEADS];
#pragma unroll
    for (int a = 0; a < HEADS; a++) {
        top[a] = none, total[a] = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int row = lane + 32 * i;
            p[a][i] = 0.f;
#pragma unroll
            for (int w = 0; w < 8; w++) p[a][i] += score[a][w][row];
            p[a][i] = row < rows ? p[a][i] * (scale * 1.4426950408889634f) : none;
            top[a] = fmaxf(top[a], p[a][i]);
        }
        top[a] = warp_max(top[a]);
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            p[a][i] = rows > 0 ? exp2f(p[a][i] - top[a]) : 0.f;
            total[a] += p[a][i];
        }
        total[a] = warp_sum(total[a]);
    }

    // ---- values: a warp's 64 columns; a head's probabilities are a row of A
    float out[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
#pragma unroll
    for (int k = 0; k < BANDS; k++) {
        if (16 * k >= rows) break;
        unsigned a[4] = {0u, 0u, 0u, 0u};
#pragma unroll
        for (int of = 0; of < HEADS; of++) {
            float four[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                four[i] = __shfl_sync(~0u, p[of][k / 2], 16 * (k & 1) + 8 * (i / 2) + 2 * t + (i & 1));
            if (g == of) a[0] = halves(four[0], four[1]), a[2] = halves(four[2], four[3]);
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            unsigned b[4];
            ldmatrix_trans(b, tile + (16 * k + (lane & 15)) * LD + 64 * warp + 16 * u + 8 * (lane >> 4));
            const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            mma_f16(out[2 * u], a, b0);
            mma_f16(out[2 * u + 1], a, b1);
        }
    }
    if (g < HEADS) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            store_there(peer_address(&shares[rank][g][8 * i + 2 * t], warp), out[i][0], out[i][1]);
    }
#pragma unroll
    for (int a = 0; a < HEADS; a++)
        if (lane == 0) store_there(peer_address(stats[rank][a], warp), top[a], total[a]);
    cluster_sync();

    // ---- all shares of this CTA's 64 columns merged, and taken out of latent space
#pragma unroll
    for (int a = 0; a < HEADS; a++) {
        float peak = none, weights = 0.f, merged[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < 8; i++) peak = fmaxf(peak, stats[i][a][0]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float w = stats[i][a][0] > none ? exp2f(stats[i][a][0] - peak) : 0.f;
            weights += w * stats[i][a][1];
#pragma unroll
            for (int k = 0; k < 4; k++)
                merged[k] += w * shares[i][a][16 * (lane >> 3) + 2 * t + (k & 1) + 8 * (k / 2)];
        }
#pragma unroll
        for (int k = 0; k < 4; k++) merged[k] = weights > 0.f ? merged[k] / weights * FEW_X : 0.f;
        const FewX<0> in = few_x(merged, lane);
#pragma unroll
        for (int k = 0; k < OWN1; k++) {
            float rows_of[2] = {0.f, 0.f};
            few_add<WTYPE1>(w1[a][k], in, lane, rows_of);
            few_rows(rows_of);
            if (t == 0) {
                store_there(peer_address(&outs[rank][a * OWN1 + k][g], warp),
                            __float_as_uint(rows_of[0]));
                store_there(peer_address(&outs[rank][a * OWN1 + k][8 + g], warp),
                            __float_as_uint(rows_of[1]));
            }
        }
    }
    cluster_sync();
    if (threadIdx.x < 16 * HEADS * OWN1) {
        const int own = threadIdx.x / 16, at = 16 * (rank + 8 * (own % OWN1)) + threadIdx.x % 16;
        float sum = outs[0][own][threadIdx.x % 16];
#pragma unroll
        for (int i = 1; i < 8; i++) sum += outs[i][own][threadIdx.x % 16];
        if (at < V) o[(long long)(head + own / OWN1) * V + at] = sum;
    }
}
