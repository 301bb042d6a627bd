// Tensor core and copy instructions as functions; under tests/kit/simt.h they run on the CPU.
//
// Fragments of m16n8k16 with g = lane / 4, t = lane % 4, low half first:
//   a[0] (row g; cols 2t, 2t+1), a[1] (row g+8; same), a[2], a[3] the same at cols + 8
//   b[0] (k 2t, 2t+1; column g), b[1] the same at k + 8;  d[0..1] (row g; cols 2t, 2t+1), d[2..3] row g+8
// Sources: PTX ISA 8.8; own. Needs compute capability 8.0.
#pragma once

#ifdef SIMT
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    simt::mma_16816(d, a, b, simt::f16);
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    simt::mma_16816(d, a, b, simt::bf16);
}
template <int N>
__device__ __forceinline__ void ldmatrix(unsigned (&r)[N], const void* row) { simt::ldmatrix(r, row, false); }
template <int N>
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[N], const void* row) { simt::ldmatrix(r, row, true); }
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
    if (valid) memcpy(shared, global, 16);
    else memset(shared, 0, 16);
}
__device__ __forceinline__ void cp_async_commit() {}
template <int N>
__device__ __forceinline__ void cp_async_wait() {}
#else
// d += a b, float16 values, float32 sums.
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, bfloat16 values, float32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// N (1, 2 or 4) eight-by-eight matrices of 16-bit values; lane 8i + j gives the address of row j of
// matrix i (16-byte aligned, shared memory). r[i]: row g, columns 2t and 2t + 1.
template <int N>
__device__ __forceinline__ void ldmatrix(unsigned (&r)[N], const void* row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if constexpr (N == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else if constexpr (N == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
}

// The same, each matrix transposed: r[i]: rows 2t and 2t + 1, column g.
template <int N>
__device__ __forceinline__ void ldmatrix_trans(unsigned (&r)[N], const void* row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if constexpr (N == 4)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}

// 16 bytes from global to shared memory without registers; zeros when not valid.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's committed groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif
