// Op        draw_bytes: seeded random GGUF bytes of a weight, as mlacli/loading/drawn.py defines them
// Shapes    out [lead, rows, width] bytes: byte (i, j, k) is byte first + i lead_stride + j row_stride
//           + k of the tensor
// Dtypes    DRAW 0 F32, 1 F16, 2 BF16: a value's bits from a hash of its number; 3 blocks of nbytes:
//           byte j from a hash of j / 4, but for the places in f0 .. f3
// Grid      any, 256 threads: four bytes of out a turn
// Assumes   out 4-byte aligned with room up to a multiple of 4; a field is place | mask << 16 | rest
//           << 24, -1 none
// Numerics  bit for bit as NumPy: a value is one product, rounded once
// Bound by  64-bit divisions; a byte a nanosecond and SM
// Sources   the hash: lowbias32 by C. Wellons (public domain); code own
// Variants  DRAW=0; DRAW=1; DRAW=2; DRAW=3
// Tested by tests/kernels/test_draw.py, tests/gpu/test_cuda_weights.py
#include "pdl.cuh"
#include "types.cuh"
#include "pairs.cuh"

__device__ __forceinline__ unsigned drawn_hash(unsigned key, unsigned x) {
    x ^= x >> 16;
    x = x * 0x7FEB352D + key;
    x ^= x >> 15;
    x *= 0x846CA68B;
    return x ^ x >> 16;
}

// Byte j of the tensor.
__device__ __forceinline__ unsigned drawn_byte(
        unsigned key, float scale, int nbytes, const unsigned (&fields)[4], long long j) {
#if DRAW == 3
    unsigned byte = drawn_hash(key, (unsigned)(j >> 2)) >> 8 * (int)(j & 3) & 255;
    const unsigned place = (unsigned)(j % nbytes);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if ((fields[i] & 0xFFFF) == place) byte = (byte & fields[i] >> 16 & 255) | fields[i] >> 24;
    return byte;
#else
    constexpr int size = DRAW == 0 ? 4 : 2;
    const unsigned word = drawn_hash(key, (unsigned)(j / size));
    const int sum = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24);
    const float value = (float)(sum - 510) * scale;
    unsigned bits = __float_as_uint(value);
    if (DRAW == 1) bits = half2_of(value, 0.f) & 0xFFFF;
    if (DRAW == 2) bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return bits >> 8 * (int)(j % size) & 255;
#endif
}

extern "C" __global__ void __launch_bounds__(256)
draw_bytes(unsigned char* out, int lead, int rows, int width, long long first,
           long long lead_stride, long long row_stride, int key, float scale, int nbytes, int f0,
           int f1, int f2, int f3) {
    const unsigned fields[4] = {(unsigned)f0, (unsigned)f1, (unsigned)f2, (unsigned)f3};
    const long long n = (long long)lead * rows * width;
    pdl_launch();
    pdl_wait();
    for (long long at = 4 * (blockIdx.x * 256LL + threadIdx.x); at < n; at += 1024LL * gridDim.x) {
        long long row = at / width, k = at % width;
        unsigned word = 0;
        for (int i = 0; i < 4; i++) {
            if (k == width) k = 0, row++;
            const long long j = first + row / rows * lead_stride + row % rows * row_stride + k++;
            word |= drawn_byte(key, scale, nbytes, fields, j) << 8 * i;
        }
        *(piece32*)(out + at) = word;
    }
}
