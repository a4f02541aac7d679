// The product at the heart of attention: a few rows of fp32 (or bf16 pairs) times tiles of the cache.
#pragma once
#include <algorithm>

#include "cache.h"
#include "schedule.h"
#include "vector.h"

#define UNROLL _Pragma("GCC unroll 8")

constexpr int ROWS = 6;                             // rows that share one load of a tile's vector
constexpr int COLUMNS = LANES == 16 ? 4 : 2;        // vectors of a tile's row; ROWS * COLUMNS accumulators fit the registers

// How one step along the summed axis multiplies: PER_STEP floats of the left operand's row, ELEMENTS of the tile's, are a
// step; a vector of the tile's row is VECTOR bytes.
#if defined(__AVX512BF16__)
struct PairsTimesPairs {  // bf16 against bf16, fp32 sums
    static constexpr int PER_STEP = 1, VECTOR = 64, ELEMENTS = 2;
    using Element = BF16;
    using Tile = __m512bh;
    using Sum = Floats;
    static Tile tile(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Sum step(const float* row, Tile t, Sum sum) {
        int32_t pair;
        memcpy(&pair, row, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), t);
    }
};
#endif
struct FloatsTimesPairs {  // fp32 against bf16 pairs
    static constexpr int PER_STEP = 2, VECTOR = LANES * 4, ELEMENTS = 2;
    using Element = BF16;
    using Tile = Ints;
    using Sum = Floats;
    static Tile tile(const char* p) { return load_ints(p); }
    static Sum step(const float* row, Tile t, Sum sum) {
        sum = fma(splat(row[0]), as_floats(shift_left<16>(t)), sum);
        return fma(splat(row[1]), as_floats(and_int(t, splat_int(int32_t(0xffff0000)))), sum);
    }
};
template <class T>
struct FloatsTimes {  // fp32 against fp32 or fp16
    static constexpr int PER_STEP = 1, VECTOR = LANES * int(sizeof(T)), ELEMENTS = 1;
    using Element = T;
    using Tile = Floats;
    using Sum = Floats;
    static Tile tile(const char* p) { return load(reinterpret_cast<const T*>(p)); }
    static Sum step(const float* row, Tile t, Sum sum) { return fma(splat(row[0]), t, sum); }
};
struct WordsTimesFours {  // int16 against four int8, whole sums
    static constexpr int PER_STEP = 2, VECTOR = LANES * 4, ELEMENTS = 4;
    using Element = int8_t;
    struct Tile {
        Ints even, odd;
    };
    using Sum = Ints;
    static Tile tile(const char* p) {
        Ints x = load_ints(p);
        return {even_bytes(x), odd_bytes(x)};
    }
    static Sum step(const float* row, const Tile& t, Sum sum) {
        int32_t pairs[2];
        memcpy(pairs, row, 8);
        return add_products(add_products(sum, splat_int(pairs[0]), t.even), splat_int(pairs[1]), t.odd);
    }
};
inline void clear(Floats& sum) { sum = splat(0); }
inline void clear(Ints& sum) { sum = splat_int(0); }
inline void put(float* out, Floats sum) { store(out, sum); }
inline void put(float* out, Ints sum) { store_ints(out, sum); }

// Where to read: vectors 0 and 1 at `at`, 2 and 3 `gap` bytes further, in the same tile's row or in another tile.
struct Place {
    const char* at;
    int64_t gap;

    const char* vector(int c, int bytes) const { return c < 2 ? at + c * bytes : at + gap + (c - 2) * bytes; }
};

