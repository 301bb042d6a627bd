// Barriers in shared memory and bulk copies that arrive at them; shared addresses are 32-bit.
// Only for sm_90 and later.
//
// A bulk copy is done by the async proxy: what threads wrote to shared memory must be published by
// publish_shared() before a bulk store or a warpgroup product reads it.
// Sources: PTX ISA 8.5 (mbarrier, cp.async.bulk); own.
// Tested by: tests/gpu/test_cuda_prefill.py; tests/kernels/test_prefill.py stands in for this file.
#pragma once

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

// ---------------------------------------------------------------- barriers ------------------
__device__ __forceinline__ void barrier_init(unsigned bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
// After all barrier_init of a CTA, before its __syncthreads.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives, and says how many bytes of bulk copies belong to this phase.
__device__ __forceinline__ void barrier_expect(unsigned bar, int nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(nbytes)
                 : "memory");
}
// Until the phase of this parity is complete; a fresh barrier counts as complete in parity 1.
__device__ __forceinline__ void barrier_wait(unsigned bar, int parity) {
    asm volatile(
        "{.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again;}"
        ::"r"(bar), "r"(parity) : "memory");
}

// Named barriers 1..15 among `threads` threads of a CTA.
__device__ __forceinline__ void meet(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void let_pass(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---------------------------------------------------------------- copies --------------------
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Addresses and sizes are multiples of 16.
__device__ __forceinline__ void bulk_load(unsigned to, const void* from, int nbytes, unsigned bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(nbytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, unsigned from, int nbytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 ::"l"(__cvta_generic_to_global(to)), "r"(from), "r"(nbytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// This thread's bulk stores have read their source.
__device__ __forceinline__ void bulk_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// This thread's bulk stores are complete.
__device__ __forceinline__ void bulk_stores_done() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// 16 bytes to shared memory by this thread; zeros where `valid` is 0.
__device__ __forceinline__ void copy16(unsigned to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of float16 fragments; lane L gives the address of row L % 8 of matrix L / 8.
__device__ __forceinline__ void store_matrices(unsigned to, unsigned a, unsigned b, unsigned c,
                                               unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
