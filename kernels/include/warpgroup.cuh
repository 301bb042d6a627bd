// Hopper's warpgroup matrix products (sm_90a, where WGMMA is defined): 128 threads multiply 64 rows by
// N columns, 16 deep, float16 operands, float32 sums.
//
// Operands in shared memory are slabs of 64 values (128 bytes) a row, rows after one another, each
// slab at a multiple of 1024 bytes, 16-byte pieces swizzled: piece c of row i lies at c ^ (i & 7).
// A slab is read either along its rows (rows = rows of A or columns of B, values = depth), or, as
// B only, across (rows = depth, values = columns of B).
// Fragments: thread 4g + t of warp w holds in d[4i..4i+3] columns 8i + 2t, + 1 of rows 16w + g and
// 16w + g + 8; a[0..3] = (row g; depth 2t, + 1), (row g + 8; same), (g; 2t + 8, + 9), (g + 8;
// same): those of mma.m16n8k16, warp by warp.
// Registers of d and a are left alone from products_begin() until products_wait() says that they are free.
// Sources: PTX ISA 8.5, "Asynchronous Warpgroup Level Matrix"; own.
// Tested by: tests/gpu/test_cuda_prefill.py; tests/kernels/test_prefill.py stands in for this file.
#pragma once

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // target sm_90a
#define WGMMA

typedef unsigned long long Slab;  // what a product reads from: a shared memory descriptor

// Depth runs along the rows of a slab; a step of 16 in depth is 32 bytes.
__device__ __forceinline__ Slab slab_along(unsigned shared) {
    return (Slab)(shared >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// The same `more` bytes behind a pointer; the upper half is a constant: no carries.
__device__ __forceinline__ Slab slab_along(const void* shared, int more) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    constexpr unsigned swizzle_128 = 1u << 30, group_stride = 1024 >> 4;
    Slab both;
    asm("mov.b64 %0, {%1, %2};" : "=l"(both)
        : "r"(((at & 0x3FFFF) >> 4 | 1u << 16) + (more >> 4)), "r"(swizzle_128 | group_stride));
    return both;
}
// Depth runs down the rows; `next`: bytes from one slab of 64 columns to the next.
__device__ __forceinline__ Slab slab_across(unsigned shared, unsigned next) {
    return (Slab)(shared >> 4 & 0x3FFF) | (Slab)(next >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// Registers of d and a, and shared memory, are ready: before the first product of a group.
__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the last LEFT groups are done.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// The compiler must not move reads or writes of d across this.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// COUNT registers for each thread of this warpgroup from here on; all its warps call it.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---------------------------------------------------------------- products ------------------
// N columns are 4 registers of d for 8 of them. FROM: A and B; ADD: whether d is added to; ORDER: 0 for
// each operand in shared memory that is read along its rows, 1 for across.
#define PRODUCT_TEXT(N, D, FROM, ADD, ORDER)                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" N        \
    "k16.f32.f16.f16 {" D "}, " FROM ", p, 1, 1, " ORDER ";\n}\n"
#define PRODUCT_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PRODUCT_OUT16(i) PRODUCT_OUT4(i), PRODUCT_OUT4(i + 4), PRODUCT_OUT4(i + 8), PRODUCT_OUT4(i + 12)
#define PRODUCT_OUT32(i) PRODUCT_OUT16(i), PRODUCT_OUT16(i + 16)
#define PRODUCT_D4 "%0, %1, %2, %3"
#define PRODUCT_D8 PRODUCT_D4 ", %4, %5, %6, %7"
#define PRODUCT_D12 PRODUCT_D8 ", %8, %9, %10, %11"
#define PRODUCT_D16 PRODUCT_D12 ", %12, %13, %14, %15"
#define PRODUCT_D24 PRODUCT_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PRODUCT_D32 PRODUCT_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PRODUCT_D48 PRODUCT_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PRODUCT_D64 PRODUCT_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCT_D96                                                                                       \
    PRODUCT_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
                "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PRODUCT_D128                                                                                            \
    PRODUCT_D96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT_FRAGMENT "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)

// d = A B over 16 of depth, plus d where `add`; A and B along their rows. Runs until it is waited for.
template <int COUNT>
__device__ __forceinline__ void multiply(float (&d)[COUNT], Slab a, Slab b, int add) {
    static_assert(COUNT == 32 || COUNT == 64, "no such width");
    if constexpr (COUNT == 32)
        asm volatile(PRODUCT_TEXT("64", PRODUCT_D32, "%32, %33", "%34", "0, 0")
                     : PRODUCT_OUT32(0) : "l"(a), "l"(b), "r"(add));
    if constexpr (COUNT == 64)
        asm volatile(PRODUCT_TEXT("128", PRODUCT_D64, "%64, %65", "%66", "0, 0")
                     : PRODUCT_OUT32(0), PRODUCT_OUT32(32) : "l"(a), "l"(b), "r"(add));
}

// The same with A in registers.
template <int COUNT>
__device__ __forceinline__ void multiply(
        float (&d)[COUNT], const unsigned (&a)[4], Slab b, int add) {
    static_assert(COUNT <= 64 && COUNT % (COUNT < 16 ? 4 : COUNT < 32 ? 8 : 16) == 0, "no such width");
    if constexpr (COUNT == 4)
        asm volatile(PRODUCT_TEXT("8", PRODUCT_D4, "{%4, %5, %6, %7}, %8", "%9", "0")
                     : PRODUCT_OUT4(0) : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 8)
        asm volatile(PRODUCT_TEXT("16", PRODUCT_D8, "{%8, %9, %10, %11}, %12", "%13", "0")
                     : PRODUCT_OUT4(0), PRODUCT_OUT4(4) : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 12)
        asm volatile(PRODUCT_TEXT("24", PRODUCT_D12, "{%12, %13, %14, %15}, %16", "%17", "0")
                     : PRODUCT_OUT4(0), PRODUCT_OUT4(4), PRODUCT_OUT4(8) : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 16)
        asm volatile(PRODUCT_TEXT("32", PRODUCT_D16, "{%16, %17, %18, %19}, %20", "%21", "0")
                     : PRODUCT_OUT16(0) : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 24)
        asm volatile(PRODUCT_TEXT("48", PRODUCT_D24, "{%24, %25, %26, %27}, %28", "%29", "0")
                     : PRODUCT_OUT16(0), PRODUCT_OUT4(16), PRODUCT_OUT4(20)
                     : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 32)
        asm volatile(PRODUCT_TEXT("64", PRODUCT_D32, "{%32, %33, %34, %35}, %36", "%37", "0")
                     : PRODUCT_OUT32(0) : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 48)
        asm volatile(PRODUCT_TEXT("96", PRODUCT_D48, "{%48, %49, %50, %51}, %52", "%53", "0")
                     : PRODUCT_OUT32(0), PRODUCT_OUT16(32) : PRODUCT_FRAGMENT, "r"(add));
    if constexpr (COUNT == 64)
        asm volatile(PRODUCT_TEXT("128", PRODUCT_D64, "{%64, %65, %66, %67}, %68", "%69", "0")
                     : PRODUCT_OUT32(0), PRODUCT_OUT32(32) : PRODUCT_FRAGMENT, "r"(add));
}

// d += A B with A in registers and B across.
template <int COUNT>
__device__ __forceinline__ void multiply_across(float (&d)[COUNT], const unsigned (&a)[4], Slab b) {
    static_assert(COUNT == 32 || COUNT == 64 || COUNT == 96 || COUNT == 128, "no such width");
    if constexpr (COUNT == 32)
        asm volatile(PRODUCT_TEXT("64", PRODUCT_D32, "{%32, %33, %34, %35}, %36", "%37", "1")
                     : PRODUCT_OUT32(0) : PRODUCT_FRAGMENT, "n"(1));
    if constexpr (COUNT == 64)
        asm volatile(PRODUCT_TEXT("128", PRODUCT_D64, "{%64, %65, %66, %67}, %68", "%69", "1")
                     : PRODUCT_OUT32(0), PRODUCT_OUT32(32) : PRODUCT_FRAGMENT, "n"(1));
    if constexpr (COUNT == 96)
        asm volatile(PRODUCT_TEXT("192", PRODUCT_D96, "{%96, %97, %98, %99}, %100", "%101", "1")
                     : PRODUCT_OUT32(0), PRODUCT_OUT32(32), PRODUCT_OUT32(64) : PRODUCT_FRAGMENT, "n"(1));
    if constexpr (COUNT == 128)
        asm volatile(PRODUCT_TEXT("256", PRODUCT_D128, "{%128, %129, %130, %131}, %132", "%133", "1")
                     : PRODUCT_OUT32(0), PRODUCT_OUT32(32), PRODUCT_OUT32(64), PRODUCT_OUT32(96)
                     : PRODUCT_FRAGMENT, "n"(1));
}
#endif
