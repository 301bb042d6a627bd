// Unpacks rows with kernels/include/quants.cuh built by g++: bytes on stdin, float32 on stdout.
//
// usage: quants_harness TYPE_ID ROWS VALUES_PER_ROW
// Each row lies in a buffer of its own that ends with it, at an address that is no better aligned
// than the type promises, so the sanitizers catch a read past the row and a misaligned one.
#include <stdio.h>
#include <stdlib.h>

#include "quants.cuh"

template <int QTYPE>
void unpack_row(const unsigned char* row, int n, float* out) {
    for (int g = 0; g < (n + 31) / 32; ++g) {
        float v[32], tail[32];
        load_group_tail<QTYPE>(row, g, n, tail);
        if (32 * g + 32 <= n) {
            load_group<QTYPE>(row, g, v);
            if (memcmp(v, tail, sizeof v)) abort();
        }
        for (int i = 0; i < 32; ++i)
            if (32 * g + i < n)
                out[32 * g + i] = tail[i];
            else if (tail[i] != 0)
                abort();
    }
    float beyond[32];
    load_group_tail<QTYPE>(row, (n + 31) / 32, n, beyond);
    for (float x : beyond)
        if (x != 0) abort();
}

template <int QTYPE>
int unpack_rows(int rows, int n) {
    using Traits = QuantTraits<QTYPE>;
    const size_t nbytes = (size_t)n / Traits::block * Traits::nbytes;
    float* out = (float*)malloc(n * sizeof(float));
    for (int r = 0; r < rows; ++r) {
        unsigned char* buffer = (unsigned char*)malloc(Traits::align + nbytes);
        unsigned char* row = buffer + Traits::align;
        if (fread(row, 1, nbytes, stdin) != nbytes) return 2;
        unpack_row<QTYPE>(row, n, out);
        if (fwrite(out, sizeof(float), n, stdout) != (size_t)n) return 2;
        free(buffer);
    }
    free(out);
    return getchar() == EOF ? 0 : 2;
}

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const int rows = atoi(argv[2]), n = atoi(argv[3]);
    switch (atoi(argv[1])) {
#define CASE(T) \
    case T: return unpack_rows<T>(rows, n);
        CASE(QT_F32) CASE(QT_F16) CASE(QT_BF16)
        CASE(QT_Q4_0) CASE(QT_Q4_1) CASE(QT_Q5_0) CASE(QT_Q5_1) CASE(QT_Q8_0)
        CASE(QT_Q2_K) CASE(QT_Q3_K) CASE(QT_Q4_K) CASE(QT_Q5_K) CASE(QT_Q6_K)
        CASE(QT_IQ4_NL) CASE(QT_IQ4_XS) CASE(QT_MXFP4) CASE(QT_IQ1_S) CASE(QT_IQ1_M)
        CASE(QT_IQ2_XXS) CASE(QT_IQ2_XS) CASE(QT_IQ2_S) CASE(QT_IQ3_XXS) CASE(QT_IQ3_S)
    }
    return 2;
}
