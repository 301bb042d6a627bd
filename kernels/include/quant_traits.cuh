// Sizes of the GGUF weight types and how load_bytes() of quants.cuh writes their values.
//
// Sources: gguf-py's GGML_QUANT_SIZES (llama.cpp's Python package, MIT); code own.
// Tested by: tests/kernels/test_quants.py.
#pragma once
#include "types.cuh"

template <int BLOCK, int NBYTES, int BIAS = 0, bool MIN = false>
struct Layout {
    static constexpr int block = BLOCK;    // values in a block
    static constexpr int nbytes = NBYTES;  // bytes in a block
    static constexpr int align = (NBYTES & -NBYTES) < 16 ? (NBYTES & -NBYTES) : 16;
    static constexpr int bias = BIAS;  // subtracted from the bytes of load_bytes()
    static constexpr bool has_min = MIN;
};
template <int QTYPE> struct QuantTraits;
template <> struct QuantTraits<QT_F32> : Layout<1, 4> {};
template <> struct QuantTraits<QT_F16> : Layout<1, 2> {};
template <> struct QuantTraits<QT_BF16> : Layout<1, 2> {};
template <> struct QuantTraits<QT_Q4_0> : Layout<32, 18, 8> {};
template <> struct QuantTraits<QT_Q4_1> : Layout<32, 20, 0, true> {};
template <> struct QuantTraits<QT_Q5_0> : Layout<32, 22, 16> {};
template <> struct QuantTraits<QT_Q5_1> : Layout<32, 24, 0, true> {};
template <> struct QuantTraits<QT_Q8_0> : Layout<32, 34, 128> {};
template <> struct QuantTraits<QT_IQ4_NL> : Layout<32, 18, 128> {};
template <> struct QuantTraits<QT_MXFP4> : Layout<32, 17, 12> {};
template <> struct QuantTraits<QT_Q2_K> : Layout<256, 84, 0, true> {};
template <> struct QuantTraits<QT_Q3_K> : Layout<256, 110, 4> {};
template <> struct QuantTraits<QT_Q4_K> : Layout<256, 144, 0, true> {};
template <> struct QuantTraits<QT_Q5_K> : Layout<256, 176, 0, true> {};
template <> struct QuantTraits<QT_Q6_K> : Layout<256, 210, 32> {};
template <> struct QuantTraits<QT_IQ4_XS> : Layout<256, 136, 128> {};
template <> struct QuantTraits<QT_IQ2_XXS> : Layout<256, 66, 128> {};
template <> struct QuantTraits<QT_IQ2_XS> : Layout<256, 74, 128> {};
template <> struct QuantTraits<QT_IQ2_S> : Layout<256, 82, 128> {};
template <> struct QuantTraits<QT_IQ3_XXS> : Layout<256, 98, 128> {};
template <> struct QuantTraits<QT_IQ3_S> : Layout<256, 110, 128> {};
template <> struct QuantTraits<QT_IQ1_S> : Layout<256, 50, 16> {};
template <> struct QuantTraits<QT_IQ1_M> : Layout<256, 56, 16> {};
