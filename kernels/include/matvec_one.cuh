// A warp's share of products of ONE token, its extent known when it is compiled: addresses are
// immediate offsets and nothing is checked that can't fail.
//   one_warp  one row tile (or a few side by side); x becomes fragments as it is met
//   one_rows  row tile after row tile: the warp's fragments of x lie in shared memory, the next row
//             tile's weights are under way while this one is computed
//
// Sources: own. Tested by tests/kernels/test_matvec.py, tests/gpu/test_cuda_matvec.py
#pragma once
#include "matvec_bytes.cuh"

// TILES column tiles split over PARTS warps, DEPTH of them under way to each.
template <int TILES, int PARTS, int DEPTH>
struct OneShare {
    static constexpr int most = (TILES + PARTS - 1) / PARTS;
    static constexpr bool even = TILES % PARTS == 0, loops = most > DEPTH;
    static constexpr int depth = most < DEPTH ? most : DEPTH;
    // A batch is whole blocks of 256 columns, which share a scale.
    static constexpr bool blocks = even && most % 4 == 0 && depth % 4 == 0;

    __device__ __forceinline__ static int from(int part) { return TILES * part / PARTS; }
    __device__ __forceinline__ static int count(int part) {
        return even ? most : from(part + 1) - from(part);
    }
    // Whether a part of `count` tiles has tile i of its first batch, or tile `at` of any.
    __device__ __forceinline__ static bool has_first(int i, int count) {
        return i < most - 1 || (i == most - 1 && (even || count == most));
    }
    __device__ __forceinline__ static bool has(int at, int count) { return at < count; }
};

// The tiles under way of several row tiles (Q: their types) that meet the same columns.
template <class SHARE, int... Q>
struct OneStreams {
    static constexpr int count = 0;
    __device__ __forceinline__ void load(int, bool) {}
    __device__ __forceinline__ void next() {}
    template <class X>
    __device__ __forceinline__ void add(int, const X&, int, float (*)[2]) const {}
};
template <class SHARE, int Q, int... REST>
struct OneStreams<SHARE, Q, REST...> : OneStreams<SHARE, REST...> {
    using T = Tile<Q>;
    using Others = OneStreams<SHARE, REST...>;
    static constexpr int count = 1 + Others::count;  // row tiles
    template <int ROWS>
    using X = OneXOf<ROWS * count, Q, REST...>;
    const unsigned char *q, *h, *s, *m, *d;  // this lane's bytes of the batch to load
    int col_tile;
    TileData<Q> w[SHARE::depth];

    // From column tile `from` of the row tile whose first tile is `first`.
    __device__ __forceinline__ void start(
            const TileView<Q>& v, long long first, int from, int lane) {
        const long long at = first + from;
        q = v.q + at * T::q_bytes + (T::thin ? 8 : 16) * lane;
        h = v.h + at * T::h_bytes + 4 * T::h_words * lane;
        s = v.s + at * T::s_bytes + 8 * (lane >> 2);
        m = v.m + at * T::m_bytes + 8 * (lane >> 2);
        d = v.d + ((SHARE::blocks ? at : first) >> 2) * T::d_bytes + 4 * T::d_words * (lane >> 2);
        col_tile = from;
    }
    __device__ __forceinline__ void load(int i, bool valid) {
#pragma unroll
        for (int u = 0; u < T::q_words / 4; ++u)
            few_load<4>(q + i * T::q_bytes + 512 * u, valid, w[i].q + 4 * u);
        if constexpr (T::thin) few_load<2>(q + i * T::q_bytes, valid, w[i].q);
        if constexpr (T::h_words) few_load<T::h_words>(h + i * T::h_bytes, valid, w[i].h);
        if constexpr (T::s_bytes) few_load<2>(s + i * T::s_bytes, valid, w[i].s);
        if constexpr (T::m_bytes) few_load<2>(m + i * T::m_bytes, valid, w[i].m);
        if constexpr (T::d_words) {
            if (!SHARE::blocks)
                few_load<T::d_words>(d + (col_tile + i >> 2) * T::d_bytes, valid, w[i].d);
            else if (i % 4 == 0)
                few_load<T::d_words>(d + i / 4 * T::d_bytes, valid, w[i].d);
            else
                w[i].d[0] = w[i - 1].d[0], w[i].d[1] = w[i - 1].d[1];
        }
        Others::load(i, valid);
    }
    __device__ __forceinline__ void next() {
        constexpr int n = SHARE::depth;
        q += n * T::q_bytes, h += n * T::h_bytes, s += n * T::s_bytes, m += n * T::m_bytes;
        if (SHARE::blocks) d += n / 4 * T::d_bytes;
        else col_tile += n;
        Others::next();
    }
    // acc[0]: this row tile, acc[1]: the next
    template <class X>
    __device__ __forceinline__ void add(int i, const X& x, int lane, float (*acc)[2]) const {
        few_add<Q>(w[i], x, lane, acc[0]);
        Others::add(i, x, lane, acc + 1);
    }
};

