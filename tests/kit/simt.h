// Runs a .cu file's kernels on the CPU, so that their arithmetic can be tested without a GPU.
//
// Each CUDA thread is a fiber; a CTA's fibers take turns at collectives (barriers, shuffles, mma,
// ldmatrix), CTAs run one after another. Include this first, then the kernel's text (headers
// inlined, as backends/cuda_sources.source() gives it); PTX goes through kernels/include/mma.cuh,
// which calls the functions below. kit/simt.py compiles it, and gives dynamic shared memory its size.
// What it can't show: races between barriers, memory order, speed.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp takes a jump to another fiber's stack for a mistake
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#define SIMT 1
#define __CUDACC_RTC__  // types.cuh leaves out its own shim
#undef __device__
#undef __global__
#undef __forceinline__
#undef __shared__
#undef __launch_bounds__
#undef __cluster_dims__
#undef __grid_constant__
#undef __align__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ thread_local  // one OS thread runs all fibers
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

namespace simt {

struct Barrier {
    int waiting = 0, generation = 0;
};
constexpr size_t STACK = 256 << 10;
inline std::vector<std::unique_ptr<char[]>> free_stacks;  // kept from CTA to CTA
struct Stack {
    std::unique_ptr<char[]> bytes;
    Stack() = default;
    Stack(Stack&&) = default;
    ~Stack() {
        if (bytes) free_stacks.push_back(std::move(bytes));
    }
    char* take() {
        if (free_stacks.empty()) return bytes.reset(new char[STACK]), bytes.get();
        bytes = std::move(free_stacks.back()), free_stacks.pop_back();
        return bytes.get();
    }
};
struct Fiber {
    ucontext_t start;  // where it begins; from then on it goes on at `at`
    jmp_buf at;        // a jump costs no system call, as a change of context does
    Stack stack;
    uint3 thread;
    int linear = 0;
    bool begun = false, done = false;
};
struct Cta {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<std::vector<void*>> slots;  // what each lane deposits for its warp
    Barrier all, named[16];
    std::vector<int> live_in_warp;
    int live = 0;
    jmp_buf scheduler;
};
inline Cta* cta;
inline Fiber* current;
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline std::function<void()> body;
inline const std::function<void()>* starting = &body;  // what a fiber runs that begins now
inline unsigned long long clock;  // nanoseconds, of kernels that look at it

// From a fiber to the scheduler, until the scheduler resumes it.
inline void yield() {
    if (!_setjmp(current->at)) _longjmp(cta->scheduler, 1);
}
inline void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(cta->scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
}

inline void arrive(Barrier& b, const int& expected) {
    const int mine = b.generation;
    b.waiting++;
    long spins = 0;
    while (b.generation == mine) {
        if (b.waiting >= expected) {
            b.waiting = 0, b.generation++;
            return;
        }
        if (++spins > 2000000) fprintf(stderr, "deadlock in thread %d\n", current->linear), abort();
        yield();
    }
}
inline int lane() { return current->linear & 31; }
inline int warp() { return current->linear >> 5; }
inline void sync_warp() { arrive(cta->warps[warp()], cta->live_in_warp[warp()]); }

// Calls f(slots of the 32 lanes) in every lane after all have deposited `mine`.
template <class F>
inline void collective(void* mine, F f) {
    auto& slots = cta->slots[warp()];
    slots[lane()] = mine;
    sync_warp();
    f(slots);
    sync_warp();
}

inline void entry() {
    (*starting)();
    current->done = true;
    cta->live--, cta->live_in_warp[warp()]--;
    yield();
}

inline void fill(Cta& now, dim3 block) {
    const int n = block.x * block.y * block.z;
    now.fibers.resize(n), now.warps.resize((n + 31) / 32), now.live = n;
    now.slots.assign((n + 31) / 32, std::vector<void*>(32, nullptr));
    now.live_in_warp.assign((n + 31) / 32, 0);
    for (int i = 0; i < n; i++) {
        Fiber& f = now.fibers[i];
        now.live_in_warp[i / 32]++;
        f.linear = i;
        f.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.take();
        f.start.uc_stack.ss_size = STACK;
        f.start.uc_link = nullptr;
        makecontext(&f.start, entry, 0);
    }
}

// A launch on one of several devices: `all` runs in every thread.
struct Work {
    unsigned grid, block;
    std::function<void()> all;
};

// Each device runs its launches one after another, all CTAs of one at a time; the devices' fibers
// take turns as drawn from `seed`. Kernels have no shared memory.
inline void run_devices(const std::vector<std::vector<Work>>& queues, unsigned seed) {
    struct Device {
        size_t at = 0;
        std::vector<std::unique_ptr<Cta>> ctas;
    };
    std::vector<Device> devices(queues.size());
    auto draw = [&] { return (seed = seed * 1664525u + 1013904223u) >> 16; };
    size_t left = 0;
    for (const auto& queue : queues) left += !queue.empty();
    while (left) {
        const size_t d = draw() % queues.size();
        Device& device = devices[d];
        if (device.at == queues[d].size()) continue;
        const Work& work = queues[d][device.at];
        if (device.ctas.empty())
            for (unsigned i = 0; i < work.grid; i++) {
                device.ctas.emplace_back(new Cta);
                fill(*device.ctas.back(), dim3(work.block));
            }
        const unsigned x = draw() % work.grid;
        cta = device.ctas[x].get(), block_index = {x, 0, 0}, starting = &work.all;
        grid_size = dim3(work.grid), block_size = dim3(work.block);
        for (Fiber& f : cta->fibers)
            if (!f.done && draw() % 4) resume(f);
        bool live = false;
        for (auto& one : device.ctas) live |= one->live > 0;
        if (live) continue;
        device.ctas.clear();
        left -= ++device.at == queues[d].size();
    }
    starting = &body;
}

template <class K, class... A>
inline void launch(dim3 grid, dim3 block, K kernel, A... args) {
    grid_size = grid, block_size = block;
    body = [=] { kernel(args...); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
                Cta now;
                cta = &now;
                fill(now, block);
                while (now.live)
                    for (Fiber& f : now.fibers)
                        if (!f.done) resume(f);
            }
}

// ---------------------------------------------------------------- tensor core pieces --------
inline float f16(unsigned bits) { __half_raw r; r.x = (unsigned short)bits; return __half2float(__half(r)); }
inline float bf16(unsigned bits) { unsigned u = bits << 16; float f; memcpy(&f, &u, 4); return f; }

// d[4] += a (16 x 16) b (16 x 8), fragments as mma.m16n8k16; sums in double, rounded once.
template <class Get>
inline void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Get get) {
    struct In { const unsigned *a, *b; } in{a, b};
    collective(&in, [&](std::vector<void*>& s) {
        const int g = lane() / 4, t = lane() % 4;
        for (int i = 0; i < 4; i++) {
            const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
            double sum = 0;
            for (int k = 0; k < 16; k++) {
                const In& x = *(In*)s[row % 8 * 4 + k % 8 / 2];
                const In& y = *(In*)s[col * 4 + k % 8 / 2];
                const unsigned wa = x.a[row / 8 + 2 * (k / 8)], wb = y.b[k / 8];
                sum += (double)get(wa >> 16 * (k & 1) & 0xFFFF) * get(wb >> 16 * (k & 1) & 0xFFFF);
            }
            d[i] = (float)(d[i] + sum);
        }
    });
}
// mma.m16n8k32 of bytes, those of b signed.
inline void mma_16832(
        unsigned (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool a_signed) {
    struct In { const unsigned *a, *b; } in{a, b};
    collective(&in, [&](std::vector<void*>& s) {
        const int g = lane() / 4, t = lane() % 4;
        for (int i = 0; i < 4; i++) {
            const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
            int sum = 0;
            for (int k = 0; k < 32; k++) {
                const In& x = *(In*)s[row % 8 * 4 + k % 16 / 4];
                const In& y = *(In*)s[col * 4 + k % 16 / 4];
                const unsigned wa = x.a[row / 8 + 2 * (k / 16)] >> 8 * (k % 4) & 255;
                const unsigned wb = y.b[k / 16] >> 8 * (k % 4) & 255;
                sum += (a_signed ? (signed char)wa : (int)wa) * (signed char)wb;
            }
            d[i] += (unsigned)sum;
        }
    });
}
// Eight-by-eight matrices of 16-bit values from row addresses held by lanes 8i .. 8i + 7.
template <int N>
inline void ldmatrix(unsigned (&r)[N], const void* row, bool transposed) {
    collective((void*)row, [&](std::vector<void*>& s) {
        const int g = lane() / 4, t = lane() % 4;
        for (int m = 0; m < N; m++) {
            auto at = [&](int i, int j) { return (unsigned)((unsigned short*)s[8 * m + i])[j]; };
            r[m] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16
                              : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
        }
    });
}
template <class T>
inline T shuffle(T v, int from) {
    T out;
    collective(&v, [&](std::vector<void*>& s) { out = *(T*)s[from & 31]; });
    return out;
}
}  // namespace simt

