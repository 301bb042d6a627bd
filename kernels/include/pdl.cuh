// Programmatic dependent launch: a kernel may start before its predecessor ends.
// Every CTA calls pdl_wait() before it reads what predecessors wrote and before any global write
// or return; weights may be read before it. Without hardware support both are no-ops.
#pragma once

__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