// v times weight; squares += those of v before.
template <int N>
__device__ __forceinline__ void one_normed(float (&v)[N][4], const float (&weight)[N][4], float& squares) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) squares += v[i][k] * v[i][k], v[i][k] *= weight[i][k];
}

// acc += the row tiles times x, over the columns of `part`; squares += those of x. The streams have
// started. RAGGED: packed columns outside of skip .. skip + in - 1 meet no x. x and norm: column 0.
// Every thread passes pdl_wait() here, after its first weights are on their way, if WAIT.
template <bool NORM, bool RAGGED, bool WAIT = true, class SHARE, int... Q>
__device__ __forceinline__ void one_warp(
        OneStreams<SHARE, Q...>& w, int part, const float* x, const float* norm, int in, int skip,
        float (&acc)[sizeof...(Q)][2], float& squares) {
    constexpr int depth = SHARE::depth;
    const int lane = threadIdx.x & 31, count = SHARE::count(part);
    int c = 64 * SHARE::from(part) + 16 * (lane >> 3) + 2 * (lane & 3) - (RAGGED ? skip : 0);
    float v[depth][4], weight[depth][4];
    const auto inside = [&](int at) { return !RAGGED || (at >= 0 && at < in); };
    const auto fetch_weight = [&](int i, bool valid) {
        if constexpr (NORM) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const int at = c + 64 * i + 4 * k;
                unsigned two[2];
                few_load<2>((const unsigned char*)(norm + at), valid && inside(at), two);
                weight[i][k] = __uint_as_float(two[0]), weight[i][k + 1] = __uint_as_float(two[1]);
            }
        }
    };
    const auto fetch = [&](int i, bool valid) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            const int at = c + 64 * i + 4 * k;
            few_pair<true>(x + at, valid && inside(at), v[i][k], v[i][k + 1]);
        }
    };
#pragma unroll
    for (int i = 0; i < depth; i++) {
        w.load(i, SHARE::has_first(i, count));
        fetch_weight(i, SHARE::has_first(i, count));
    }
    if constexpr (WAIT) pdl_wait();
    pdl_launch();
#pragma unroll
    for (int i = 0; i < depth; i++) fetch(i, SHARE::has_first(i, count));
#pragma unroll 1
    for (int at = 0; at < SHARE::most; at += depth) {
        w.next();
        c += 64 * depth;
#pragma unroll
        for (int i = 0; i < depth; i++) {
            float of_x[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                of_x[k] = v[i][k];
                if constexpr (NORM) squares += of_x[k] * of_x[k], of_x[k] *= weight[i][k];
            }
            w.add(i, few_x<false>(of_x, lane), lane, acc);
            if constexpr (SHARE::loops) {
                const bool more = SHARE::has(at + depth + i, count);
                w.load(i, more);
                fetch_weight(i, more);
                fetch(i, more);
            }
        }
    }
}

// ---------------------------------------------------------------- row tile after row tile ---
// Fragments of x; a warp writes and reads its own column tiles only.
template <int TILES>
struct OneX {
    uint2 b[TILES][32];
    float ones[TILES][4];
};

