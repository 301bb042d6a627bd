// Op        add_partials: each residual stream of a GPU's ranks += the sum of their partials, in rank
//           order; join_columns: the columns of one rank's vocabulary rows into the logits
// Shapes    partials, streams: tables of n_ranks addresses of n dense values; `held` has a bit for each
//           rank that has a partial; out [n, all] dense, columns [n, width] dense
// Dtypes    float32; a partial is first rounded to TYPE: 0 float32, 1 float16, 2 bfloat16, 3 q8_0
// Grid      (ceil(n / 256)) and (ceil(width / 256), n), 256 threads
// Assumes   TYPE 3: n a multiple of 32, rows are whole blocks of 32; up to 63 ranks
// Numerics  bit-equal to parallel/comm.py's sums and to gguf-py's rounding
// Bound by  bytes: 4 n for each partial, 8 n for each stream
// Sources   own
// Tested by tests/kernels/test_shared_gpu.py, tests/gpu/test_cuda_ranks.py
// Variants  TYPE=0; TYPE=1; TYPE=2; TYPE=3
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pdl.cuh"
#include "reduce.cuh"

#ifndef TYPE
#define TYPE 0
#endif

// ---------------------------------------------------------------- device helpers ------------
// A partial as it would travel; all lanes of a warp hold values of one block of 32.
__device__ __forceinline__ float travelled(float x) {
#if TYPE == 1
    return __half2float(__float2half_rn(x));
#elif TYPE == 2
    return __bfloat162float(__float2bfloat16_rn(x));
#elif TYPE == 3
    const float most = warp_max(fabsf(x)), d = most / 127.f, inverse = d == 0.f ? 0.f : 1.f / d;
    return __half2float(__float2half_rn(d)) * roundf(x * inverse);
#else
    return x;
#endif
}

// ---------------------------------------------------------------- kernels -------------------
extern "C" __global__ void __launch_bounds__(256)
add_partials(const long long* partials, const long long* streams, long long n, int n_ranks,
             long long held) {
    pdl_launch();
    pdl_wait();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0.f;
    bool any = false;
    for (int rank = 0; rank < n_ranks; rank++) {
        if (!(held >> rank & 1)) continue;
        const float x = travelled(((const float*)partials[rank])[i]);
        sum = any ? sum + x : x;
        any = true;
    }
    if (!any) return;
    for (int rank = 0; rank < n_ranks; rank++) ((float*)streams[rank])[i] += sum;
}

extern "C" __global__ void __launch_bounds__(256)
join_columns(float* out, const float* columns, int width, int all, int first) {
    pdl_launch();
    pdl_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    out[(long long)blockIdx.y * all + first + i] = columns[(long long)blockIdx.y * width + i];
}
