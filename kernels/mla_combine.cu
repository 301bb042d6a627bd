// Op        merges the splits of absorbed attention by their maxima and sums,
//           o_lat = sum_s w_s part_s / sum_s w_s sum_s, w_s = 2^(top_s - max top), and takes it out
//           of latent space: o = v_b o_lat
// Shapes    mla_combine: o [n, h * v], part [n h, splits, r], stat [n h, splits, 2], v_b [h, v, r] in
//           tiles, pos [n]; mla_merge_f32 or mla_merge_rows_f32, and mla_values: the two halves, with
//           o_lat [n, h, r] between
//           mla_combine_f32, the plain kernels' twin: o [n, h, r], part [n, h, splits, r + 2], base e
// Dtypes    float32; WTYPE of v_b
// Grid      mla_combine (CLUSTER h, n), 256 threads: a cluster of CLUSTER (4 or 8) CTAs takes a head; each
//           merges as much of the columns, hands them to the others and computes as many row tiles of v_b
//           mla_merge_f32 (r / SLICE, h, n), 256; mla_merge_rows_f32 (ceil(n h / 8)), 256: a warp a row;
//           mla_values (h * ceil(v / 16), ceil(n / (4 TOKEN_BLOCKS))), 256
//           mla_combine_many (h ceil(v / 128), ceil(n / 16)), 256: merges 16 tokens, then a warp a row
//           tile; mla_combine_f32 (n h), 256
// Assumes   R = r, a multiple of 32, V = v; at most 256 splits; SLICE a multiple of 4,
//           at most 256, divides r; pos is complete when this kernel starts (rope.cu sees to it);
//           mla_combine needs clusters: compute capability 9.0; mla_combine_many 8.0
// Numerics  splits in a fixed order, groups of them summed side by side; v_b as in matvec.cuh, of
//           mla_combine_many as in heads_many.cuh (1e-7); no live split gives 0
// Bound by  bytes of v_b and of part that live splits wrote: r * live * 4 a row
// Variants  SLICE=64; SLICE=32; R=512; R=512 V=128 WTYPE=8 CLUSTER=8; R=512 V=256 WTYPE=12 CLUSTER=4;
//           R=512 V=128 WTYPE=8 TOKEN_BLOCKS=4; R=256 V=128 WTYPE=14 TOKEN_BLOCKS=1;
//           R=512 V=128 WTYPE=8 MANY=1; R=256 V=256 WTYPE=12 MANY=1
// Spills    none
// Sources   own
// Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_attention.py
#include "cluster.cuh"
#include "mla_merge.cuh"
#include "pdl.cuh"

#include "heads_many.cuh"
#include "matvec_cta.cuh"

#ifdef V

constexpr int ROW_TILES = (V + 15) / 16, EDGE = Tile<WTYPE>::edge;
constexpr int TILES = (R + EDGE - 1) / EDGE * EDGE / 64, USED = (R + 63) / 64;  // column tiles
#endif

// ---------------------------------------------------------------- kernels -------------------
#if CLUSTER > 1 && __CUDA_ARCH__ >= 900
constexpr int SHARE = R / CLUSTER, OWN = (ROW_TILES + CLUSTER - 1) / CLUSTER;  // columns merged; row tiles of a CTA
constexpr int DEPTH = (USED + 7) / 8;                    // column tiles of a warp

extern "C" __global__ void __cluster_bounds__(256)
mla_combine(float* o, const float* part, const float* stat, const unsigned char* v_b, const int* pos,
            int n, int h, int splits, int top_k) {
    __align__(16) __shared__ float x[CLUSTER * SHARE];
    __shared__ FewSums<8, OWN, 1> sums;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int head = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, t = blockIdx.y;
    pdl_launch();
    cluster_arrive();  // seen once all have started
    const TileView<WTYPE> view = tile_view<WTYPE>(v_b, (long long)h * ROW_TILES, TILES);
    TileData<WTYPE> w[OWN][DEPTH];
#pragma unroll
    for (int k = 0; k < OWN; k++)
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            const int row_tile = rank + CLUSTER * k, col_tile = warp + 8 * i;
            few_tile<WTYPE>(view, ((long long)head * ROW_TILES + row_tile) * TILES + col_tile, lane,
                            row_tile < ROW_TILES && col_tile < USED, w[k][i]);
        }
    const long long row = (long long)t * h + head;
    const int live = live_splits(pos, n, position(pos, t), top_k, splits);
    pdl_wait();
    const float y = merge_splits<SHARE>(part + row * splits * R, stat + row * splits * 2, live, R,
                                        rank * SHARE);
    cluster_wait();
    if (threadIdx.x < SHARE) {  // to everybody's x
#pragma unroll
        for (int i = 0; i < CLUSTER; i++) store_there(peer_address(x + rank * SHARE + threadIdx.x, i), y);
    }
    cluster_sync();
    float acc[OWN][2];
