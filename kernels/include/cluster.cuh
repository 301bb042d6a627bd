// A cluster of CLUSTER CTAs that reach each other's shared memory; with CLUSTER 1 plain CTAs, so that
// the same text serves devices without clusters. Before the first peer_load or peer_store all CTAs
// must have started: cluster_arrive() early, cluster_wait() before it. And no CTA may leave while
// others still reach for its memory.
// Sources: PTX ISA 8.8; own. CLUSTER > 1 needs compute capability 9.0.
#pragma once

#ifndef CLUSTER
#define CLUSTER 1
#endif

#if CLUSTER > 1
#define __cluster_bounds__(...) __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(__VA_ARGS__)

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Where CTA `rank` of the cluster has what `mine` is here.
__device__ __forceinline__ unsigned peer_address(const void* mine, unsigned rank) {
    unsigned at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at) : "r"((unsigned)__cvta_generic_to_shared(mine)), "r"(rank));
    return at;
}
// The word where CTA `rank` of the cluster has its `mine`.
__device__ __forceinline__ unsigned peer_load(const unsigned* mine, unsigned rank) {
    unsigned v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(v) : "r"(peer_address(mine, rank)) : "memory");
    return v;
}
// To an address that peer_address() gave.
__device__ __forceinline__ void store_there(unsigned at, unsigned v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(at), "r"(v) : "memory");
}
__device__ __forceinline__ void store_there(unsigned at, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(at), "f"(v) : "memory");
}
__device__ __forceinline__ void store_there(unsigned at, float a, float b) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" :: "r"(at), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void peer_store(unsigned* mine, unsigned rank, unsigned v) {
    store_there(peer_address(mine, rank), v);
}
#else
#define __cluster_bounds__(...) __launch_bounds__(__VA_ARGS__)
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ unsigned peer_load(const unsigned* mine, unsigned) { return *mine; }
__device__ __forceinline__ void peer_store(unsigned* mine, unsigned, unsigned v) { *mine = v; }
#endif

// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
