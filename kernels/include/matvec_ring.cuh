// As one_rows of matvec_one.cuh, with the weights under way to a ring in shared memory, so that no
// register waits for them and the compiler can't put a load off until it is needed: asynchronous copies of
// 16 bytes a lane (bulk copies were slower, kernels/README.md).
//
// Sources: PTX manual; code own.
// Tested by tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec_one.cuh"

#if defined(SIMT) || __CUDA_ARCH__ >= 800
#define HAS_RING 1
// ---------------------------------------------------------------- instructions --------------
#ifdef SIMT  // copies are over at once
__device__ __forceinline__ void ring_copy16(unsigned char* to, const unsigned char* from) {
    memcpy(to, from, 16);
}
__device__ __forceinline__ void ring_commit() {}
template <int N>
__device__ __forceinline__ void ring_wait_all_but() {}
#else
__device__ __forceinline__ void ring_copy16(unsigned char* to, const unsigned char* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void ring_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but the N groups committed last have come.
template <int N>
__device__ __forceinline__ void ring_wait_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

// ---------------------------------------------------------------- weights -------------------
// One batch (SHARE::depth tiles) of several row tiles in a stage of the ring.
template <class SHARE, int... Q>
struct RingStreams {
    static constexpr int nbytes = 0, count = 0;
    __device__ __forceinline__ void copy(unsigned char*, int, int, int) const {}
    template <class X>
    __device__ __forceinline__ void add(
            const unsigned char*, int, int, const X&, int, float (*)[2]) const {}
};
template <class SHARE, int Q, int... REST>
struct RingStreams<SHARE, Q, REST...> : RingStreams<SHARE, REST...> {
    using T = Tile<Q>;
    using Others = RingStreams<SHARE, REST...>;
    static constexpr int depth = SHARE::depth;
    // Blocks of 256 columns that a batch meets.
    static constexpr int blocks =
        T::d_words == 0 ? 0 : SHARE::blocks ? depth / 4 : (depth + 6) / 4;
    static constexpr int at_h = depth * T::q_bytes, at_s = at_h + depth * T::h_bytes;
    static constexpr int at_m = at_s + depth * T::s_bytes, at_d = at_m + depth * T::m_bytes;
    static constexpr int own = at_d + blocks * T::d_bytes, nbytes = own + Others::nbytes;
    static constexpr int count = 1 + Others::count;  // row tiles
    template <int ROWS>
    using X = OneXOf<ROWS * count, Q, REST...>;
    TileView<Q> view;
    long long first;  // tile of the row tile

    __device__ __forceinline__ void start(const TileView<Q>& v, long long tile, int, int) {
        view = v, first = tile;
    }
    // Blocks that tiles `at` .. `at` + n - 1 of the row tile lie in.
    __device__ __forceinline__ static int met(int at, int n) {
        return T::d_words == 0 ? 0 : SHARE::blocks ? blocks : (at + n - 1 >> 2) - (at >> 2) + 1;
    }
    // By a whole warp, 16 bytes a lane at a time: column tiles `at` .. `at` + n - 1 of the row tile.
    __device__ __forceinline__ void copy(unsigned char* to, int at, int n, int lane) const {
        const long long tile = first + at;
        const unsigned char* from = view.q + tile * T::q_bytes + 16 * lane;
#pragma unroll
        for (int i = 0; i < (depth * T::q_bytes + 511) / 512; i++)
            if (512 * i + (T::thin ? 16 * lane : 0) < n * T::q_bytes)
                ring_copy16(to + 512 * i + 16 * lane, from + 512 * i);
        // The other planes' pieces of 16 bytes, one after another.
        constexpr int h = depth * T::h_bytes / 16, sc = depth * T::s_bytes / 16;
        constexpr int mi = depth * T::m_bytes / 16, all = h + sc + mi + blocks * T::d_bytes / 16;
#pragma unroll
        for (int i = 0; i < all; i += 32) {
            int piece = i + lane;
            const unsigned char* plane = view.h + tile * T::h_bytes;
            int size = n * T::h_bytes / 16, target = at_h;
            if (piece >= h) {
                piece -= h, plane = view.s + tile * T::s_bytes;
                size = n * T::s_bytes / 16, target = at_s;
                if (T::m_bytes && piece >= sc) {
                    piece -= sc, plane = view.m + tile * T::m_bytes;
                    size = n * T::m_bytes / 16, target = at_m;
                }
                if (T::d_bytes && piece >= sc) {  // no type has both minima and blocks
                    piece -= sc, plane = view.d + (tile >> 2) * T::d_bytes;
                    size = met(at, n) * T::d_bytes / 16, target = at_d;
                }
            }
            if (piece < size) ring_copy16(to + target + 16 * piece, plane + 16 * piece);
        }
        Others::copy(to + own, at, n, lane);
    }
    // acc += tile i of the batch that begins at column tile `at`.
    template <class X>
    __device__ __forceinline__ void add(
            const unsigned char* stage, int at, int i, const X& x, int lane,
            float (*acc)[2]) const {
        TileData<Q> w;
        load_numbers<Q, false>(stage + i * T::q_bytes, stage + at_h + i * T::h_bytes, lane, w);
        load_scales<Q, false>(stage + at_s + i * T::s_bytes, stage + at_m + i * T::m_bytes, lane, w);
        const int block = SHARE::blocks ? i >> 2 : (at + i >> 2) - (at >> 2);
        load_block_scales<Q, false>(stage + at_d + block * T::d_bytes, lane, w);
        few_add<Q>(w, x, lane, acc[0]);
        Others::add(stage + own, at, i, x, lane, acc + 1);
    }
};

// ---------------------------------------------------------------- row tile after row tile ---
// Whether a warp has registers for its fragments of x beside no weights: what is made of them is made once.
template <class X, class SHARE, int... Q>
constexpr bool RING_HELD = X::scales && !SHARE::loops && (int)sizeof...(Q) * SHARE::depth <= 4;
template <class SHARE, int DEPTH, int TILES>
__device__ __forceinline__ void ring_hold(
        ByteHeld (&own)[DEPTH], const OneX<TILES>& fragments, int from, int count, int lane) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        ByteX x = {};
        if (SHARE::has_first(i, count)) x = ByteX::from(fragments.b[from + i], fragments.ones[from + i], lane);
        own[i] = ByteHeld::of(x, lane);
    }
}

