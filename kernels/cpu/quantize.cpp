// Dynamic int8 activations for products with int8 weights.
//
// A row of activations gets one scale. A few of its values stand far out (in language models the same few channels
// always), and a scale that held them would leave the others few of the 127 steps. So the scale holds OUTLIER times
// the row's root mean square, values beyond are clipped, and what was clipped is multiplied in fp32 beside the product.
// By Chebyshev at most 1 / OUTLIER^2 of a row's values stand out.
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "quantize.h"
#include "vector.h"

namespace {

constexpr float OUTLIER = 4.0f;

int64_t most_rests(int64_t size) { return int64_t(double(size) / (double(OUTLIER) * OUTLIER)) + 1; }

// x / scale is within [-limit, limit]: rounded, plus limit + 1. rests has room for most_rests(size); returns how many.
template <class T>
int quantize_row(const T* x, uint8_t* out, float* scale, Rest* rests, int64_t size, int limit) {
    Floats most = splat(0), squares = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        Floats v = load_up_to(x + i, int(size - i));
        most = maximum(most, absolute(v));
        squares = fma(v, v, squares);
    }
    float spread = OUTLIER * std::sqrt(sum(squares) / float(size));
    float top = spread > largest(most) ? largest(most) : spread;  // not a number where one of the values is none
    *scale = top / float(limit);
    Floats factor = splat(top > 0 ? float(limit) / top : 0), zero = splat(float(limit + 1)), high = splat(top);
    int count = 0;
    int64_t room = most_rests(size);
    for (int64_t i = 0; i < size; i += LANES) {
        int n = int(std::min<int64_t>(size - i, LANES));
        Floats v = load_up_to(x + i, n);
        Floats held = maximum(minimum(v, high), splat(-top));
        alignas(64) float part[LANES];
        if (any_at_least(absolute(v - held), splat(1e-30f))) {
            store(part, v - held);
            for (int j = 0; j < n; j++)
                if (part[j] != 0 && count < room) rests[count++] = {int32_t(i + j), part[j]};
        }
        Floats whole = round_to_integer(held * factor) + zero;
#if defined(__AVX512F__)
        if (n == LANES) {
            _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(to_ints(whole)));
            continue;
        }
#endif
        store(part, whole);
        for (int j = 0; j < n; j++) out[i + j] = uint8_t(part[j]);
    }
    return count;
}

template <class T>
void finish_row(const float* product, T* out, float scale, const Rest* rests, int count, const int8_t* weight,
                const float* weight_scales, const float* bias, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        int n = int(size - i);
        Floats extra = splat(0);
        for (int j = 0; j < count; j++) {
            const int8_t* row = weight + int64_t(rests[j].place) * size + i;
            int8_t part[LANES] = {};
            if (n < LANES) {
                std::copy(row, row + n, part);
                row = part;
            }
#if defined(__AVX512F__)
            Ints w = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)row));
#else
            Ints w = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)row));
#endif
            extra = fma(to_floats(w), splat(rests[j].value), extra);
        }
        Floats y = fma(extra, load_up_to(weight_scales + i, n), load_up_to(product + i, n) * splat(scale));
        if (bias) y = y + load_up_to(bias + i, n);
        store_up_to(out + i, y, n);
    }
}

int64_t grain_of(int64_t size) { return 1 + 8192 / size; }

}  // namespace

// How many clipped values a row of this size can have.
EXPORTED int64_t batchinfer_most_rests(int64_t size) { return most_rests(size); }

// x [rows, size] -> out, bytes around limit + 1; scales fp32 [rows]; rests [rows, most_rests(size)], counts of them
// [rows]: x is about (out - limit - 1) * scale + its rest.
EXPORTED void batchinfer_quantize_rows(int type, const void* x, uint8_t* out, float* scales, Rest* rests, int32_t* counts,
                                       int64_t rows, int64_t size, int limit, int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        parallel_for(threads, rows, grain_of(size), [=](int64_t row) {
            counts[row] = quantize_row((const T*)x + row * size, out + row * size, scales + row,
                                       rests + row * most_rests(size), size, limit);
        });
    });
}

// product fp32 [rows, size], of the bytes and the weight -> out [rows, size]: times the scale of the row, plus rests
// times weight (int8 [in, size], a scale a column), plus bias fp32 [size] where there is one.
EXPORTED void batchinfer_finish_rows(int type, const float* product, void* out, const float* scales, const Rest* rests,
                                     const int32_t* counts, const int8_t* weight, const float* weight_scales,
                                     const float* bias, int64_t rows, int64_t size, int64_t in, int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        parallel_for(threads, rows, grain_of(size), [=](int64_t row) {
            finish_row(product + row * size, (T*)out + row * size, scales[row], rests + row * most_rests(in), counts[row],
                       weight, weight_scales, bias, size);
        });
    });
}
