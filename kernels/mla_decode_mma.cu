// Op        absorbed attention on tensor cores (split-KV): for each query row (a token's head)
//           score_j = scale * q . row_j over j <= pos, weights = softmax, o = sum_j weight_j row_j[:r]
// Shapes    part [n h, splits, r] (unnormalised o), stat [n h, splits, 2] (maximum of score * log2 e,
//           sum), q [n h, r + p], cache [n_ctx, r + p], scales [n_ctx, ceil((r + p) / 32)] (q8_0),
//           chosen [n, top_k] (CHOSEN 1: the rows to attend to; -1 and rows beyond pos are left out),
//           pos [n] (-1: attends to nothing)
// Dtypes    q float16; cache CACHE_KIND 0 float16, 1 bfloat16, 2 float32, 3 int8 with float16 scales; its
//           values are rounded to float16 and so are probabilities (-gap f16); sums float32
// Grid      (splits, ceil(rows / (16 MT)), z), MT 1 or 2; z 1 and rows = n h, or CHOSEN: z n and
//           rows = h. 256 threads, and from 9.0 on, with a float16 cache and CHOSEN 0, 64 MT that ask for rows. Shared
//           bytes: cuda_attention.decode_shared
// Assumes   r a multiple of 16, r + p of 8, 16-byte aligned rows; rows up to pos are written; EARLY 1:
//           pos and rows below the step's first position are complete when this kernel starts
//           (rope.cu sees to it); only rows that the launch before writes come after its end
// Numerics  online softmax per tile of 32 rows; scores are summed by 4 warps over parts of r + p in
//           order; dead splits write nothing. NMSE against float64 of the rounded inputs about 4e-8:
//           the rounding of probabilities
// Bound by  bytes of the cache, once per 16 MT query rows
// Variants  R=512 P=64 MT=1 CACHE_KIND=0 STAGES=5 CHOSEN=0 EARLY=1;
//           R=512 P=64 MT=2 CACHE_KIND=0 STAGES=5 CHOSEN=0 EARLY=1;
//           R=512 P=64 MT=2 CACHE_KIND=0 STAGES=2 CHOSEN=1 EARLY=0;
//           R=256 P=64 MT=1 CACHE_KIND=3 STAGES=5 CHOSEN=0 EARLY=1;
//           R=512 P=64 MT=1 CACHE_KIND=2 STAGES=2 CHOSEN=0 EARLY=0;
//           R=32 P=8 MT=2 CACHE_KIND=1 STAGES=5 CHOSEN=1 EARLY=0
// Needs     8.0
// Sources   online softmax: arXiv 1805.02867; split-KV: arXiv 2311.01282; own
// Tested by tests/kernels/test_mla.py, tests/gpu/test_cuda_attention.py
#include "mla_rows.cuh"

// ---------------------------------------------------------------- device helpers ------------
// Scores of this warp's part of r + p and half of the tile, to s.score.
__device__ __forceinline__ void score_part(const Shared& s, const __half* tile,
                                           const unsigned (&q)[MT][PART][4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, kg = warp % KG, ng = warp / KG;
    float acc[MT][CHAINS][2][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 8 * CHAINS; i++) acc[m][i / 8][i / 4 % 2][i % 4] = 0.f;
    // ldmatrix x4: rows 0-7 and 8-15 of the half, each at columns 0-7 and 8-15 of the step
    const __half* rows = tile + (16 * ng + (lane >> 4) * 8 + (lane & 7)) * LD + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int i = 0; i < PART; i++) {
        const int step = kg * PART + i;
        if (step >= STEPS) break;
        unsigned b[4];
        ldmatrix(b, rows + 16 * step);
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < MT; m++) {
            mma_f16(acc[m][i % CHAINS][0], q[m][i], b0);
            mma_f16(acc[m][i % CHAINS][1], q[m][i], b1);
        }
    }
    float* out = s.score + kg * M * LDS + (lane >> 2) * LDS + 16 * ng + 2 * (lane & 3);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
            float* sum = acc[m][0][x];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (CHAINS == 2) sum[i] += acc[m][CHAINS - 1][x][i];
            *(float2*)(out + 16 * m * LDS + 8 * x) = make_float2(sum[0], sum[1]);
            *(float2*)(out + (16 * m + 8) * LDS + 8 * x) = make_float2(sum[2], sum[3]);
        }
}

