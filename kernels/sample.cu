// Op        sample: the next token id from logits, by the chain top-k, top-p, min-p, temperature,
//           draw of mlacli/sampling.py; advances the position
//           SEND_TO=N (left out: 0): logits are one of N GPUs' vocabulary columns, which start with id
//           `first`; each sends its candidates to the others, and draws from all of them (post.cuh)
// Shapes    token [1], pos [1] (in: position of the logits' token; out: of the drawn one), ring
//           [ring_size], logits [V], chain [64]: temp, top_p, log(min_p) as doubles' bits, seed,
//           top_k (1..1024, at most V), count of banned ids, the banned ids
// Dtypes    logits float32; probabilities and their sums float64
// Grid      (CLUSTER), 1024 threads
// Assumes   logits 16-byte aligned; banned ids' logits are overwritten with -inf
//           SEND_TO: N top_k <= 1024, top_k at most the least of the GPUs' columns
// Variants  CLUSTER=1; CLUSTER=8 @9.0; CLUSTER=1 SEND_TO=2; CLUSTER=8 SEND_TO=2 @9.0
// Spills    none
// Numerics  the candidates are exactly NumPy's; probabilities differ by an ulp of exp, their sums
//           by the order of at most 1024 float64 terms: an edge or a draw within 1e-12 of a step may
//           fall on the other side. temp <= 0: the largest logit, of equals the lowest id. Logits
//           that hold NaN or whose largest isn't finite give token 0, and -1 in the ring
// Bound by  launch latency, then 4 V bytes
// Sources   Philox4x64-10: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), in
//           NumPy's use of it; the rest own
// Tested by tests/gpu/test_cuda_sampling.py, tests/kernels/test_sample.py
#include "pdl.cuh"
#define SELECT_BYTES 8192  // shared memory is for the candidates
#include "select.cuh"
#include "post.cuh"

#ifndef SEND_TO
#define SEND_TO 0
#endif

#define MOST 1024  // candidates
#define NONE __int_as_float(0xff800000)  // -inf

struct Candidates {
    unsigned id[MOST], value[MOST];
    bool kept[MOST];
    double u;
    long long chain[6];
    int position;  // of the token to draw
    double sums[SELECT_WARPS];
    unsigned best[2][16];
    int first, last;
};

__device__ __forceinline__ unsigned long long multiply(unsigned long long a, unsigned long long b,
                                                       unsigned long long& high) {
    high = __umul64hi(a, b);
    return a * b;
}

// sampling.uniform: the top 53 bits of Philox4x64-10's first word, counter (position + 1, 0, 0, 0).
__device__ __forceinline__ double uniform(unsigned long long seed, long long position) {
    unsigned long long c[4] = {(unsigned long long)(position + 1), 0, 0, 0}, key[2] = {seed, 0};
    for (int round = 0; round < 10; round++) {
        unsigned long long high0, high1;
        const unsigned long long low0 = multiply(0xD2E7470EE14C6C93ull, c[0], high0);
        const unsigned long long low1 = multiply(0xCA5A826395121157ull, c[2], high1);
        c[0] = high1 ^ c[1] ^ key[0], c[1] = low1, c[2] = high0 ^ c[3] ^ key[1], c[3] = low0;
        key[0] += 0x9E3779B97F4A7C15ull, key[1] += 0xBB67AE8584CAA73Bull;
    }
    return (double)(long long)(c[0] >> 11) * 0x1p-53;
}

// Inclusive sum over the first k threads of the CTA up to this one; `all` becomes the sum of all.
__device__ __forceinline__ double block_scan(double x, int k, double* sums, double& all) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (warp * 32 < k) {
        for (int offset = 1; offset < 32; offset <<= 1) {
            const double below = __shfl_up_sync(~0u, x, offset);
            if (lane >= offset) x += below;
        }
        if (lane == 31) sums[warp] = x;
    }
    __syncthreads();
    double before = 0;
    all = 0;
    for (int i = 0; i * 32 < k; i++) {
        if (i == warp) before = all;
        all += sums[i];
    }
    __syncthreads();
    return before + x;
}

