// Op        latent: what absorbed attention needs of a step's tokens, in one launch:
//           cache row pos = rms_norm(c_kv) * norm, then rope(k_pe);
//           q = temper * (k_b q_nope, rope(q_pe)), temper = 1 + scale ln(1 + floor(pos / length))
// Shapes    q_lat [n, h, r] rows of ld_lat, q_pe [n, h, p] rows of ld_pe (one array when -gap f16),
//           cache and scales as in mla_decode_mma.cu, q [n, h, k + p], c_kv [n, r] and k_pe [n, p] rows
//           of ldkv, norm [r], k_b [h, r, k] in tiles, cos and sin [n, p / 2], pos [n] (-1: no token)
// Dtypes    OUT (__half or float); cache CACHE_KIND (mla_store.cuh); all else float32. WTYPE of k_b;
//           WTYPE -1: q_lat_f32 [n, h, r] comes from another launch
// Grid      (h * ceil(r / 64) + tokens of a group, ceil(n / that)), 128 threads. Of a group of tokens
//           (1 if TOKEN_BLOCKS is 0, else 4 TOKEN_BLOCKS) a warp computes 16 rows of one head; a head's
//           first CTA rotates its q_pe; the last CTAs write a token's cache row each
// Assumes   r a multiple of 16, k and p even, R = r, K = k, P = p
// Numerics  k_b as in matvec.cuh (NMSE about 2e-11), with TOKEN_BLOCKS 8 as in heads_many.cuh (1e-7);
//           norm: sum of squares by a fixed tree
// Bound by  bytes of k_b
// Variants  R=512 K=128 P=64 CACHE_KIND=0 OUT=__half WTYPE=8 TOKEN_BLOCKS=0;
//           R=512 K=192 P=64 CACHE_KIND=3 OUT=__half WTYPE=12 TOKEN_BLOCKS=4;
//           R=256 K=64 P=64 CACHE_KIND=1 OUT=float WTYPE=1 TOKEN_BLOCKS=2;
//           R=512 K=128 P=64 CACHE_KIND=0 OUT=__half WTYPE=8 TOKEN_BLOCKS=8;
//           R=512 K=192 P=64 CACHE_KIND=0 OUT=__half WTYPE=14 TOKEN_BLOCKS=8;
//           R=512 K=128 P=64 CACHE_KIND=2 OUT=float WTYPE=-1 TOKEN_BLOCKS=1
// Spills    none
// Sources   own
// Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_attention.py
#include "heads_many.cuh"
#include "matvec_cta.cuh"
#include "mla_store.cuh"
#include "reduce.cuh"

constexpr int GROUP = TOKEN_BLOCKS ? 4 * TOKEN_BLOCKS : 1;  // tokens of a CTA
constexpr int PARTS = (R + 63) / 64;            // CTAs of a head

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

// Rotates this head's q_pe of the CTA's tokens.
__device__ __forceinline__ void rotate(OUT* q_pe, int ld_pe, const float* q, const float* cosine,
                                       const float* sine, const int* pos, int n, int h, int head,
                                       int first, float scale, int length) {
    for (int i = threadIdx.x; i < GROUP * (P / 2); i += 128) {
        const int t = first + i / (P / 2), pair = i % (P / 2);
        if (t >= n) break;
        const long long at = (long long)t * h + head;
        const float2 x = *(const float2*)(q + at * (K + P) + K + 2 * pair);
        const float c = cosine[t * (P / 2) + pair], s = sine[t * (P / 2) + pair];
        const int last = pos[t];
        if (last < 0) continue;
        const float warmer = temper(last, scale, length);
        put(q_pe + at * ld_pe + 2 * pair, (x.x * c - x.y * s) * warmer);
        put(q_pe + at * ld_pe + 2 * pair + 1, (x.x * s + x.y * c) * warmer);
    }
}

// Writes a token's cache row. All loads are under way at once and every warp sums the squares for
// itself: this is the longest way through the kernel. Warp w writes blocks w, w + 4, ..
__device__ __forceinline__ void write_row(char* cache, __half* scales, const float* c_kv,
                                          const float* k_pe, const float* norm,
                                          const float* cosine, const float* sine, const int* pos,
                                          int n, int t, long long ldkv, float eps) {
    constexpr int SUMMED = (R + 31) / 32, BLOCKS = (R + P + 31) / 32, OWN = (BLOCKS + 3) / 4;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float weight[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int at = 32 * (warp + 4 * i) + lane;
        weight[i] = at < R ? norm[at] : 0.f;
    }
    pdl_wait();
    if (t >= n) return;  // the whole CTA
    const int last = pos[t];
    float squares = 0.f, x[OWN], c[OWN], s[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int at = 32 * (warp + 4 * i) + lane, pair = (at - R) / 2;
        x[i] = c[i] = s[i] = 0.f;
        if (at < R) {
            x[i] = c_kv[t * ldkv + at];
        } else if (at < R + P) {
            x[i] = k_pe[t * ldkv + at - R];
            c[i] = cosine[t * (P / 2) + pair], s[i] = sine[t * (P / 2) + pair];
        }
    }
#pragma unroll
    for (int i = 0; i < SUMMED; i++) {
        const float v = 32 * i + lane < R ? c_kv[t * ldkv + 32 * i + lane] : 0.f;
        squares += v * v;
    }
    const float root = sqrtf(warp_sum(squares) / R + eps);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int at = 32 * (warp + 4 * i) + lane;
        const float other = __shfl_xor_sync(~0u, x[i], 1);  // of the pair; R is even
        float y = at < R ? x[i] / root * weight[i] : 0.f;
        if (at >= R && at < R + P) y = lane & 1 ? other * s[i] + x[i] * c[i] : x[i] * c[i] - other * s[i];
        if (last >= 0 && warp + 4 * i < BLOCKS)
            store_block<CACHE_KIND>(cache, scales, last, warp + 4 * i, y, R + P);
    }
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(128)
latent(OUT* q_lat, OUT* q_pe, char* cache, __half* scales, const float* q, const float* q_lat_f32,
       const float* c_kv, const float* k_pe, const float* norm, const unsigned char* k_b,
       const float* cosine, const float* sine, const int* pos, int n, int h, int ld_lat, int ld_pe,
       long long ldkv, float eps, float scale, int length) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.y * GROUP;
    pdl_launch();
    if (blockIdx.x >= h * PARTS) {
        write_row(cache, scales, c_kv, k_pe, norm, cosine, sine, pos, n,
                  first + blockIdx.x - h * PARTS, ldkv, eps);
        return;
    }
    const int head = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
