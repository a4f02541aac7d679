// Dynamic int8 activations: a scale for each row, and the product's rows scaled back.
#include <algorithm>

#include "parallel.h"
#include "vector.h"

namespace {

// Round to whole numbers around `zero` as bytes; x / scale lies within [-limit, limit].
inline void store_bytes(uint8_t* out, Floats x, int n) {
    alignas(64) float part[LANES];
    store(part, x);
    for (int i = 0; i < std::min(n, LANES); i++) out[i] = uint8_t(part[i]);
}
#if defined(__AVX512F__)
inline void store_whole_bytes(uint8_t* out, Floats x) {
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(to_ints(x)));
}
#else
inline void store_whole_bytes(uint8_t* out, Floats x) { store_bytes(out, x, LANES); }
#endif

template <class T>
void quantize_row(const T* x, uint8_t* out, float* scale, int64_t size, int limit) {
    Floats most = splat(0);
    for (int64_t i = 0; i < size; i += LANES) most = maximum(most, absolute(load_up_to(x + i, int(size - i))));
    float largest_of = largest(most);
    *scale = largest_of / float(limit);
    Floats factor = splat(largest_of > 0 ? float(limit) / largest_of : 0), zero = splat(float(limit + 1));
    for (int64_t i = 0; i < size; i += LANES) {
        int n = int(size - i);
        Floats whole = round_to_integer(load_up_to(x + i, n) * factor) + zero;
        if (n >= LANES)
            store_whole_bytes(out + i, whole);
        else
            store_bytes(out + i, whole, n);
    }
}

template <class T>
void scale_row(T* y, float scale, const float* bias, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        int n = int(size - i);
        Floats scaled = load_up_to(y + i, n) * splat(scale);
        if (bias) scaled = scaled + load_up_to(bias + i, n);
        store_up_to(y + i, scaled, n);
    }
}

}  // namespace

// x [rows, size] -> out, bytes around limit + 1, and scales fp32 [rows]: x is about (out - limit - 1) * scale.
EXPORTED void batchinfer_quantize_rows(int type, const void* x, uint8_t* out, float* scales, int64_t rows, int64_t size,
                                       int limit, int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        parallel_for(threads, rows, 1 + 8192 / size, [=](int64_t row) {
            quantize_row((const T*)x + row * size, out + row * size, scales + row, size, limit);
        });
    });
}

// y [rows, size] in place: each row times its scale, plus the bias [size] where there is one.
EXPORTED void batchinfer_scale_rows(int type, void* y, const float* scales, const float* bias, int64_t rows, int64_t size,
                                    int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        parallel_for(threads, rows, 1 + 8192 / size,
                     [=](int64_t row) { scale_row((T*)y + row * size, scales[row], bias, size); });
    });
}
