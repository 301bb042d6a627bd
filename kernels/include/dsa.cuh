// Index keys and the pieces of index queries, as all DSA kernels see them.
// KEYS  0 float32, 1 float16, 2 bfloat16, 3 q8_0 (int8, scales of 32 columns apart)
// PARTS 16-bit pieces of a query for tensor cores: 2 float16 beside float16 keys, 3 bfloat16 beside
//       bfloat16 keys; 0: float32 queries for plain products
// HEADS and WIDTH of the index queries, for the kernels that fix them
// Sources: own
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef KEYS
#define KEYS 1
#endif
#ifndef PARTS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // no tensor core products of this kind
#define PARTS 0
#else
#define PARTS (KEYS == 1 ? 2 : KEYS == 2 ? 3 : 0)
#endif
#endif

#ifndef HEADS
#define HEADS 32
#endif
#ifndef WIDTH
#define WIDTH 128
#endif

#if KEYS == 0
typedef float Key;
#elif KEYS == 1
typedef __half Key;
#elif KEYS == 2
typedef __nv_bfloat16 Key;
#else
typedef signed char Key;
#endif

__device__ __forceinline__ float get(float v) { return v; }
__device__ __forceinline__ float get(__half v) { return __half2float(v); }
__device__ __forceinline__ float get(__nv_bfloat16 v) { return __bfloat162float(v); }

// Largest position of n tokens; whole warps.
__device__ __forceinline__ int largest(const int* pos, int n) {
    int last = -1;
    for (int i = threadIdx.x & 31; i < n; i += 32) last = max(last, pos[i]);
    for (int offset = 16; offset; offset >>= 1) last = max(last, __shfl_xor_sync(~0u, last, offset));
    return last;
}
