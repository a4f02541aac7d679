// Activations as bytes: groups of 64 inputs, turned by a Hadamard matrix, with one scale a group.
//
// Language models' activations have a few values far out, at which one scale a row would leave the others few of the 127
// steps. Turned, a value is spread over its whole group, and a group's scale touches that group alone; the weight is
// turned the other way at load, so the product stays the same (Ashkboos et al., "QuaRot", arXiv 2404.00456).
#pragma once
#include "vector.h"

constexpr int GROUP = 64;

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

// What a group's bytes stand for: x is about byte * scale; `zero` is what the weights' offset of 128 adds, negated.
struct Group {
    float scale;
    int32_t zero;
};

// x times the 64 by 64 matrix of (-1)^popcount(i & j), not scaled: v[j / 16][j % 16].
inline void turn(Floats v[4]) {
    Floats a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
    const Floats one = splat(1.0f), minus = splat(-1.0f);
    const Floats odd = _mm512_mask_blend_ps(0xaaaa, one, minus), second = _mm512_mask_blend_ps(0xcccc, one, minus);
    const Floats fourth = _mm512_mask_blend_ps(0xf0f0, one, minus), eighth = _mm512_mask_blend_ps(0xff00, one, minus);
    for (int i = 0; i < 4; i++) {
        v[i] = fma(v[i], odd, _mm512_permute_ps(v[i], 0xb1));
        v[i] = fma(v[i], second, _mm512_permute_ps(v[i], 0x4e));
        v[i] = fma(v[i], fourth, _mm512_shuffle_f32x4(v[i], v[i], 0xb1));
        v[i] = fma(v[i], eighth, _mm512_shuffle_f32x4(v[i], v[i], 0x4e));
    }
}

// The first n <= 64 inputs at x, the others 0 -> 64 signed bytes. What is not finite makes the scale not finite.
template <class T>
inline Group quantize_group(const T* x, int n, int8_t* out) {
    Floats v[4];
    for (int i = 0; i < 4; i++) {
        int left = n - i * LANES;
        v[i] = n >= GROUP ? load(x + i * LANES) : left > 0 ? load_up_to(x + i * LANES, left) : splat(0);
    }
    turn(v);
    Floats most = maximum(maximum(absolute(v[0]), absolute(v[1])), maximum(absolute(v[2]), absolute(v[3])));
    float top = largest(most);
    Floats factor = splat(top > 1e-30f ? 127.0f / top : 0);
    Ints total = splat_int(0);
    for (int i = 0; i < 4; i++) {
        Ints whole = to_ints(v[i] * factor);
        total = add_int(total, whole);
        _mm_storeu_si128((__m128i*)(out + i * LANES), _mm512_cvtsepi32_epi8(whole));
    }
    return {top / 127.0f, int32_t(-128u * uint32_t(_mm512_reduce_add_epi32(total)))};
}

#endif
