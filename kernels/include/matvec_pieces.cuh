// Products of ONE token with weights too wide for a row tile's copies to wait in shared memory twice: row
// tiles come in pieces, some of the columns each, through a ring of bulk copies.
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec_bulk.cuh"

// ---------------------------------------------------------------- x -------------------------
// The fragments of x that meet a warp's column tiles of each of PIECES pieces of TILES column tiles: those
// of part `part` of PARTS.
template <class X, int PIECES, int TILES, int PARTS>
struct PieceX {
    using Share = OneShare<TILES, PARTS, TILES>;
    static constexpr int most = Share::most;
    float v[PIECES][most][4];
    X of[PIECES][most];

    __device__ __forceinline__ static bool has(int part, int i) {
        return Share::even || i < most - 1 || i < Share::count(part);
    }
    // The floats of all pieces, which begin `stride` floats apart. WEIGHT: nothing writes them any more.
    template <bool WEIGHT>
    __device__ __forceinline__ void ask(int part, const float* x, long long stride) {
        const int lane = threadIdx.x & 31;
        x += 64 * Share::from(part) + 16 * (lane >> 3) + 2 * (lane & 3);
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int i = 0; i < most; i++)
#pragma unroll
                for (int k = 0; k < 4; k += 2) {
                    const float* at = x + p * stride + 64 * i + 4 * k;
                    if constexpr (WEIGHT) {
                        unsigned two[2];
                        few_load<2>((const unsigned char*)at, has(part, i), two);
                        v[p][i][k] = __uint_as_float(two[0]), v[p][i][k + 1] = __uint_as_float(two[1]);
                    } else {
                        few_pair<true>(at, has(part, i), v[p][i][k], v[p][i][k + 1]);
                    }
                }
    }
    // The squares of x; then it is multiplied.
    __device__ __forceinline__ float normed(const PieceX& norm) {
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int i = 0; i < most; i++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    squares += v[p][i][k] * v[p][i][k], v[p][i][k] *= norm.v[p][i][k];
        return warp_sum(squares) * 0.5f;  // two lanes hold each value: for hi and for lo
    }
    __device__ __forceinline__ void scale(int p, float factor) {
#pragma unroll
        for (int i = 0; i < most; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) v[p][i][k] *= factor;
    }
    __device__ __forceinline__ void split() {
        const auto scale = X::scale(reinterpret_cast<const float (&)[PIECES * most][4]>(v));
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int i = 0; i < most; i++) of[p][i] = X::of(v[p][i], threadIdx.x & 31, scale);
    }
    // acc += piece p in `stage` times x over the warp's columns; few_rows() is still to be called.
    template <class STREAMS>
    __device__ __forceinline__ void add(
            int p, int part, const unsigned char* stage, float (*acc)[2]) const {
        const STREAMS w = {};
#pragma unroll
        for (int i = 0; i < most; i++)
            if (has(part, i))
                w.add(stage, 0, Share::from(part) + i, of[p][i], threadIdx.x & 31, acc);
    }
};

// ---------------------------------------------------------------- the ring ------------------
template <int STAGES, int NBYTES>
struct PieceRing {
    RowBarrier full[STAGES], empty[STAGES];

    // By one thread, before a __syncthreads().
    __device__ __forceinline__ void init(int readers) {
        for (int i = 0; i < STAGES; i++) row_init(full + i, 1), row_init(empty + i, readers);
    }
};

// Where a thread is in it.
template <int STAGES, int NBYTES>
struct PieceAt {
    PieceRing<STAGES, NBYTES>& of;
    int stage, parity, n;

    __device__ __forceinline__ unsigned char* memory() const { return ring + stage * NBYTES; }
    __device__ __forceinline__ RowBarrier* full() const { return of.full + stage; }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
        n++;
    }
    // By the thread that asks: until the stage may be overwritten.
    __device__ __forceinline__ void wait_empty() const {
        if (n >= STAGES) row_wait(of.empty + stage, parity ^ 1);
    }
    __device__ __forceinline__ void wait_full() const { row_wait(of.full + stage, parity); }
    // By the thread that asks: all bytes of the row tiles that `w` has started on.
    template <class STREAMS>
    __device__ __forceinline__ void fetch(const STREAMS& w) const {
        row_expect(full(), STREAMS::nbytes);
        row_fetch(w, memory(), full());
    }
    // By a whole warp that has read the stage.
    __device__ __forceinline__ void leave() const {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) row_arrive(of.empty + stage);
    }
};
