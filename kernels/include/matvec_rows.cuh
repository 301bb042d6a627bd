// A CTA's product of one token: several row tiles, one after another, over one x.
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec_ring.cuh"

// How a CTA's weights travel: through a ring in shared memory, or (not RING, or where there are no
// asynchronous copies) through registers.
template <bool RING, class SHARE, int... Q>
struct OnePick {
    using type = OneStreams<SHARE, Q...>;
};
#if HAS_RING
template <class SHARE, int... Q>
struct OnePick<true, SHARE, Q...> {
    using type = RingStreams<SHARE, Q...>;
};
#endif

// ---------------------------------------------------------------- a CTA ---------------------
// The warps' sums of a CTA's ROWS row tiles.
template <int WARPS, int ROWS, int STREAMS>
struct OneSums {
    float part[ROWS][WARPS][STREAMS][16], squares[WARPS];

    __device__ __forceinline__ float sum(int k, int stream, int row) const {
        float out = part[k][0][stream][row];
#pragma unroll
        for (int w = 1; w < WARPS; w++) out += part[k][w][stream][row];
        return out;
    }
    __device__ __forceinline__ float norm(int in, float eps) const {
        float out = squares[0];
#pragma unroll
        for (int w = 1; w < WARPS; w++) out += squares[w];
        return rsqrtf(out / in + eps);
    }
};

// x of one token as fragments, unless that is too much of shared memory.
template <int TILES>
struct OneStaged {
    static constexpr bool fits = TILES <= 160;
    OneX<(fits ? TILES : 1)> x;
};

// A CTA's product; its sums are in `sums` after the caller's barrier. n = 1 if x isn't staged.
template <bool NORM, bool RAGGED, int STAGES, int WARPS, int ROWS, int TILES, class STREAMS, class SEEK>
__device__ __forceinline__ void one_cta(
        OneSums<WARPS, ROWS, STREAMS::count>& sums, OneStaged<TILES>& staged, STREAMS& streams,
        int n, const SEEK& seek, const float* x, const float* norm, int in, int skip) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float squares = 0.f;
    using X = typename STREAMS::template X<ROWS>;
    if constexpr (OneStaged<TILES>::fits) {
#if HAS_RING
        if constexpr (STAGES > 0) {
            __align__(128) extern __shared__ unsigned char ring[];
            ring_rows<NORM, RAGGED, STAGES, X>(
                sums.part, staged.x, streams, ring + warp * STAGES * STREAMS::nbytes, n, seek, x, norm,
                in, skip, squares);
        } else
#endif
            one_rows<NORM, RAGGED, X>(sums.part, staged.x, streams, n, seek, x, norm, in, skip, squares);
    } else {
        static_assert(ROWS == 1, "one row tile a CTA");
        float acc[STREAMS::count][2];
#pragma unroll
        for (int r = 0; r < STREAMS::count; r++) acc[r][0] = acc[r][1] = 0.f;
        seek(streams, 0);
        one_warp<NORM, RAGGED>(streams, warp, x, norm, in, skip, acc, squares);
#pragma unroll
        for (int r = 0; r < STREAMS::count; r++) {
            few_rows(acc[r]);
            if ((lane & 3) == 0)
                sums.part[0][warp][r][lane >> 2] = acc[r][0],
                sums.part[0][warp][r][8 + (lane >> 2)] = acc[r][1];
        }
    }
    if constexpr (NORM) {
        squares = warp_sum(squares) * 0.5f;  // two lanes hold each value: for hi and for lo
        if (lane == 0) sums.squares[warp] = squares;
    }
}
