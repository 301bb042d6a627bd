// Warpgroup matrix products of Hopper (sm_90a): A from registers, B from shared memory.
//
// A warpgroup is four warps; warp i holds rows 16 i .. 16 i + 15 of the 64 as the A fragment of
// mma.m16n8k16, and of the N columns of D what mma.m16n8k16 would hold, block after block of 8:
// d[4 j + 0, 1] = (row g; columns 8 j + 2 t, + 1), d[4 j + 2, 3] = (row g + 8; the same columns).
// B is [N][64] float16, 128 bytes a row, rows 1024-byte aligned in groups of 8, 16-byte piece c of
// row n at piece c ^ (n & 7): the 128-byte swizzle.
// Registers of d and a must stay alone from wgmma_fence() until wgmma_wait() says that they are free.
// Sources: PTX ISA 8.8, section wgmma; own.
#pragma once

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // target sm_90a
#define WGMMA
#endif

#ifdef WGMMA
// Descriptor of B from a shared address and 32 bytes per 16 columns of K.
__device__ __forceinline__ unsigned long long wgmma_descriptor(const void* shared, int more = 0) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    constexpr unsigned swizzle_128 = 1u << 30, group_stride = 1024 >> 4;
    unsigned long long both;  // the upper half is a constant: no carries
    asm("mov.b64 %0, {%1, %2};" : "=l"(both)
        : "r"(((at & 0x3FFFF) >> 4 | 1u << 16) + (more >> 4)), "r"(swizzle_128 | group_stride));
    return both;
}

// Before the first product after registers of d or a were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most N committed groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What this thread wrote to shared memory (cp.async too, once waited for) becomes visible to wgmma.
__device__ __forceinline__ void wgmma_publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- barriers in shared memory, registers of a warpgroup -----------------------------------------
__device__ __forceinline__ void barrier_init(unsigned long long* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
                 :: "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, unsigned parity) {
    asm volatile("{\n.reg .pred p;\nWAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra WAIT_%=;\n}\n"
                 :: "r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(parity) : "memory");
}
// N registers for each thread of this warpgroup from here on; all its warps call it.
template <int N>
__device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Nothing that reads d moves above this.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define WGMMA_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_OUT16(i) WGMMA_OUT4(i), WGMMA_OUT4(i + 4), WGMMA_OUT4(i + 8), WGMMA_OUT4(i + 12)
#define WGMMA_D8 "%0, %1, %2, %3"
#define WGMMA_D16 WGMMA_D8 ", %4, %5, %6, %7"
#define WGMMA_D24 WGMMA_D16 ", %8, %9, %10, %11"
#define WGMMA_D0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_D1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_D3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT(N, D, A, B, ACC)                                                        \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " ACC ", 0;\nwgmma.mma_async.sync.aligned.m64n" N \
    "k16.f32.f16.f16 {" D "}, {" A "}, " B ", p, 1, 1, 0;\n}\n"
#define WGMMA_IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)

// d = a b, plus d if accumulate; float16 values, float32 sums. Runs until it is waited for.
template <int N>
__device__ __forceinline__ void wgmma_f16(
        float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, int accumulate) {
    static_assert(N <= 128 && N % (N < 32 ? 8 : 32) == 0, "no such width");
    if constexpr (N == 8)
        asm volatile(WGMMA_TEXT("8", WGMMA_D8, "%4, %5, %6, %7", "%8", "%9") : WGMMA_OUT4(0) : WGMMA_IN);
    if constexpr (N == 16)
        asm volatile(WGMMA_TEXT("16", WGMMA_D16, "%8, %9, %10, %11", "%12", "%13")
                     : WGMMA_OUT4(0), WGMMA_OUT4(4) : WGMMA_IN);
    if constexpr (N == 24)
        asm volatile(WGMMA_TEXT("24", WGMMA_D24, "%12, %13, %14, %15", "%16", "%17")
                     : WGMMA_OUT4(0), WGMMA_OUT4(4), WGMMA_OUT4(8) : WGMMA_IN);
    if constexpr (N == 32)
        asm volatile(WGMMA_TEXT("32", WGMMA_D0, "%16, %17, %18, %19", "%20", "%21")
                     : WGMMA_OUT16(0) : WGMMA_IN);
    if constexpr (N == 64)
        asm volatile(WGMMA_TEXT("64", WGMMA_D0 ", " WGMMA_D1, "%32, %33, %34, %35", "%36", "%37")
                     : WGMMA_OUT16(0), WGMMA_OUT16(16) : WGMMA_IN);
    if constexpr (N == 96)
        asm volatile(WGMMA_TEXT("96", WGMMA_D0 ", " WGMMA_D1 ", " WGMMA_D2, "%48, %49, %50, %51", "%52", "%53")
                     : WGMMA_OUT16(0), WGMMA_OUT16(16), WGMMA_OUT16(32) : WGMMA_IN);
    if constexpr (N == 128)
        asm volatile(WGMMA_TEXT("128", WGMMA_D0 ", " WGMMA_D1 ", " WGMMA_D2 ", " WGMMA_D3,
                           "%64, %65, %66, %67", "%68", "%69")
                     : WGMMA_OUT16(0), WGMMA_OUT16(16), WGMMA_OUT16(32), WGMMA_OUT16(48) : WGMMA_IN);
}
#endif