// As one_rows. ring: STAGES stages of this warp, at a multiple of 16 bytes.
template <bool NORM, bool RAGGED, int STAGES, class X, int WARPS, class SHARE, int TILES, class SEEK, int... Q>
__device__ __forceinline__ void ring_rows(
        float (*part)[WARPS][sizeof...(Q)][16], OneX<TILES>& fragments,
        RingStreams<SHARE, Q...>& w, unsigned char* ring, int n, const SEEK& seek, const float* x,
        const float* norm, int in, int skip, float& squares) {
    constexpr int depth = SHARE::depth, streams = sizeof...(Q);
    constexpr int stage_bytes = RingStreams<SHARE, Q...>::nbytes;
    constexpr bool whole = SHARE::even && SHARE::most % depth == 0;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int from = SHARE::from(warp), count = SHARE::count(warp);
    int next_k = 0, next_at = 0;  // the batch to copy next
    bool there = false;
    const auto copy_next = [&](int stage) {
        if (next_at == 0) there = seek(w, next_k);
        const int tiles = whole ? depth : min(depth, count - next_at);
        if (there) w.copy(ring + stage * stage_bytes, from + next_at, tiles, lane);
        next_at += depth;
        if (next_at >= SHARE::most) next_at = 0, next_k++;
    };
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (next_k < n) copy_next(s);
        ring_commit();
    }
    one_stage<X, SHARE, NORM, RAGGED, 8>(fragments, from, count, x, norm, in, skip, squares);
    constexpr bool held = RING_HELD<X, SHARE, Q...>;
    ByteHeld own[held ? depth : 1];
    if constexpr (held) ring_hold<SHARE>(own, fragments, from, count, lane);
    int stage = 0;
#pragma unroll 1
    for (int k = 0; k < n; k++) {
        float acc[streams][2];
#pragma unroll
        for (int r = 0; r < streams; r++) acc[r][0] = acc[r][1] = 0.f;
#pragma unroll 1
        for (int at = 0; at < SHARE::most; at += depth) {
            ring_wait_all_but<STAGES - 1>();
            __syncwarp();  // all lanes' copies have come
            const unsigned char* batch = ring + stage * stage_bytes;
#pragma unroll
            for (int i = 0; i < depth; i++) {
                if (!whole && at + i >= count) break;
                if constexpr (held) {
                    w.add(batch, from + at, i, own[i], lane, acc);
                } else {
                    const X f = X::from(fragments.b[from + at + i], fragments.ones[from + at + i], lane);
                    w.add(batch, from + at, i, f, lane, acc);
                }
            }
            __syncwarp();  // all have read the stage
            if (next_k < n) copy_next(stage);
            ring_commit();
            if (++stage == STAGES) stage = 0;
        }
        few_rows(acc, part[k][warp]);
    }
}
#else
#define HAS_RING 0
#endif
