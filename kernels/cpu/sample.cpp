// Sampling: argmax of logits / temperature + Gumbel noise, with the noise that the contract fixes to the bit.
//
// The contract is in fp64, where a logarithm costs forty times the vector one. So a row is scored in fp32 first; only
// the tokens whose fp32 score is within its error of the best are scored in fp64, usually one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace {

struct Words {
    Ints w[4];
};

// The 32-bit halves of the lanes' products with m.
inline void wide_product(Ints a, uint32_t m, Ints* high, Ints* low) {
#if defined(__AVX512F__)
    Ints by = _mm512_set1_epi32(int32_t(m));
    Ints even = _mm512_mul_epu32(a, by);
    Ints odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), by);
    *low = _mm512_mullo_epi32(a, by);
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#else
    Ints by = _mm256_set1_epi32(int32_t(m));
    Ints even = _mm256_mul_epu32(a, by);
    Ints odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), by);
    *low = _mm256_mullo_epi32(a, by);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#endif
}

// Philox4x32-10 (Salmon et al., SC 2011) at counters (position, first + lane, 0, 0).
inline Words philox(uint32_t position, uint32_t first, uint32_t key0, uint32_t key1) {
    Words c{{splat_int(int32_t(position)), add_int(splat_int(int32_t(first)), iota()), splat_int(0), splat_int(0)}};
    for (int round = 0; round < 10; round++) {
        Ints high0, low0, high2, low2;
        wide_product(c.w[0], 0xD2511F53u, &high0, &low0);
        wide_product(c.w[2], 0xCD9E8D57u, &high2, &low2);
        c = {{xor_int(xor_int(high2, c.w[1]), splat_int(int32_t(key0))), low2,
              xor_int(xor_int(high0, c.w[3]), splat_int(int32_t(key1))), low0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

inline void philox_one(uint32_t position, uint32_t quad, uint32_t key0, uint32_t key1, uint32_t out[4]) {
    uint32_t c[4] = {position, quad, 0, 0};
    for (int round = 0; round < 10; round++) {
        uint64_t first = uint64_t(c[0]) * 0xD2511F53u, second = uint64_t(c[2]) * 0xCD9E8D57u;
        uint32_t next[4] = {uint32_t(second >> 32) ^ c[1] ^ key0, uint32_t(second), uint32_t(first >> 32) ^ c[3] ^ key1,
                            uint32_t(first)};
        std::copy(next, next + 4, c);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    std::copy(c, c + 4, out);
}

// -log(-log(u)) for u = (word >> 8 + 1/2) / 2^24, within 1e-5. Near 1 it is 1 - u that fp32 holds exactly, and only
// there the outer logarithm is steep.
inline Floats gumbel(Ints word) {
    Ints n = shift_right<8>(word);
    Floats u = (to_floats(n) + splat(0.5f)) * splat(0x1p-24f);
    Floats rest = (to_floats(sub_int(splat_int(1 << 24), n)) - splat(0.5f)) * splat(0x1p-24f);
    Floats near = logarithm_near_one(splat(0) - rest);
    Floats inner = if_less(rest, splat(0.25f), near, logarithm(u));
    return splat(0) - logarithm(splat(0) - inner);
}

// The first token whose logit is not a number, or -1.
int64_t first_nan(const float* logits, int64_t size) {
    for (int64_t i = 0; i < size; i++)
        if (std::isnan(logits[i])) return i;
    return -1;
}

// The lowest token of the largest logit, or the first that is not a number.
int64_t argmax(const float* logits, int64_t size) {
    int64_t i = 0;
    float best = -INFINITY;
    Floats top[4] = {splat(best), splat(best), splat(best), splat(best)}, poison = splat(0);
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            Floats x = load(logits + i + j * LANES);
            top[j] = maximum(x, top[j]);
            poison = maximum(poison, is_nan(x));
        }
    best = largest(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
    for (; i < size; i++) {
        if (std::isnan(logits[i])) return first_nan(logits, size);
        best = std::max(best, logits[i]);
    }
    if (largest(poison) > 0) return first_nan(logits, size);
    for (i = 0; i + LANES <= size; i += LANES)
        if (any_at_least(load(logits + i), splat(best))) break;
    for (; i < size; i++)
        if (logits[i] >= best) return i;
    return 0;
}

int64_t noisy_argmax(const float* logits, int64_t size, float temperature, const int64_t* key, int64_t position) {
    thread_local std::vector<float> memory;
    int64_t quads = (size + 3) / 4, rounds = (quads + LANES - 1) / LANES;
    if (int64_t(memory.size()) < rounds * 4 * LANES) memory.resize(rounds * 4 * LANES);
    float* scores = memory.data();
    uint32_t key0 = uint32_t(key[0]), key1 = uint32_t(key[1]), place = uint32_t(position);
    Floats inverse = splat(1.0f / temperature), top = splat(-INFINITY), size_of = splat(0), poison = splat(0);
    for (int64_t r = 0; r < rounds; r++) {
        Words words = philox(place, uint32_t(r * LANES), key0, key1);
        // Word j of quad q is token 4 q + j: transpose through memory.
        alignas(64) float noise[4][LANES], lanes[4 * LANES];
        for (int j = 0; j < 4; j++) store(noise[j], gumbel(words.w[j]));
        for (int q = 0; q < LANES; q++)
            for (int j = 0; j < 4; j++) lanes[4 * q + j] = noise[j][q];
        for (int j = 0; j < 4; j++) {
            int64_t at = r * 4 * LANES + j * LANES;
            int left = int(std::clamp<int64_t>(size - at, 0, LANES));
            Floats x = left == LANES ? load(logits + at) : load_some(logits + at, left);
            poison = maximum(poison, is_nan(x));
            Floats s = fma(x, inverse, load(lanes + j * LANES));
            s = within(s, splat(-INFINITY), iota(), 0, left);
            store(scores + at, s);
            top = maximum(s, top);
            // An infinite score is no measure of the rounding errors.
            Floats a = absolute(x * inverse);
            size_of = maximum(size_of, if_less(a, splat(INFINITY), a, splat(0)));
        }
    }
    if (largest(poison) > 0) return first_nan(logits, size);
    float best = largest(top);
    if (best == -INFINITY) return 0;
    // fp32 rounds logits / temperature to a few parts in 2^24 of its size; the noise is within 1e-5, and below 20.
    float threshold = best - (5e-5f + 1e-6f * largest(size_of));
    int64_t chosen = -1;
    double highest = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < size; i += LANES) {
        if (!any_at_least(load(scores + i), splat(threshold))) continue;
        for (int64_t v = i; v < std::min<int64_t>(i + LANES, size); v++) {
            if (!(scores[v] >= threshold)) continue;
            uint32_t words[4];
            philox_one(place, uint32_t(v / 4), key0, key1, words);
            double u = (double(words[v % 4] >> 8) + 0.5) / 16777216.0;
            double score = double(logits[v]) / double(temperature) - std::log(-std::log(u));
            if (score > highest) highest = score, chosen = v;
        }
    }
    return chosen < 0 ? argmax(logits, size) : chosen;
}

}  // namespace

// logits fp32 [rows, size], temperature fp32 [rows], keys int64 [rows, 2], positions int64 [rows] -> tokens int64 [rows].
EXPORTED void batchinfer_sample(const float* logits, const float* temperature, const int64_t* keys, const int64_t* positions,
                       int64_t* tokens, int64_t rows, int64_t size, int threads) {
    parallel_for(threads, rows, 1, [=](int64_t row) {
        const float* of = logits + row * size;
        tokens[row] = temperature[row] == 0.0f
                          ? argmax(of, size)
                          : noisy_argmax(of, size, temperature[row], keys + 2 * row, positions[row]);
    });
}