// Probabilities of a tile to s.weight; top and sum are those of this thread's row and columns.
__device__ __forceinline__ void softmax(const Shared& s, float scale2, int first, int start,
                                        int stop, int seen, float& top, float& sum) {
    const int row = threadIdx.x / LANES, col = threadIdx.x % LANES * COLS;
    float v[COLS], peak = top;
#pragma unroll
    for (int i = 0; i < COLS; i++) {
        v[i] = 0.f;
#pragma unroll
        for (int k = 0; k < KG; k++) v[i] += s.score[(k * M + row) * LDS + col + i];
        const int slot = first + col + i;
        const bool open = CHOSEN ? row_of(s, slot, start, stop) >= 0 : start + slot < seen;
        v[i] = open ? v[i] * scale2 : NONE;
        peak = fmaxf(peak, v[i]);
    }
#pragma unroll
    for (int offset = LANES / 2; offset; offset >>= 1)
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, offset));
    const float base = peak > NONE ? peak : 0.f, keep = exp2f(top - base);
    sum *= keep;
#pragma unroll
    for (int i = 0; i < COLS; i += 2) {
        const float a = exp2f(v[i] - base), b = exp2f(v[i + 1] - base);
        sum += a + b;
        *(__half2*)(s.weight + row * LDP + col + i) = __floats2half2_rn(a, b);
    }
    top = peak;
    if (threadIdx.x % LANES == 0) s.keep[row] = keep;
}

// o = keep * o + weights * tile[:, this warp's columns].
__device__ __forceinline__ void add_values(const Shared& s, const __half* tile,
                                           float (&o)[MT][2 * OWN][4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const float* keep = s.keep + 16 * m + lane / 4;
        const float low = keep[0], high = keep[8];
#pragma unroll
        for (int c = 0; c < 2 * OWN; c++)
            o[m][c][0] *= low, o[m][c][1] *= low, o[m][c][2] *= high, o[m][c][3] *= high;
    }
    const int row = (lane >> 3 & 1) * 8 + (lane & 7), col = (lane >> 4) * 8;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        unsigned a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            ldmatrix(a[m], s.weight + (16 * m + row) * LDP + 16 * k + col);
#pragma unroll
        for (int u = 0; u < OWN; u++) {
            if (UNITS % 8 && warp * OWN + u >= UNITS) break;
            unsigned b[4];  // rows 0-7 and 8-15 of the step, each of columns 0-7, then 8-15
            ldmatrix_trans(b, tile + (16 * k + row) * LD + 16 * (warp * OWN + u) + col);
            const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_f16(o[m][2 * u], a[m], b0);
                mma_f16(o[m][2 * u + 1], a[m], b1);
            }
        }
    }
}

// ---------------------------------------------------------------- kernels -------------------
extern __shared__ uint4 attention_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_decode_mma(float* part, float* stat, const __half* q, const char* cache, const __half* scales,
               const int* chosen, const int* pos, int rows, int h, int n, int top_k, float scale) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, splits = gridDim.x;
    const Shared s = carve((char*)attention_memory);
    pdl_launch();
    if (!EARLY) pdl_wait();

    // ---- which rows: [row0, row_end) of part and q, [start, stop) of the cache or of `chosen`
    const int row0 = blockIdx.z * rows + blockIdx.y * M, row_end = (blockIdx.z + 1) * rows;
    const int last = min(row0 + M, row_end) - 1;
    const int last_seen = last_position(pos, row0 / h, last / h);
    const int n_rows = CHOSEN ? (last_seen < 0 ? 0 : top_k) : last_seen + 1;
    const int length = splits == 1 ? n_rows
        : split_length(CHOSEN ? top_k : last_position(pos, 0, n - 1) + 1, splits);
    const int start = blockIdx.x * length, stop = min(start + length, n_rows);
    const int tiles = (stop - start + TILE - 1) / TILE;
    if (tiles <= 0) {
        pdl_wait();
        return;
    }
#if BULK
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(s.full + i), PRODUCERS);
            barrier_init(shared_address(s.empty + i), 8);
        }
        barriers_ready();
    }