#pragma unroll
    for (int k = 0; k < OWN; k++) acc[k][0] = acc[k][1] = 0.f;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        float v[4];
        few_columns(x, 64 * (warp + 8 * i) + 16 * (lane >> 3) + 2 * (lane & 3), R, v);
#pragma unroll
        for (int c = 0; c < 4; c++) v[c] *= FEW_X;
        const FewX<0> b = few_x(v, lane);
#pragma unroll
        for (int k = 0; k < OWN; k++) few_add<WTYPE>(w[k][i], b, lane, acc[k]);
    }
    few_store(sums, acc);
    __syncthreads();
    if (threadIdx.x < 16 * OWN) {
        const int row_tile = rank + CLUSTER * (threadIdx.x / 16), at = threadIdx.x % 16;
        if (16 * row_tile + at < V)
            o[row * V + 16 * row_tile + at] = sums.sum(threadIdx.x / 16, 0, at);
    }
}
#endif

#if defined(MANY) && (defined(SIMT) || __CUDA_ARCH__ >= 800)
extern "C" __global__ void __launch_bounds__(256, 1)
mla_combine_many(float* o, const float* part, const float* stat, const unsigned char* v_b,
                 const int* pos, int n, int h, int splits, int top_k) {
    constexpr int LD = MANY_LD<R>, TOKENS = 16, BANDS = (ROW_TILES + 7) / 8;
    __align__(16) __shared__ __half x[TOKENS * LD];
    __shared__ float peaks[TOKENS], inverses[TOKENS];
    __shared__ int lives[TOKENS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int head = blockIdx.x / BANDS, row_tile = blockIdx.x % BANDS * 8 + warp;
    const int first = blockIdx.y * TOKENS;
    pdl_launch();
    ManyTiles<WTYPE, R> w;
    w.load(tile_view<WTYPE>(v_b, (long long)h * ROW_TILES, TILES),
           (long long)head * ROW_TILES + min(row_tile, ROW_TILES - 1));
    const float boost = tile_boost<WTYPE>(v_b);
    int live[TOKENS / 8];  // of this warp's tokens
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        const int t = first + warp + 8 * i;
        live[i] = live_splits(pos, n, t < n ? position(pos, t) : -1, top_k, splits);
    }
    pdl_wait();
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        const long long row = (long long)(first + warp + 8 * i) * h + head;
        float peak = __int_as_float(0xff800000), total = 0.f;
        for (int s = lane; s < live[i]; s += 32) peak = fmaxf(peak, stat[(row * splits + s) * 2]);
        peak = warp_max(peak);
        for (int s = lane; s < live[i]; s += 32) {
            const float top = stat[(row * splits + s) * 2], sum = stat[(row * splits + s) * 2 + 1];
            if (sum > 0.f) total += sum * exp2f(top - peak);
        }
        total = warp_sum(total);
        if (lane == 0) {
            peaks[warp + 8 * i] = peak, lives[warp + 8 * i] = live[i];
            inverses[warp + 8 * i] = live[i] ? 1.f / total : 0.f;
        }
    }
    __syncthreads();
    constexpr int ITEMS = (TOKENS * (LD / 4) + 255) / 256;  // quadruples of a thread
    float4 y[ITEMS];
    int most = 0;
#pragma unroll
    for (int i = 0; i < TOKENS; i++) most = max(most, lives[i]);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) y[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s = 0; s < most; s++)
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int at = threadIdx.x + 256 * i, t = at / (LD / 4), c = at % (LD / 4) * 4;
            if (t >= TOKENS || c >= R || s >= lives[t]) continue;
            const long long row = (long long)(first + t) * h + head;
            const float4 v = *(const float4*)(part + (row * splits + s) * R + c);
            const float2 st = *(const float2*)(stat + (row * splits + s) * 2);
            const float w = st.y > 0.f ? exp2f(st.x - peaks[t]) * inverses[t] : 0.f;
            y[i].x += w * v.x, y[i].y += w * v.y, y[i].z += w * v.z, y[i].w += w * v.w;
        }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = threadIdx.x + 256 * i, t = at / (LD / 4), c = at % (LD / 4) * 4;
        if (t >= TOKENS) break;
        __half2* to = (__half2*)(x + t * LD + c);
        to[0] = __halves2half2(many_half(y[i].x), many_half(y[i].y));
        to[1] = __halves2half2(many_half(y[i].z), many_half(y[i].w));
    }
    __syncthreads();
    if (row_tile >= ROW_TILES) return;
    float acc[TOKENS / 8][4];
    many_product<WTYPE, R, TOKENS>(acc, w, x, boost);
    const float result = many_result<WTYPE>(v_b);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        const int t = first + 8 * (i / 4) + 2 * (lane & 3) + (i & 1);
        const int at = 16 * row_tile + (lane >> 2) + 8 * (i >> 1 & 1);
        if (t < n && at < V) o[((long long)t * h + head) * V + at] = acc[i / 4][i % 4] * result;
    }
}
#endif

