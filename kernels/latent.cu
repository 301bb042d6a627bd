// Op        latent: what absorbed attention needs of a step's tokens, in one launch:
//           cache row pos = rms_norm(c_kv) * norm, then rope(k_pe);
//           q = temper * (k_b q_nope, rope(q_pe)), temper = 1 + scale ln(1 + floor(pos / length))
// Shapes    q_lat [n, h, r] rows of ld_lat, q_pe [n, h, p] rows of ld_pe (one array when -gap f16),
//           cache and scales as in mla_decode_mma.cu, q [n, h, k + p], c_kv [n, r] and k_pe [n, p] rows
//           of ldkv, norm [r], k_b [h, r, k] in tiles, cos and sin [n, p / 2], pos [n] (-1: no token)
// Dtypes    OUT (__half or float); cache CACHE_KIND (mla_store.cuh); all else float32. WTYPE of k_b;
//           WTYPE -1: q_lat_f32 [n, h, r] comes from another launch
// Grid      (h * ceil(r / 64) + tokens of a group, ceil(n / that)), 128 threads. Of a group of tokens
//           (1 if TOKEN_BLOCKS is 0, else 4 TOKEN_BLOCKS) a warp computes 16 rows of one head; the last CTAs
//           rotate one token's q_pe and write its cache row
// Assumes   r a multiple of 16, k and p even, R = r, K = k, P = p
// Numerics  k_b as in matvec.cuh (NMSE about 2e-11); norm: sum of squares by a fixed tree
// Bound by  bytes of k_b
// Variants  R=512 K=128 P=64 CACHE_KIND=0 OUT=__half WTYPE=8 TOKEN_BLOCKS=0;
//           R=512 K=192 P=64 CACHE_KIND=3 OUT=__half WTYPE=12 TOKEN_BLOCKS=4;
//           R=256 K=64 P=64 CACHE_KIND=1 OUT=float WTYPE=1 TOKEN_BLOCKS=2;
//           R=512 K=128 P=64 CACHE_KIND=2 OUT=float WTYPE=-1 TOKEN_BLOCKS=1
// Spills    none
// Sources   own
// Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_attention.py
#include "matvec_cta.cuh"
#include "mla_store.cuh"

constexpr int GROUP = TOKEN_BLOCKS ? 4 * TOKEN_BLOCKS : 1;  // tokens of a CTA
constexpr int PARTS = (R + 63) / 64;            // CTAs of a head
constexpr int PADDED = (R + P + 31) / 32 * 32;

// ---------------------------------------------------------------- device helpers ------------
__device__ __forceinline__ void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }

__device__ __forceinline__ float temper(int pos, float scale, int length) {
    return scale == 0.f ? 1.f : 1.f + scale * log1pf((float)(pos / length));
}

// One token's sums put together; of several tokens, each lane has its own already.
template <int SUMS>
__device__ __forceinline__ void whole_rows(float (&acc)[SUMS]) {
    if constexpr (TOKEN_BLOCKS == 0) few_rows(acc);
}