// ---------------------------------------------------------------- CUDA's names --------------
#define threadIdx (simt::current->thread)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
inline void __syncthreads() { simt::arrive(simt::cta->all, simt::cta->live); }
inline void __syncwarp(unsigned = ~0u) { simt::sync_warp(); }
inline void __threadfence() {}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int m, int = 32) { return simt::shuffle(v, simt::lane() ^ m); }
template <class T> inline T __shfl_sync(unsigned, T v, int from, int width = 32) {
    return simt::shuffle(v, (simt::lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T> inline T __shfl_down_sync(unsigned, T v, int d, int = 32) {
    return simt::shuffle(v, simt::lane() + d > 31 ? simt::lane() : simt::lane() + d);
}
template <class T> inline T __shfl_up_sync(unsigned, T v, int d, int = 32) {
    return simt::shuffle(v, simt::lane() < d ? simt::lane() : simt::lane() - d);
}
inline unsigned __ballot_sync(unsigned, int p) {
    unsigned out = 0;
    simt::collective(&p, [&](std::vector<void*>& s) {
        for (int i = 0; i < 32; i++) out |= (s[i] && *(int*)s[i] ? 1u : 0u) << i;
    });
    return out;
}
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == ~0u; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    const unsigned long long both = a | (unsigned long long)b << 32;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = s >> 4 * i & 15, byte = (unsigned)(both >> 8 * (pick & 7)) & 255;
        r |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return r;
}
inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float exp2f_(float x) { return exp2f(x); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline long long min(long long a, int b) { return a < b ? a : b; }
template <class T, class V> inline T atomicAdd(T* p, V v) { const T old = *p; *p += (T)v; return old; }
template <class T, class V> inline T atomicMax(T* p, V v) { const T old = *p; if ((T)v > old) *p = (T)v; return old; }
inline unsigned atomicInc(unsigned* p, unsigned top) { const unsigned old = *p; *p = old >= top ? 0 : old + 1; return old; }
template <class T> inline T atomicOr(T* p, T v) { const T old = *p; *p |= v; return old; }
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline double __longlong_as_double(long long x) { double d; memcpy(&d, &x, 8); return d; }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <class T, class V> inline T atomicMin(T* p, V v) {
    const T old = *p;
    if ((T)v < old) *p = (T)v;
    return old;
}
inline int __syncthreads_count(int p) {
    static thread_local int count;
    __syncthreads();
    count = 0;
    __syncthreads();
    count += p != 0;
    __syncthreads();
    return count;
}
