// The product at the heart of attention: a few rows of fp32 (or bf16 pairs) times tiles of the cache.
#pragma once
#include "cache.h"
#include "vector.h"

#define UNROLL _Pragma("GCC unroll 8")

constexpr int ROWS = 6;                             // rows that share one load of a tile's vector
constexpr int COLUMNS = LANES == 16 ? 4 : 2;        // vectors of a tile's row; ROWS * COLUMNS accumulators fit the registers

// How one step along the summed axis multiplies: `Row` is what lies in the left operand, PER_STEP of them a step;
// a vector of the tile's row is VECTOR bytes.
#if defined(__AVX512BF16__)
struct PairsTimesPairs {  // bf16 against bf16, fp32 sums
    static constexpr int PER_STEP = 1, VECTOR = 64, ELEMENTS = 2;
    using Element = BF16;
    using Tile = __m512bh;
    static Tile tile(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Floats step(const float* row, Tile t, Floats sum) {
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
    static Tile tile(const char* p) { return load_ints(p); }
    static Floats step(const float* row, Tile t, Floats sum) {
        sum = fma(splat(row[0]), as_floats(shift_left<16>(t)), sum);
        return fma(splat(row[1]), as_floats(and_int(t, splat_int(int32_t(0xffff0000)))), sum);
    }
};
template <class T>
struct FloatsTimes {  // fp32 against fp32 or fp16
    static constexpr int PER_STEP = 1, VECTOR = LANES * int(sizeof(T)), ELEMENTS = 1;
    using Element = T;
    using Tile = Floats;
    static Tile tile(const char* p) { return load(reinterpret_cast<const T*>(p)); }
    static Floats step(const float* row, Tile t, Floats sum) { return fma(splat(row[0]), t, sum); }
};

// out[r][c] = sum over tiles and steps of rows[r][step] * tile[step][c]: R rows, C vectors. Row r starts at
// rows + r * row_stride, the next tile's steps follow in it. `steps` a tile, its rows `tile_stride` bytes apart. While
// tiles[i] is read, ahead[i] is fetched.
template <class P, int R, int C>
void multiply(const float* rows, int row_stride, const char* const* tiles, int count, const char* const* ahead, int steps,
              int tile_stride, float* out, int out_stride) {
    Floats sums[R][C];  // in registers: every loop over r and c is unrolled
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int c = 0; c < C; c++) sums[r][c] = splat(0);
    }
    for (int i = 0; i < count; i++) {
        const char* tile = tiles[i];
        const char* later = ahead[i];
        for (int s = 0; s < steps; s++) {
            typename P::Tile t[C];
            UNROLL
            for (int c = 0; c < C; c++) {
                t[c] = P::tile(tile + c * P::VECTOR);
                if (c * P::VECTOR % 64 == 0) _mm_prefetch(later + c * P::VECTOR, _MM_HINT_T0);
            }
            UNROLL
            for (int r = 0; r < R; r++) {
                UNROLL
                for (int c = 0; c < C; c++) sums[r][c] = P::step(rows + r * row_stride, t[c], sums[r][c]);
            }
            rows += P::PER_STEP;
            tile += tile_stride;
            later += tile_stride;
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int c = 0; c < C; c++) store(out + r * out_stride + c * LANES, sums[r][c]);
    }
}

template <class P, int C>
void multiply_rows(int count_rows, const float* rows, int row_stride, const char* const* tiles, int count,
                   const char* const* ahead, int steps, int tile_stride, float* out, int out_stride) {
    using Multiply = void (*)(const float*, int, const char* const*, int, const char* const*, int, int, float*, int);
    static constexpr Multiply variants[ROWS] = {multiply<P, 1, C>, multiply<P, 2, C>, multiply<P, 3, C>,
                                                multiply<P, 4, C>, multiply<P, 5, C>, multiply<P, 6, C>};
    variants[count_rows - 1](rows, row_stride, tiles, count, ahead, steps, tile_stride, out, out_stride);
}

// The same for any number of vectors, COLUMNS at a time; 1 <= count_rows <= ROWS.
template <class P>
void multiply_all(int count_rows, int vectors, const float* rows, int row_stride, const char* const* tiles, int count,
                  const char* const* ahead, int steps, int tile_stride, float* out, int out_stride) {
    for (int c = 0; c < vectors; c += COLUMNS) {
        const char *here[8], *later[8];
        for (int i = 0; i < count; i++) {
            here[i] = tiles[i] + c * P::VECTOR;
            later[i] = ahead[i] + c * P::VECTOR;
        }
        float* to = out + c * LANES;
        int left = vectors - c;
        if (left == 1)
            multiply_rows<P, 1>(count_rows, rows, row_stride, here, count, later, steps, tile_stride, to, out_stride);
        else if (left == 2 || COLUMNS == 2)
            multiply_rows<P, 2>(count_rows, rows, row_stride, here, count, later, steps, tile_stride, to, out_stride);
        else if (left == 3)
            multiply_rows<P, COLUMNS - 1>(count_rows, rows, row_stride, here, count, later, steps, tile_stride, to,
                                          out_stride);
        else
            multiply_rows<P, COLUMNS>(count_rows, rows, row_stride, here, count, later, steps, tile_stride, to,
                                      out_stride);
    }
}
