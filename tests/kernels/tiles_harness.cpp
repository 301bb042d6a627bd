// Unpacks a tiled weight with kernels/include/tiles.cuh built by g++: the buffer on stdin, values on
// stdout: exact as float32, then scaled as float16; both [row tiles * 16, columns].
//
// usage: tiles_harness TYPE_ID ROW_TILES COLUMN_TILES BYTES
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <vector>

#include "tiles.cuh"

template <int QTYPE>
int unpack(int n_row_tiles, int n_col_tiles, unsigned char* buffer) {
    using T = Tile<QTYPE>;
    const int n = n_col_tiles * TILE_COLS;
    std::vector<float> exact(n_row_tiles * TILE_ROWS * (size_t)n, 1e30f);
    std::vector<unsigned short> scaled(exact.size(), 0x7E00);
    const TileView<QTYPE> view = tile_view<QTYPE>(buffer, n_row_tiles, n_col_tiles);
    const float boost = tile_boost<QTYPE>(buffer);
    if (boost * tile_unboost<QTYPE>(buffer) != 1) abort();
    for (int tile = 0; tile < n_row_tiles * n_col_tiles; ++tile)
        for (int lane = 0; lane < 32; ++lane) {
            const int row_tile = tile / n_col_tiles, col_tile = tile % n_col_tiles;
            TileData<QTYPE> w;
            load_tile<QTYPE>(view, row_tile, col_tile, lane, w);
            for (int j = 0; j < TILE_STEPS; ++j) {
                unsigned r[4], biased[4], low[4] = {}, half[4];
                float s[2], m[2];
                exact_scales<QTYPE>(w, j / T::steps, s, m);
                exact_fragment<QTYPE>(w, j, r);
                biased_fragment<QTYPE>(w, j, biased);
                if constexpr (T::has_low) exact_low(w, j, low);
                scaled_fragment<QTYPE>(w, j, half_scales<QTYPE>(w, j / T::steps, boost), half);
                for (int i = 0; i < 8; ++i) {
                    const int shift = i & 1 ? 0 : 16, reg = i / 2;
                    const int row = 16 * row_tile + lane / 4 + 8 * (reg & 1);
                    const int col = 64 * col_tile + 16 * j + 2 * (lane % 4) + 8 * (reg / 2) + i % 2;
                    auto number = [&](unsigned x) { return bf16_bits_to_float(x << shift >> 16); };
                    float value = number(r[reg]);
                    if (T::offset && number(biased[reg]) != value + T::offset) abort();
                    if (T::has_low) value += number(low[reg]);
                    if (T::has_scale) value = s[reg & 1] * value;
                    exact[(size_t)row * n + col] = T::has_min ? value + m[reg & 1] : value;
                    scaled[(size_t)row * n + col] = half[reg] << shift >> 16;
                }
            }
        }
    fwrite(exact.data(), 4, exact.size(), stdout);
    fwrite(scaled.data(), 2, scaled.size(), stdout);
    return 0;
}

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    const int n_row_tiles = atoi(argv[2]), n_col_tiles = atoi(argv[3]);
    const size_t nbytes = atoll(argv[4]);
    const std::unique_ptr<unsigned char, void (*)(void*)> held(
        (unsigned char*)aligned_alloc(256, nbytes), free);
    unsigned char* buffer = held.get();
    if (fread(buffer, 1, nbytes, stdin) != nbytes) return 2;
    switch (atoi(argv[1])) {
#define CASE(T) \
    case T: return unpack<T>(n_row_tiles, n_col_tiles, buffer);
        CASE(QT_F16) CASE(QT_BF16) CASE(QT_Q4_0) CASE(QT_Q4_1) CASE(QT_Q5_0) CASE(QT_Q5_1)
        CASE(QT_Q8_0) CASE(QT_IQ4_NL) CASE(QT_MXFP4) CASE(QT_Q4_K) CASE(QT_Q5_K) CASE(QT_Q6_K)
        CASE(QT_IQ4_XS) CASE(QT_Q2_K) CASE(QT_Q3_K) CASE(QT_IQ3_XXS) CASE(QT_IQ3_S) CASE(QT_IQ2_XXS)
        CASE(QT_IQ2_XS) CASE(QT_IQ2_S) CASE(QT_IQ1_S) CASE(QT_IQ1_M)
    }
    return 2;
}