// Rotates a token's q_pe of all heads and writes its cache row.
__device__ __forceinline__ void own_token(
        OUT* q_pe, int ld_pe, char* cache, __half* scales, const float* q, const float* c_kv,
        const float* k_pe, const float* norm, const float* cosine, const float* sine, const int* pos,
        int n, int h, int t, long long ldkv, float eps, float scale, int length) {
    __shared__ float row[PADDED], angle[P];  // cosines, then sines
    float weight[(R + 127) / 128], x[(R + 127) / 128], squares = 0.f;
#pragma unroll
    for (int i = 0; i < (R + 127) / 128; i++) {
        const int at = threadIdx.x + 128 * i;
        weight[i] = at < R ? norm[at] : 0.f;
    }
    pdl_wait();
    pdl_launch();
    if (t >= n || pos[t] < 0) return;  // the whole CTA
    const float warmer = temper(pos[t], scale, length);
#pragma unroll
    for (int i = 0; i < (R + 127) / 128; i++) {
        const int at = threadIdx.x + 128 * i;
        x[i] = at < R ? c_kv[t * ldkv + at] : 0.f;
        squares += x[i] * x[i];
    }
    for (int i = threadIdx.x; i < P; i += 128)
        angle[i] = i < P / 2 ? cosine[t * (P / 2) + i] : sine[t * (P / 2) + i - P / 2];
    const float root = sqrtf(block_sum(squares) / R + eps);  // a barrier: angles are there
#pragma unroll
    for (int i = 0; i < (R + 127) / 128; i++)
        if (threadIdx.x + 128 * i < R) row[threadIdx.x + 128 * i] = x[i] / root * weight[i];
    for (int i = R + P + threadIdx.x; i < PADDED; i += 128) row[i] = 0.f;
    for (int i = threadIdx.x; i < (h + 1) * (P / 2); i += 128) {  // head h is k_pe
        const int head = i / (P / 2), pair = i % (P / 2);
        const long long at = (long long)t * h + head;
        const float* in = head == h ? k_pe + t * ldkv : q + at * (K + P) + K;
        const float even = in[2 * pair], odd = in[2 * pair + 1];
        const float c = angle[pair], s = angle[P / 2 + pair];
        const float a = even * c - odd * s, b = even * s + odd * c;
        if (head == h) {
            row[R + 2 * pair] = a, row[R + 2 * pair + 1] = b;
        } else {
            put(q_pe + at * ld_pe + 2 * pair, a * warmer);
            put(q_pe + at * ld_pe + 2 * pair + 1, b * warmer);
        }
    }
    __syncthreads();
    store_row<CACHE_KIND>(cache, scales, pos[t], row, R + P);
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(128)
latent(OUT* q_lat, OUT* q_pe, char* cache, __half* scales, const float* q, const float* q_lat_f32,
       const float* c_kv, const float* k_pe, const float* norm, const unsigned char* k_b,
       const float* cosine, const float* sine, const int* pos, int n, int h, int ld_lat, int ld_pe,
       long long ldkv, float eps, float scale, int length) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.y * GROUP;
    if (blockIdx.x >= h * PARTS) {
        own_token(q_pe, ld_pe, cache, scales, q, c_kv, k_pe, norm, cosine, sine, pos, n, h,
                  first + blockIdx.x - h * PARTS, ldkv, eps, scale, length);
        return;
    }
    const int head = blockIdx.x / PARTS;
#if WTYPE < 0
    pdl_wait();
    pdl_launch();
    for (int i = threadIdx.x; i < GROUP * 64; i += 128) {
        const int t = first + i / 64, o = blockIdx.x % PARTS * 64 + i % 64;
        if (t >= n || o >= R || pos[t] < 0) continue;
        const long long at = (long long)t * h + head;
        put(q_lat + at * ld_lat + o, q_lat_f32[at * R + o] * temper(pos[t], scale, length));
    }
#else
    constexpr int WIDTH = Tile<WTYPE>::edge, TILES = (K + WIDTH - 1) / WIDTH * WIDTH / 64;
    constexpr int DEPTH = TILES < 4 ? TILES : 4, USED = (K + 63) / 64;
    using Reader = FewReader<DEPTH, TOKEN_BLOCKS, false>;
    const int row_tile = blockIdx.x % PARTS * 4 + warp;
    const bool there = row_tile * 16 < R;
    FewTiles<DEPTH, WTYPE> tiles;
    tiles.view = tile_view<WTYPE>(k_b, (long long)h * (R / 16), TILES);
    tiles.first = ((long long)head * (R / 16) + row_tile) * TILES;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) tiles.load(i, i, lane, there && i < USED);
    pdl_wait();
    pdl_launch();
    const FewIn in = {q + ((long long)first * h + head) * (K + P), nullptr, (long long)h * (K + P),
                      n - first, K, 0};
    Reader x;
    float acc[1][Reader::sums];
#pragma unroll
    for (int i = 0; i < Reader::sums; i++) acc[0][i] = 0.f;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) x.fetch(in, i, i, lane, i < USED);
    for (int at = 0; at < USED; at += DEPTH)
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const int next = at + i + DEPTH;
            if (at + i < USED) tiles.add(i, x.fragment(in, i, at + i, lane, true), lane, acc);
            if (USED > DEPTH) {
                tiles.load(i, next, lane, there && next < USED);
                x.fetch(in, i, next, lane, next < USED);
            }
        }
    // rows g and g + 8 of each token
    whole_rows(acc[0]);
#pragma unroll
    for (int i = 0; i < Reader::sums; i++) {
        const int t = first + (TOKEN_BLOCKS ? 4 * (i / 2) + (lane & 3) : 0);
        const bool mine = there && t < n && (TOKEN_BLOCKS || (lane & 3) == i);
        if (!mine || pos[t] < 0) continue;
        const int o = 16 * row_tile + (lane >> 2) + 8 * (i & 1);
        put(q_lat + ((long long)t * h + head) * ld_lat + o,
            acc[0][i] * temper(pos[t], scale, length));
    }
#endif
}