// to = x (times norm) of the warp's column tiles, about MOST of them at a time; squares += those of x.
// Passes pdl_wait().
template <class X, class SHARE, bool NORM, bool RAGGED, int MOST, int TILES>
__device__ __forceinline__ void one_stage(
        OneX<TILES>& to, int from, int count, const float* x, const float* norm, int in, int skip,
        float& squares) {
    constexpr int rounds = (SHARE::most + MOST - 1) / MOST, group = (SHARE::most + rounds - 1) / rounds;
    const int lane = threadIdx.x & 31;
    const int c = 64 * from + 16 * (lane >> 3) + 2 * (lane & 3) - (RAGGED ? skip : 0);
    float v[group][4], weight[group][4];
    const auto valid = [&](int tile, int at) {
        return (SHARE::even && SHARE::most % group == 0 || tile < count) &&
               (!RAGGED || (at >= 0 && at < in));
    };
    const auto fetch_weights = [&](int first) {
#pragma unroll
        for (int i = 0; i < group; i++) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const int at = c + 64 * (first + i) + 4 * k;
                unsigned two[2];
                few_load<2>((const unsigned char*)(norm + at), valid(first + i, at), two);
                weight[i][k] = __uint_as_float(two[0]), weight[i][k + 1] = __uint_as_float(two[1]);
            }
        }
    };
    if constexpr (NORM) fetch_weights(0);
    pdl_wait();
    pdl_launch();
#pragma unroll 1
    for (int first = 0; first < SHARE::most; first += group) {
#pragma unroll
        for (int i = 0; i < group; i++) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const int at = c + 64 * (first + i) + 4 * k;
                few_pair<true>(x + at, valid(first + i, at), v[i][k], v[i][k + 1]);
            }
        }
        if constexpr (NORM) {
            if (first) fetch_weights(first);
            if constexpr (X::scales) one_normed(v, weight, squares);
        }
        const typename X::Scale scale = X::scale(v);
#pragma unroll
        for (int i = 0; i < group; i++) {
            if (first + i >= count) break;
            if constexpr (NORM && !X::scales) {
#pragma unroll
                for (int k = 0; k < 4; k++) squares += v[i][k] * v[i][k], v[i][k] *= weight[i][k];
            }
            const X f = X::of(v[i], lane, scale);
            to.b[from + first + i][lane] = f.words(lane);
            if (lane < 4) to.ones[from + first + i][lane] = f.ones;
        }
    }
    __syncwarp();
}

// part[k][warp][stream] = the warp's sums of the CTA's k-th of n row tiles. seek(w, k) starts the streams
// there and says whether there is anything to read.
template <bool NORM, bool RAGGED, class X, int WARPS, class SHARE, int TILES, class SEEK, int... Q>
__device__ __forceinline__ void one_rows(
        float (*part)[WARPS][sizeof...(Q)][16], OneX<TILES>& fragments,
        OneStreams<SHARE, Q...>& w, int n, const SEEK& seek, const float* x, const float* norm,
        int in, int skip, float& squares) {
    constexpr int depth = SHARE::depth, streams = sizeof...(Q);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int from = SHARE::from(warp), count = SHARE::count(warp);
    bool there = seek(w, 0);
#pragma unroll
    for (int i = 0; i < depth; i++) w.load(i, there && SHARE::has_first(i, count));
    one_stage<X, SHARE, NORM, RAGGED, 4>(fragments, from, count, x, norm, in, skip, squares);
#pragma unroll 1
    for (int k = 0; k < n; k++) {
        float acc[streams][2];
#pragma unroll
        for (int r = 0; r < streams; r++) acc[r][0] = acc[r][1] = 0.f;
#pragma unroll 1
        for (int at = 0; at < SHARE::most; at += depth) {
            int ahead = at + depth;  // the batch to fetch: of this row tile, or the next one's first
            if (ahead >= SHARE::most) {
                ahead = 0;
                there = k + 1 < n;
                if (there) there = seek(w, k + 1);
            } else {
                w.next();
            }
#pragma unroll
            for (int i = 0; i < depth; i++) {
                X f = {};
                if (SHARE::even && SHARE::most % depth == 0 || at + i < count)
                    f = X::from(fragments.b[from + at + i], fragments.ones[from + at + i], lane);
                w.add(i, f, lane, acc);
                w.load(i, there && (SHARE::loops ? SHARE::has(ahead + i, count)
                                                 : SHARE::has_first(i, count)));
            }
        }
        few_rows(acc, part[k][warp]);
    }
}