// Thread i gets the i-th largest of the first `size` threads' x (a power of two, at least 32).
__device__ __forceinline__ unsigned long long sorted(unsigned long long x, int size,
                                                     unsigned long long* shared) {
    const int i = threadIdx.x;
    for (int run = 2; run <= size; run <<= 1)
        for (int apart = run >> 1; apart; apart >>= 1) {
            unsigned long long other = x;
            if (apart >= 32) {
                __syncthreads();
                shared[i] = x;
                __syncthreads();
                other = shared[i ^ apart];
            } else if (i < size) {
                other = __shfl_xor_sync(~0u, x, apart);
            }
            const bool larger = ((i & apart) == 0) == ((i & run) == 0);
            x = larger == (x > other) ? x : other;
        }
    return x;
}

// Largest (key, lowest id) of the row over the cluster, in CTA 0.
__device__ __forceinline__ void argmax(RowShare& share, Candidates& c) {
    unsigned key = 0, id = ~0u;
    const auto better = [&](unsigned k, unsigned i) {
        if (k > key || (k == key && i < id)) key = k, id = i;
    };
    share.each([&](const float4& v, int at) {
        const float x[4] = {v.x, v.y, v.z, v.w};
        for (int e = 0; e < 4; e++)
            if (at + e < share.n) better(ordered(x[e]), at + e);
    });
    const auto in_warp = [&] {
        for (int offset = 16; offset; offset >>= 1) {
            const unsigned k = __shfl_xor_sync(~0u, key, offset), i = __shfl_xor_sync(~0u, id, offset);
            better(k, i);
        }
    };
    in_warp();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) c.id[warp] = id, c.value[warp] = key;
    __syncthreads();
    if (warp == 0) {
        key = c.value[lane], id = c.id[lane];
        in_warp();
        if (lane == 0) {
            peer_store(&c.best[0][cluster_rank()], 0, key);
            peer_store(&c.best[1][cluster_rank()], 0, id);
        }
    }
    cluster_sync();
    for (int i = 0; i < CLUSTER; i++) better(c.best[0][i], c.best[1][i]);
    c.first = (int)id;
}

// The place among k candidates (ascending ids) that the chain and the random number c.u lead to; all
// threads of a CTA. `top` is their largest value, `space` holds 1024 words.
__device__ __forceinline__ int drawn(Candidates& c, unsigned long long* space, int k, float top,
                                     double temp) {
    const int i = threadIdx.x;
    const double top_p = __longlong_as_double(c.chain[1]);
    const double log_min_p = __longlong_as_double(c.chain[2]);
    const bool there = i < k;
    const float value = there ? __uint_as_float(c.value[i]) : NONE;
    bool kept = there;
    double all;
    if (top_p < 1) {
        // By falling value, equals by id: the low word undoes the candidate's number.
        const unsigned long long mine =
            there ? (unsigned long long)ordered(value) << 32 | (unsigned)(MOST - i) : 0;
        const unsigned long long one = sorted(mine, k > 32 ? 1 << (32 - __clz(k - 1)) : 32, space);
        const double weight = there ? exp((double)unordered((unsigned)(one >> 32)) - top) : 0;
        const double reached = block_scan(weight, k, c.sums, all);
        const int short_of_it = __syncthreads_count(there && reached < top_p * all);
        if (there) c.kept[MOST - (unsigned)one] = i <= short_of_it;
        __syncthreads();
        kept = there && c.kept[i];
    }
    kept = kept && (value >= top + log_min_p || value == top);
    const double weight = kept ? exp(value / temp - top / temp) : 0;
    if (i == 0) c.first = MOST, c.last = 0;
    const double reached = block_scan(weight, k, c.sums, all);
    if (kept) {
        atomicMax(&c.last, i);
        if (reached > c.u * all) atomicMin(&c.first, i);
    }
    __syncthreads();
    return min(c.first, c.last);
}

#if SEND_TO
// The largest of all GPUs' largest logits, of equals the lowest id; by one thread.
__device__ __forceinline__ void exchange_best(const void* mail, int& id, float& top) {
    Post<SEND_TO> post;
    post.open(mail);
    post.send(0, top, false), post.send(1, __int_as_float(id), false);
    post.count();
    for (int r = 0; r < SEND_TO; r++) {
        unsigned value, at;
        if (r == post.me) continue;
        post.take(r, 0, value, at);
        const unsigned theirs = ordered(__uint_as_float(value)), ours = ordered(top);
        if (theirs > ours || (theirs == ours && (int)at < id))
            id = (int)at, top = __uint_as_float(value);
    }
}