#ifdef TOKEN_BLOCKS
extern "C" __global__ void __launch_bounds__(256)
mla_values(float* o, const float* o_lat, const unsigned char* v_b, int n, int h) {
    __shared__ FewSums<8, 1, 4 * TOKEN_BLOCKS> sums;
    const int head = blockIdx.x / ROW_TILES, row_tile = blockIdx.x % ROW_TILES;
    const int first = blockIdx.y * 4 * TOKEN_BLOCKS;
    pdl_launch();
    FewTiles<1, WTYPE> tiles;
    tiles.view = tile_view<WTYPE>(v_b, (long long)h * ROW_TILES, TILES);
    tiles.first = (long long)blockIdx.x * TILES;
    const FewIn in = {o_lat + ((long long)first * h + head) * R, nullptr, (long long)h * R, n - first, R, 0};
    few_cta<8, 1, TOKEN_BLOCKS, false>(sums, tiles, in, USED);
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * TOKEN_BLOCKS; i += 256) {
        const int t = first + i / 16;
        if (t < n && 16 * row_tile + i % 16 < V)
            o[((long long)t * h + head) * V + 16 * row_tile + i % 16] =
                sums.sum(0, i / 16, i % 16);
    }
}
#endif

#if defined(R) && !defined(V) && !defined(SLICE)
extern "C" __global__ void __launch_bounds__(256)
mla_merge_rows_f32(float* o, const float* part, const float* stat, const int* pos, int n, int h,
                   int splits, int top_k) {
    constexpr int OWN = (R / 4 + 31) / 32;  // quadruples of columns of a lane
    const int lane = threadIdx.x & 31, row = blockIdx.x * 8 + (threadIdx.x >> 5);
    pdl_launch();
    const int last = row < n * h ? position(pos, row / h) : -1;
    const int live = live_splits(pos, n, last, top_k, splits);
    pdl_wait();
    if (row >= n * h) return;
    const float* stats = stat + (long long)row * splits * 2;
    float peak = __int_as_float(0xff800000), total = 0.f;
    for (int s = 0; s < live; s++) peak = fmaxf(peak, stats[2 * s]);
    float4 sum[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int s = 0; s < live; s++) {
        const float w = stats[2 * s + 1] > 0.f ? exp2f(stats[2 * s] - peak) : 0.f;
        total += w * stats[2 * s + 1];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int c = 4 * (lane + 32 * i);
            if (c >= R) break;
            const float4 x = *(const float4*)(part + ((long long)row * splits + s) * R + c);
            sum[i].x += w * x.x, sum[i].y += w * x.y, sum[i].z += w * x.z, sum[i].w += w * x.w;
        }
    }
    const float inverse = live ? 1.f / total : 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int c = 4 * (lane + 32 * i);
        if (c >= R) break;
        *(float4*)(o + (long long)row * R + c) = make_float4(
            sum[i].x * inverse, sum[i].y * inverse, sum[i].z * inverse, sum[i].w * inverse);
    }
}
#endif

#ifdef SLICE
extern "C" __global__ void __launch_bounds__(256)
mla_merge_f32(float* o, const float* part, const float* stat, const int* pos, int n, int splits,
              int r, int top_k) {
    const int head = blockIdx.y, t = blockIdx.z, first = blockIdx.x * SLICE;
    const long long row = (long long)t * gridDim.y + head;
    pdl_launch();
    const int live = live_splits(pos, n, position(pos, t), top_k, splits);
    pdl_wait();
    const float y =
        merge_splits<SLICE>(part + row * splits * r, stat + row * splits * 2, live, r, first);
    if (threadIdx.x < SLICE) o[row * r + first + threadIdx.x] = y;
}
#endif

extern "C" __global__ void mla_combine_f32(float* o, const float* part, int splits, int r) {
    pdl_launch();
    pdl_wait();
    const float* in = part + (long long)blockIdx.x * splits * (r + 2);
    float peak = __int_as_float(0xff800000), total = 0.f;
    for (int s = 0; s < splits; s++)
        if (in[s * (r + 2) + r + 1] > 0.f) peak = fmaxf(peak, in[s * (r + 2) + r]);
    for (int s = 0; s < splits; s++) {
        const float sum = in[s * (r + 2) + r + 1];
        if (sum > 0.f) total += sum * expf(in[s * (r + 2) + r] - peak);
    }
    for (int i = threadIdx.x; i < r; i += blockDim.x) {
        float v = 0.f;
        for (int s = 0; s < splits; s++) {
            const float* split = in + s * (r + 2);
            if (split[r + 1] > 0.f) v += split[i] * expf(split[r] - peak);
        }
        o[(long long)blockIdx.x * r + i] = total > 0.f ? v / total : 0.f;
    }
}
