// kernels/repack.cu for the CPU, as a library: what a launch of repack_tiles does.
#include "simt.h"
#define WTYPE 2  // of the kernel itself; below every type's function is called
#include "repack.cu"

extern "C" int repack_on_cpu(int qtype, int n_ctas, unsigned char* buffer, const unsigned char* raw,
                             int first, int rows, int n_row_tiles, int n_in, int skip,
                             int n_col_tiles, int row_bytes) {
    auto run = [=](auto repack) {
        simt::launch(dim3(n_ctas), dim3(128), [=] {
            repack(buffer, raw, first, rows, n_row_tiles, n_in, skip, n_col_tiles, row_bytes,
                   blockIdx.x);
        });
        return 0;
    };
    switch (qtype) {
#define CASE(T) \
    case T: return run(repack<T>);
        CASE(QT_F16) CASE(QT_BF16) CASE(QT_Q4_0) CASE(QT_Q4_1) CASE(QT_Q5_0) CASE(QT_Q5_1)
        CASE(QT_Q8_0) CASE(QT_IQ4_NL) CASE(QT_MXFP4) CASE(QT_Q4_K) CASE(QT_Q5_K) CASE(QT_Q6_K)
        CASE(QT_IQ4_XS) CASE(QT_Q2_K) CASE(QT_Q3_K) CASE(QT_IQ3_XXS) CASE(QT_IQ3_S) CASE(QT_IQ2_XXS)
        CASE(QT_IQ2_XS) CASE(QT_IQ2_S) CASE(QT_IQ1_S) CASE(QT_IQ1_M)
    }
    return 1;
}