// out[r][c] = sum over places and steps of rows[r][step] * place[step][c]: R rows, C vectors. Row r starts at
// rows + r * row_stride, the next place's steps follow in it. `steps` a place, its rows `stride` bytes apart. While
// places[i] is read, ahead[i] is fetched. Sums of int8 go out as int32.
template <class P, int R, int C>
void multiply(const float* rows, int row_stride, const Place* places, int count, const Place* ahead, int steps, int stride,
              float* out, int out_stride) {
    typename P::Sum sums[R][C];  // in registers: every loop over r and c is unrolled
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int c = 0; c < C; c++) clear(sums[r][c]);
    }
    for (int i = 0; i < count; i++) {
        Place here = places[i], later = ahead[i];
        for (int s = 0; s < steps; s++) {
            UNROLL
            for (int c = 0; c < C; c++)
                if (c * P::VECTOR % 64 == 0) _mm_prefetch(later.vector(c, P::VECTOR), _MM_HINT_T0);
            typename P::Tile t[C];
            UNROLL
            for (int c = 0; c < C; c++) t[c] = P::tile(here.vector(c, P::VECTOR));
            UNROLL
            for (int r = 0; r < R; r++) {
                UNROLL
                for (int c = 0; c < C; c++) sums[r][c] = P::step(rows + r * row_stride, t[c], sums[r][c]);
            }
            rows += P::PER_STEP;
            here.at += stride;
            later.at += stride;
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int c = 0; c < C; c++) put(out + r * out_stride + c * LANES, sums[r][c]);
    }
}

// The same for a number of rows and vectors that is known only now: 1 <= count_rows <= ROWS, C <= COLUMNS.
template <class P, int C>
void multiply_rows(int count_rows, const float* rows, int row_stride, const Place* places, int count, const Place* ahead,
                   int steps, int stride, float* out, int out_stride) {
    using Multiply = void (*)(const float*, int, const Place*, int, const Place*, int, int, float*, int);
    static constexpr Multiply variants[ROWS] = {multiply<P, 1, C>, multiply<P, 2, C>, multiply<P, 3, C>,
                                                multiply<P, 4, C>, multiply<P, 5, C>, multiply<P, 6, C>};
    variants[count_rows - 1](rows, row_stride, places, count, ahead, steps, stride, out, out_stride);
}
template <class P>
void multiply_some(int count_rows, int vectors, const float* rows, int row_stride, const Place* places, int count,
                   const Place* ahead, int steps, int stride, float* out, int out_stride) {
    auto work = vectors == 1                   ? multiply_rows<P, 1>
                : vectors == 2 || COLUMNS == 2 ? multiply_rows<P, 2>
                : vectors == 3                 ? multiply_rows<P, COLUMNS - 1>
                                               : multiply_rows<P, COLUMNS>;
    work(count_rows, rows, row_stride, places, count, ahead, steps, stride, out, out_stride);
}

// Rows times `count` key tiles, neighbours in out: as many tiles at a time as there are vectors for.
template <class P>
void multiply_keys(int count_rows, const float* rows, int row_stride, const char* const* tiles, int count,
                   const char* const* ahead, int steps, float* out, int out_stride) {
    constexpr int VECTORS = BLOCK / LANES, STRIDE = VECTORS * P::VECTOR;
    for (int i = 0; i < count; i++) {
        bool two = VECTORS < COLUMNS && i + 1 < count;
        for (int c = 0; c < VECTORS; c += COLUMNS) {
            Place here{tiles[i] + c * P::VECTOR, two ? tiles[i + 1] - tiles[i] : 2 * P::VECTOR};
            Place later{ahead[i] + c * P::VECTOR, two ? ahead[i + 1] - ahead[i] : 2 * P::VECTOR};
            multiply_some<P>(count_rows, two ? COLUMNS : VECTORS, rows, row_stride, &here, 1, &later, steps, STRIDE,
                             out + i * BLOCK + c * LANES, out_stride);
        }
        i += two;
    }
}

// Rows times the rows of `count` value tiles, one after the other, `vectors` wide.
template <class P>
void multiply_values(int count_rows, int vectors, const float* rows, int row_stride, const char* const* tiles, int count,
                     const char* const* ahead, int steps, float* out, int out_stride) {
    for (int c = 0; c < vectors; c += COLUMNS) {
        Place here[SPLIT_BLOCKS], later[SPLIT_BLOCKS];
        for (int i = 0; i < count; i++) {
            here[i] = {tiles[i] + c * P::VECTOR, 2 * P::VECTOR};
            later[i] = {ahead[i] + c * P::VECTOR, 2 * P::VECTOR};
        }
        multiply_some<P>(count_rows, std::min(vectors - c, COLUMNS), rows, row_stride, here, count, later, steps,
                         vectors * P::VECTOR, out + c * LANES, out_stride);
    }
}