// The k largest of all GPUs' k candidates, by ascending id, become c's; all threads of a CTA.
__device__ __forceinline__ void exchange_candidates(
        Candidates& c, const void* mail, unsigned long long* space, int k, int first) {
    const int i = threadIdx.x, of = i / k, at = i - of * k;
    const bool there = of < SEND_TO;
    unsigned value = 0, id = 0;
    Post<SEND_TO> post;
    post.open(mail);
    __syncthreads();
    if (i == 0) post.count();
    if (i < k) {
        post.send(2 * i, __uint_as_float(c.value[i]), false);
        post.send(2 * i + 1, __uint_as_float(c.id[i] + first), false);
    }
    if (there && of == post.me)
        value = c.value[at], id = c.id[at] + first;
    else if (there)
        post.take(of, 2 * at, value, id);
    c.kept[i] = false;
    // Ranks' ids ascend: equals by id are equals by number.
    const unsigned long long mine =
        there ? (unsigned long long)ordered(__uint_as_float(value)) << 32 | (unsigned)(MOST - i) : 0;
    const int n = SEND_TO * k;
    const unsigned long long one = sorted(mine, n > 32 ? 1 << (32 - __clz(n - 1)) : 32, space);
    __syncthreads();
    if (i < k) c.kept[MOST - (unsigned)one] = true;
    __syncthreads();
    unsigned* counts = (unsigned*)space;
    const unsigned kept = __ballot_sync(~0u, c.kept[i]), lane = i & 31;
    if (lane == 0) counts[i >> 5] = __popc(kept);
    __syncthreads();
    unsigned all;
    const unsigned place = before_warp(counts, all) + __popc(kept & ((1u << lane) - 1));
    if (kept >> lane & 1) c.id[place] = id, c.value[place] = value;
    __syncthreads();
}
#endif

extern "C" __global__ void __cluster_bounds__(SELECT_THREADS)
sample(int* token, int* pos, int* ring, float* logits, const long long* chain, int n_vocab,
       int ring_size, int first, const void* mail) {
    __shared__ SelectShared s;
    __shared__ Candidates c;
    pdl_launch();
    select_clear(s);
    pdl_wait();
    const int n_banned = (int)chain[5];
    for (int i = threadIdx.x; i < n_banned; i += SELECT_THREADS) {
        const long long at = chain[6 + i] - first;
        if (at >= 0 && at < n_vocab) logits[at] = NONE;
    }
    if (threadIdx.x < 6) c.chain[threadIdx.x] = chain[threadIdx.x];
    if (threadIdx.x == 6) c.position = pos[0] + 1;
    __syncthreads();  // every CTA of the cluster bans for itself
    RowShare share(logits, n_vocab);
    if (threadIdx.x == MOST - 1 && cluster_rank() == 0)  // while the logits are on their way
        c.u = uniform((unsigned long long)c.chain[3], c.position);
    cluster_wait();
    const double temp = __longlong_as_double(c.chain[0]);
    const int k = (int)c.chain[4];
    int id;
    float top;
    if (temp <= 0) {
        argmax(share, c);
        if (cluster_rank()) return;
        id = c.first, top = logits[id];
#if SEND_TO
        id += first;
        if (threadIdx.x == 0) exchange_best(mail, id, top);
#endif
    } else {
        select(share, k, s, [&](int place, int at) {
            peer_store(&c.id[place], 0, (unsigned)at);
            peer_store(&c.value[place], 0, __float_as_uint(logits[at]));
        });
        cluster_sync();
        if (cluster_rank()) return;
#if SEND_TO
        exchange_candidates(c, mail, (unsigned long long*)s.count, k, first);
#endif
        unsigned key = 0;
        for (int i = threadIdx.x & 31; i < k; i += 32)
            key = max(key, ordered(__uint_as_float(c.value[i])));
        top = unordered(warp_max(key));
        const int place = drawn(c, (unsigned long long*)s.count, k, top, temp);
        id = (int)c.id[place];
    }
    if (threadIdx.x) return;
    const bool finite = fabsf(top) < __int_as_float(0x7f800000);
    token[0] = finite ? id : 0;
    ring[c.position % ring_size] = finite ? id : -1;
    pos[0] = c.position;
}
