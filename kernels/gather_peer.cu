// Op        gather_few: out[t][first_r + c] = columns_r[t][c] for every rank r, first_r the widths of
//           the ranks before. Each GPU pushes its ranks' columns into the mail of all others;
//           copy_columns: out[t][c] = in[t][c]
// Shapes    out [n, V]; columns_r [n, w_r] dense, of which [from, from + most) travels; n times that,
//           w rounded up to even, <= room. copy_columns: in [n, w] of row stride ldi
// Dtypes    float32
// Grid      (power of two up to 128, the same on all GPUs), 32 to 1024 threads; copy_columns (n), any
// Assumes   room even; y_k: columns of this GPU's k-th rank; homes, mine, silent as in reduce_few
// Variants  N_GPUS=2 N_RANKS=2; N_GPUS=1 N_RANKS=2; N_GPUS=4 N_RANKS=8
// Spills    none
// Numerics  copies
// Bound by  the link: 8 bytes a value to each peer
// Sources   peers.cuh
// Tested by tests/kernels/test_peers.py, tests/gpu/test_collectives.py
#include "peers.cuh"

struct Widths {
    int of[16];
};
struct Columns {
    const float* at[8];
};

extern "C" __global__ void gather_few(float* out, const float* y0, const float* y1, const float* y2,
                                      const float* y3, const float* y4, const float* y5,
                                      const float* y6, const float* y7, const void* table,
                                      void* own, int me, int mine, int silent, int n, int from,
                                      int most, int w0, int w1, int w2, int w3, int w4, int w5,
                                      int w6, int w7, int w8, int w9, int w10, int w11, int w12,
                                      int w13, int w14, int w15, long long homes, long long room,
                                      int limit_ms) {
    const Widths widths = {{w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15}};
    const Columns columns = {{y0, y1, y2, y3, y4, y5, y6, y7}};
    const int step = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;
    Peers peers;
    pdl_launch();
    if (N_GPUS > 1) peers.find((const PeerWord*)table, own, me, limit_ms);
    pdl_wait();
    if (N_GPUS > 1) peers.begin();
    int all = 0;
#pragma unroll
    for (int r = 0; r < N_RANKS; r++) all += widths.of[r];
    for (int own_ones = 1; own_ones >= 0; own_ones--) {
        int first = from, slot = 0;
#pragma unroll
        for (int r = 0; r < N_RANKS; r++) {
            const int w = widths.of[r], now = min(w - from, most), pairs = (now + 1) / 2;
            const bool here = mine >> r & 1;
            const int k = slot;
            slot += here;
            first += w;
            if (now <= 0 || here != (bool)own_ones) continue;
            for (int p = thread; p < n * pairs; p += step) {
                const int t = p / pairs, c = 2 * (p - t * pairs);
                const bool two = c + 1 < now;
                float a = 0.f, b = 0.f;
                if (here) {
                    const float* y = columns.at[0];
#pragma unroll
                    for (int j = 1; j < 8; j++)
                        if (j == k) y = columns.at[j];
                    y += (long long)t * w + from + c;
                    a = y[0];
                    if (two) b = y[1];
                    const PeerWord wa = peers.packet(a), wb = peers.packet(b);
                    if (N_GPUS > 1)
#pragma unroll
                        for (int g = 0; g < N_GPUS; g++)
                            if (g != me) put_words(peers.inbox(g, r, room) + 2 * p, wa, wb);
                } else if (N_GPUS > 1) {
                    const PeerWord* at = peers.inbox(me, r, room) + 2 * p;
                    PeerWord wa, wb;
                    get_words(at, wa, wb);
                    while (!peers.is_now(wa, wb) && !peers.gives_up((int)(homes >> 4 * r & 15)))
                        get_words(at, wa, wb);
                    a = __uint_as_float((unsigned)wa), b = __uint_as_float((unsigned)wb);
                }
                float* to = out + (long long)t * all + first - w + c;
                to[0] = a;
                if (two) to[1] = b;
            }
        }
        if (N_GPUS > 1 && own_ones) {
            peers.count();
            peers.nod(silent);
        }
    }
}

extern "C" __global__ void copy_columns(float* out, const float* in, int w, long long ldo,
                                        long long ldi) {
    pdl_launch();
    pdl_wait();
    const long long t = blockIdx.x;
    for (int c = threadIdx.x; c < w; c += blockDim.x) out[t * ldo + c] = in[t * ldi + c];
}