#endif
    if (CHOSEN) {  // one token per CTA
        for (int i = threadIdx.x; i < stop - start; i += THREADS) {
            const int row = chosen[(long long)blockIdx.z * top_k + start + i];
            s.wanted[i] = row <= last_seen ? row : -1;
        }
    }
    // queries go where no tile has been yet
    __half* queries = RAW ? s.tile : (__half*)(s.ring + (STAGES - 1) * STAGE_BYTES);
    // the columns that pad the last step: zeros in every tile, never written again
    if (W % 16) {
        __half* padded = RAW ? s.tile : (__half*)s.ring;
        for (int i = threadIdx.x; i < (RAW ? 1 : STAGES) * TILE; i += THREADS)
            for (int c = W; c < 16 * STEPS; c++) padded[i * LD + c] = __float2half(0.f);
    }
    if (CHOSEN || BULK || W % 16) __syncthreads();

    // ---- copies begin: those of old rows before the predecessor ends
    const int fresh = EARLY ? first_position(pos, n) : 0;
#if BULK
    if (warp >= 8) {
#if MT == 2 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
        produce(s, cache, fresh, start, stop, tiles);
        return;
    }
#if MT == 2 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
    if (EARLY) pdl_wait();
#else
    fetch_first(s, cache, fresh, start, stop, tiles);
#endif

    // ---- queries: a warp keeps its part of r + p in registers
    take_queries(queries, q, row0, row_end);
    unsigned q_part[MT][PART][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < PART; i++) {
            const int step = warp % KG * PART + i;
            if (step < STEPS)
                ldmatrix(q_part[m][i], queries + (16 * m + (lane >> 3 & 1) * 8 + (lane & 7)) * LD +
                                           (lane >> 4) * 8 + 16 * step);
        }
    leave(s, STAGES - 1);
    float own_scales[N_SCALES];
    if (CACHE_KIND == 3) {
        load_scales(own_scales, s, scales, 0, start, stop);
        keep_scales(s, own_scales, 0);
    }

    const int row = row0 + threadIdx.x / LANES;  // this thread's in softmax
    const int seen = row < row_end ? position(pos, row / h) + 1 : 0;
    const float scale2 = scale * 1.4426950408889634f;
    float top = NONE, sum = 0.f, o[MT][2 * OWN][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 8 * OWN; i++) o[m][i / 4][i % 4] = 0.f;

    // ---- tiles
    for (int i = 0; i < tiles; i++) {
        take_tile(s, cache, i, start, stop, tiles);
        const char* here = s.ring + i % STAGES * STAGE_BYTES;
        const __half* tile = RAW ? s.tile : (const __half*)here;
        if (RAW) {
            if (CACHE_KIND == 3) load_scales(own_scales, s, scales, (i + 1) * TILE, start, stop);
            for (int c = threadIdx.x; c < TILE * (W / 8); c += 256) {
                const int slot = c / (W / 8), col = c % (W / 8);
                *(uint4*)(s.tile + slot * LD + 8 * col) = converted(s, here, slot, col, i & 1);
            }
            if (CACHE_KIND == 3) keep_scales(s, own_scales, (i + 1) & 1);
            __syncthreads();
        }
        score_part(s, tile, q_part);
        all_meet();
        softmax(s, scale2, i * TILE, start, stop, seen, top, sum);
        all_meet();
        add_values(s, tile, o);
        leave(s, i % STAGES);
    }

    // ---- results: by way of shared memory, since fragments would be written 32 bytes at a time
#pragma unroll
    for (int offset = LANES / 2; offset; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % LANES == 0 && row < row_end)
        *(float2*)(stat + ((long long)row * splits + blockIdx.x) * 2) = make_float2(top, sum);
    constexpr int LDO = R + 8;
    float* sums = (float*)s.ring;
    all_meet();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int c = 0; c < 2 * OWN; c++) {
            const int col = 16 * OWN * warp + 8 * c + 2 * (lane & 3);
            if (UNITS % 8 && col >= R) break;
#pragma unroll
            for (int x = 0; x < 2; x++)
                *(float2*)(sums + (16 * m + 8 * x + lane / 4) * LDO + col) =
                    make_float2(o[m][c][2 * x], o[m][c][2 * x + 1]);
        }
    all_meet();
#pragma unroll 4
    for (int i = threadIdx.x; i < M * (R / 4); i += 256) {
        const int at = row0 + i / (R / 4), c = i % (R / 4) * 4;
        if (at < row_end)
            *(float4*)(part + ((long long)at * splits + blockIdx.x) * R + c) =
                *(const float4*)(sums + i / (R / 4) * LDO + c);
    }
}