#if WTYPE < 0
    pdl_wait();
    if (part == 0)
        rotate(q_pe, ld_pe, q, cosine, sine, pos, n, h, head, first, scale, length);
    for (int i = threadIdx.x; i < GROUP * 64; i += 128) {
        const int t = first + i / 64, o = part * 64 + i % 64;
        if (t >= n || o >= R || pos[t] < 0) continue;
        const long long at = (long long)t * h + head;
        put(q_lat + at * ld_lat + o, q_lat_f32[at * R + o] * temper(pos[t], scale, length));
    }
#elif TOKEN_BLOCKS == 8 && !defined(SIMT) && __CUDA_ARCH__ < 800
    pdl_wait();  // hosts ask for TOKEN_BLOCKS 8 from compute capability 8.0 on
#elif TOKEN_BLOCKS == 8
    constexpr int LD = MANY_LD<K>, TILES = (K + Tile<WTYPE>::edge - 1) / Tile<WTYPE>::edge *
                                           (Tile<WTYPE>::edge / 64);
    __align__(16) __shared__ __half x[GROUP * LD];
    const int row_tile = part * 4 + warp, n_row_tiles = (R + 15) / 16;
    ManyTiles<WTYPE, K> w;
    w.load(tile_view<WTYPE>(k_b, (long long)h * n_row_tiles, TILES),
           (long long)head * n_row_tiles + min(row_tile, n_row_tiles - 1));
    const float boost = tile_boost<WTYPE>(k_b);
    pdl_wait();
    const float* queries = q + ((long long)first * h + head) * (K + P);
    for (int i = threadIdx.x; i < GROUP * (LD / 2); i += 128) {
        const int t = i / (LD / 2), c = i % (LD / 2) * 2;
        float2 two = make_float2(0.f, 0.f);
        if (first + t < n && c < K) two = *(const float2*)(queries + (long long)t * h * (K + P) + c);
        *(__half2*)(x + t * LD + c) = __halves2half2(many_half(two.x), many_half(two.y));
    }
    if (part == 0)
        rotate(q_pe, ld_pe, q, cosine, sine, pos, n, h, head, first, scale, length);
    __syncthreads();
    if (row_tile >= n_row_tiles) return;
    float acc[GROUP / 8][4];
    many_product<WTYPE, K, GROUP>(acc, w, x, boost);
    const float result = many_result<WTYPE>(k_b);
#pragma unroll
    for (int i = 0; i < GROUP / 8 * 4; i++) {
        const int t = first + 8 * (i / 4) + 2 * (lane & 3) + (i & 1);
        const int o = 16 * row_tile + (lane >> 2) + 8 * (i >> 1 & 1);
        if (t < n && pos[t] >= 0)
            put(q_lat + ((long long)t * h + head) * ld_lat + o,
                acc[i / 4][i % 4] * result * temper(pos[t], scale, length));
    }
#else
    constexpr int WIDTH = Tile<WTYPE>::edge, TILES = (K + WIDTH - 1) / WIDTH * WIDTH / 64;
    constexpr int DEPTH = TILES < 4 ? TILES : 4, USED = (K + 63) / 64;
    using Reader = FewReader<DEPTH, TOKEN_BLOCKS, false>;
    const int row_tile = part * 4 + warp;
    const bool there = row_tile * 16 < R;
    FewTiles<DEPTH, WTYPE> tiles;
    tiles.view = tile_view<WTYPE>(k_b, (long long)h * (R / 16), TILES);
    tiles.first = ((long long)head * (R / 16) + row_tile) * TILES;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) tiles.load(i, i, lane, there && i < USED);
    pdl_wait();
    const float* queries = q + ((long long)first * h + head) * (K + P);
#if TOKEN_BLOCKS
    // to shared memory, in one go: fragments come out of it one after another
    __align__(16) __shared__ float staged[GROUP][K + 8];
    for (int i = threadIdx.x; i < GROUP * (K / 2); i += 128) {
        const int t = i / (K / 2), c = i % (K / 2) * 2;
        float2 two = make_float2(0.f, 0.f);
        if (first + t < n) two = *(const float2*)(queries + (long long)t * h * (K + P) + c);
        *(float2*)(staged[t] + c) = two;
    }
    __syncthreads();
    const FewIn in = {staged[0], nullptr, K + 8, GROUP, K, 0};
#else
    const FewIn in = {queries, nullptr, 0, 1, K, 0};
#endif
    Reader x;
    float acc[1][Reader::sums];
#pragma unroll
    for (int i = 0; i < Reader::sums; i++) acc[0][i] = 0.f;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) x.fetch(in, i, i, lane, i < USED);
    if (part == 0)
        rotate(q_pe, ld_pe, q, cosine, sine, pos, n, h, head, first, scale, length);
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
