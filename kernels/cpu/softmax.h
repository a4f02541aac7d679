// The softmax of attention, split by split: a split's weights from its scores, and its results folded into a row's.
#pragma once
#include <algorithm>
#include <cmath>

#include "cache.h"
#include "schedule.h"
#include "vector.h"

constexpr float LOG2_E = 1.44269504088896341f;

// What the largest weight of a row is rounded to beside int8 values: sums over a split stay within 32 bits.
constexpr float WEIGHT_MOST = 32767;
static_assert(int64_t(WEIGHT_MOST) * 127 * SPLIT < INT32_MAX);

// Running softmax of each row: the largest score (times log2 e), the sum of exponentials, the weighted sum of values.
struct State {
    float *largest, *sum, *values;

    void clear(int rows, int size) const {
        std::fill(largest, largest + rows, -INFINITY);
        std::fill(sum, sum + rows, 0.0f);
        std::fill(values, values + rows * size, 0.0f);
    }
    State from(int row, int size) const { return {largest + row, sum + row, values + row * size}; }
};

// Fold the results of one split into the states of up to LANES rows. A split in which a row sees nothing changes
// nothing; one that comes first is taken over as it is.
inline void fold(int count, const State& state, const float* largest, const float* sums, const float* values, int size) {
    Floats before = load_up_to(state.largest, count), here = load_up_to(largest, count);
    Floats both = maximum(before, here);
    alignas(64) float keep[LANES], add[LANES], most[LANES];
    store(keep, power_of_two(before - both));
    store(add, power_of_two(here - both));
    store(most, both);
    for (int r = 0; r < count; r++) {
        if (largest[r] == -INFINITY) continue;
        state.largest[r] = most[r];
        state.sum[r] = state.sum[r] * keep[r] + sums[r] * add[r];
        Floats a = splat(keep[r]), b = splat(add[r]);
        float* to = state.values + r * size;
        const float* from = values + r * size;
        for (int i = 0; i < size; i += LANES) store(to + i, fma(load(to + i), a, load(from + i) * b));
    }
}

// Exponentials of a row's scores (times scale, within +-soft_cap where that is above 0) in blocks [first, last) of a
// split, where it sees tokens [low, high): bf16 where PAIRS, else fp32. Returns the largest score times log2 e; not a
// number where a score is not.
template <bool PAIRS>
inline float softmax(float* scores, float* weights, int first, int last, int low, int high, float scale, float soft_cap,
                     float* sum_of) {
    float factor = scale * LOG2_E;
    Floats most = splat(-INFINITY);
    if (soft_cap > 0) {
        factor = LOG2_E;
        Floats inner = splat(scale / soft_cap), cap = splat(soft_cap);
        for (int i = first * BLOCK; i < last * BLOCK; i += LANES)
            store(scores + i, cap * hyperbolic_tangent(load(scores + i) * inner));
    }
    for (int b = first; b < last; b++) {
        bool whole = low <= b * BLOCK && high >= (b + 1) * BLOCK;
        for (int i = b * BLOCK; i < (b + 1) * BLOCK; i += LANES) {
            Floats s = load(scores + i);
            if (!whole) {
                s = within(s, splat(-INFINITY), add_int(iota(), splat_int(i)), low, high);
                store(scores + i, s);
            }
            most = maximum(most, s);
        }
    }
    float largest_score = largest(most) * factor;
    Floats base = splat(largest_score == -INFINITY ? 0 : -largest_score), total = splat(0);
    for (int i = first * BLOCK; i < last * BLOCK; i += LANES) {
        Floats p = power_of_two(fma(load(scores + i), splat(factor), base));
        total = total + p;
        if constexpr (PAIRS)
            store(reinterpret_cast<BF16*>(weights) + i, p);
        else
            store(weights + i, p);
    }
    *sum_of = sum(total);
    // The largest of numbers and of what is none may be a number; folded as that, the split could count for nothing.
    return std::isnan(*sum_of) ? NAN : largest_score;
}

inline const float* scales_of(const char* tile, int head_size) {
    return reinterpret_cast<const float*>(tile + scales_at(head_size));
}

// Scores of int8 keys from their sums, in place; tiles are the keys of blocks [first, last).
inline void scale_scores(float* scores, const char* const* tiles, int head_size, int first, int last, float row_scale) {
    for (int b = first; b < last; b++)
        for (int i = 0; i < BLOCK; i += LANES) {
            float* at = scores + b * BLOCK + i;
            Floats scales = load(scales_of(tiles[b - first], head_size) + i);
            store(at, to_floats(load_ints(at)) * (scales * splat(row_scale)));
        }
}

// A row's weights of int8 values as int16: each times its value's scale, the largest as WEIGHT_MOST. Returns what one of
// it stands for: not a number where a value's scale or a weight is not. tiles are the values of blocks [first, last);
// weights come in fp32 and go to `out`.
inline float whole_weights(float* weights, float* out, const char* const* tiles, int head_size, int first, int last) {
    Floats most = splat(0), poison = splat(0);
    for (int b = first; b < last; b++)
        for (int i = 0; i < BLOCK; i += LANES) {
            float* at = weights + b * BLOCK + i;
            Floats w = load(at) * load(scales_of(tiles[b - first], head_size) + i);
            store(at, w);
            most = maximum(most, w);
            poison = fma(w, splat(0), poison);
        }
    float top = largest(most);
    Floats inverse = splat(top > 0 ? WEIGHT_MOST / top : 0);
    for (int i = first * BLOCK; i < last * BLOCK; i += LANES)
        store_words(reinterpret_cast<int16_t*>(out) + i, to_ints(load(weights + i) * inverse));
    return top / WEIGHT_MOST + sum(poison);
}
