// Runs kernels/repack.cu on the CPU: GGUF bytes on stdin, the weight's buffer on stdout.
//
// usage: repack_harness TYPE_ID LEAD ROWS COLUMNS SKIP ROW_BYTES COLUMN_TILES BYTES TILES_A_PIECE
#include "simt.h"
#define WTYPE 2  // of the kernel itself; below every type's function is called
#include "repack.cu"

template <int QTYPE>
void run(int lead, int rows, int n_in, int skip, int row_bytes, int col_tiles, int piece,
         unsigned char* buffer, const unsigned char* raw) {
    const int per_lead = (rows + 15) / 16, all = lead * per_lead;
    for (int first = 0; first < all; first += piece) {
        const int n = (first + piece < all ? piece : all - first) * ((col_tiles + 3) / 4);
        const long long row = (long long)(first / per_lead) * rows + first % per_lead * 16;
        // A copy of what follows, so that reads before the piece show.
        std::vector<unsigned char> copy(raw + row * row_bytes, raw + (long long)lead * rows * row_bytes);
        simt::launch(dim3(n), dim3(128), [=, &copy] {
            repack<QTYPE>(buffer, copy.data(), first, rows, all, n_in, skip, col_tiles, row_bytes,
                          blockIdx.x);
        });
    }
}

int main(int argc, char** argv) {
    if (argc != 10) return 2;
    int a[10];
    for (int i = 1; i < 10; ++i) a[i] = atoi(argv[i]);
    std::vector<unsigned char> raw((size_t)a[2] * a[3] * a[6]);
    if (fread(raw.data(), 1, raw.size(), stdin) != raw.size()) return 2;
    unsigned char* buffer = (unsigned char*)aligned_alloc(256, a[8]);
    memset(buffer, 0xA5, a[8]);  // what no warp writes shows
    memset(buffer, 0, 256);
    switch (a[1]) {
#define CASE(T) \
    case T: run<T>(a[2], a[3], a[4], a[5], a[6], a[7], a[9], buffer, raw.data()); break;
        CASE(QT_F16) CASE(QT_BF16) CASE(QT_Q4_0) CASE(QT_Q4_1) CASE(QT_Q5_0) CASE(QT_Q5_1)
        CASE(QT_Q8_0) CASE(QT_IQ4_NL) CASE(QT_MXFP4) CASE(QT_Q4_K) CASE(QT_Q5_K) CASE(QT_Q6_K)
        CASE(QT_IQ4_XS)
        default: return 2;
    }
    return fwrite(buffer, 1, a[8], stdout) == (size_t)a[8] ? 0 : 2;
}
