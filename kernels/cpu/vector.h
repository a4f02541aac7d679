// One vector of fp32 lanes on AVX-512 (16 lanes) or AVX2 (8), its loads from every element type, and exp, tanh, log.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Everything else stays inside the library, where another level's build of the same names can't replace it.
#define EXPORTED extern "C" __attribute__((visibility("default")))

struct BF16 {
    uint16_t bits;
};
struct FP16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Of a and b where one is not a number: b.
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats round_to_integer(Floats x) { return _mm512_roundscale_ps(x, 8); }
inline Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints add_int(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub_int(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints and_int(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints or_int(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints xor_int(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
template <int N>
inline Ints shift_left(Ints x) {
    return _mm512_slli_epi32(x, N);
}
template <int N>
inline Ints shift_right(Ints x) {
    return _mm512_srli_epi32(x, N);
}
inline Ints iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline void store_ints(void* p, Ints x) { _mm512_storeu_si512(p, x); }
// Unsigned words and bytes, a lane each.
inline Ints load_words(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline Ints load_bytes(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// The lanes as int16 and int8; x within their range.
inline void store_words(int16_t* p, Ints x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x)); }
inline void store_bytes(int8_t* p, Ints x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
// The even and the odd bytes of the lanes, sign-extended to 16 bits.
inline Ints even_bytes(Ints x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
inline Ints odd_bytes(Ints x) { return _mm512_srai_epi16(x, 8); }
// sum + the products of the lanes' two pairs of int16.
inline Ints add_products(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
// Lane by lane: low <= index < high ? x : other.
inline Floats within(Floats x, Floats other, Ints index, int32_t low, int32_t high) {
    __mmask16 m = _mm512_cmpge_epi32_mask(index, splat_int(low)) & _mm512_cmplt_epi32_mask(index, splat_int(high));
    return _mm512_mask_blend_ps(m, other, x);
}
inline Floats if_less(Floats a, Floats b, Floats x, Floats other) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), other, x);
}
// 1 in the lanes that are not numbers, else 0.
inline Floats is_nan(Floats x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), splat(1.0f)); }
// Whether a lane is at least b.
inline bool any_at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ) != 0; }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

inline Floats load(const BF16* p) {
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Floats load(const FP16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// Round to nearest even; a NaN stays a NaN.
inline __m256i to_bf16(Floats x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    Ints bits = as_ints(x);
    Ints odd = and_int(shift_right<16>(bits), splat_int(1));
    Ints rounded = shift_right<16>(add_int(bits, add_int(odd, splat_int(0x7fff))));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, splat_int(0x7fc0)));
#endif
}
inline void store(BF16* p, Floats x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
inline void store(FP16* p, Floats x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }
#else
constexpr int LANES = 8;
using Floats = __m256;
using Ints = __m256i;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// Of a and b where one is not a number: b.
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats round_to_integer(Floats x) { return _mm256_round_ps(x, 8); }
inline Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
inline Floats absolute(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Ints to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
inline Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints add_int(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints sub_int(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints and_int(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints or_int(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints xor_int(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
template <int N>
inline Ints shift_left(Ints x) {
    return _mm256_slli_epi32(x, N);
}
template <int N>
inline Ints shift_right(Ints x) {
    return _mm256_srli_epi32(x, N);
}
inline Ints iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_ints(void* p, Ints x) { _mm256_storeu_si256((__m256i*)p, x); }
// Unsigned words and bytes, a lane each.
inline Ints load_words(const void* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Ints load_bytes(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
// The lanes as int16 and int8; x within their range.
inline void store_words(int16_t* p, Ints x) {
    Ints packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store_bytes(int8_t* p, Ints x) {
    Ints words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0xd8);
    _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(_mm256_packs_epi16(words, words)));
}
// The even and the odd bytes of the lanes, sign-extended to 16 bits.
inline Ints even_bytes(Ints x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
inline Ints odd_bytes(Ints x) { return _mm256_srai_epi16(x, 8); }
// sum + the products of the lanes' two pairs of int16.
inline Ints add_products(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
// Lane by lane: low <= index < high ? x : other.
inline Floats within(Floats x, Floats other, Ints index, int32_t low, int32_t high) {
    Ints m = _mm256_and_si256(_mm256_cmpgt_epi32(index, splat_int(low - 1)),
                              _mm256_cmpgt_epi32(splat_int(high), index));
    return _mm256_blendv_ps(other, x, as_floats(m));
}
inline Floats if_less(Floats a, Floats b, Floats x, Floats other) {
    return _mm256_blendv_ps(other, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
// 1 in the lanes that are not numbers, else 0.
inline Floats is_nan(Floats x) { return _mm256_and_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), splat(1.0f)); }
// Whether a lane is at least b.
inline bool any_at_least(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)) != 0; }
inline float sum(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(Floats x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline Floats load(const BF16* p) {
    return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Floats load(const FP16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// Round to nearest even; a NaN stays a NaN.
inline __m128i to_bf16(Floats x) {
    Ints bits = as_ints(x);
    Ints odd = and_int(shift_right<16>(bits), splat_int(1));
    Ints rounded = shift_right<16>(add_int(bits, add_int(odd, splat_int(0x7fff))));
    Floats nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    rounded = as_ints(_mm256_blendv_ps(as_floats(rounded), as_floats(splat_int(0x7fc0)), nan));
    Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    return _mm256_castsi256_si128(packed);
}
inline void store(BF16* p, Floats x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
inline void store(FP16* p, Floats x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0)); }
#endif

// The first n < LANES elements; the other lanes are 0.
template <class T>
inline Floats load_some(const T* p, int n) {
    T part[LANES] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T>
inline void store_some(T* p, Floats x, int n) {
    T part[LANES];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}
template <class T>
inline Floats load_up_to(const T* p, int n) {
    return n >= LANES ? load(p) : load_some(p, n);
}
template <class T>
inline void store_up_to(T* p, Floats x, int n) {
    if (n >= LANES)
        store(p, x);
    else
        store_some(p, x, n);
}

// x as it reads after a round trip through T.
template <class T>
inline Floats rounded(Floats x) {
    T part[LANES];
    store(part, x);
    return load(part);
}
template <>
inline Floats rounded<float>(Floats x) {
    return x;
}
template <>
inline Floats rounded<BF16>(Floats x) {
#if defined(__AVX512F__)
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(x)), 16));
#else
    return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(to_bf16(x)), 16));
#endif
}

// e^x within 2 units in the last place; 0 below -87.3, the largest finite result above 88. A NaN stays a NaN.
inline Floats exponential(Floats x) {
    Floats bounded = minimum(splat(88.0f), maximum(splat(-87.3f), x));
    Floats n = round_to_integer(bounded * splat(1.44269504088896341f));
    Floats r = fma(n, splat(-0.693359375f), bounded);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    Ints power = shift_left<23>(add_int(to_ints(n), splat_int(127)));
    return if_less(x, splat(-87.3f), splat(0.0f), p * as_floats(power));
}

// 2^x within 2 units in the last place; 0 far below the smallest normal number, and for minus infinity. x <= 127. A NaN
// stays a NaN.
inline Floats power_of_two(Floats x) {
    Floats bounded = maximum(splat(LANES == 16 ? -200.0f : -126.0f), x);
    Floats n = round_to_integer(bounded);
    Floats r = bounded - n;
    Floats p = splat(1.535336188319500e-4f);
    p = fma(p, r, splat(1.339887440266574e-3f));
    p = fma(p, r, splat(9.618437357674640e-3f));
    p = fma(p, r, splat(5.550332471162809e-2f));
    p = fma(p, r, splat(2.402264791363012e-1f));
    p = fma(p, r, splat(6.931472028550421e-1f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    Ints power = shift_left<23>(add_int(to_ints(n), splat_int(127)));
    return if_less(x, splat(-126.0f), splat(0.0f), p * as_floats(power));
#endif
}

// tanh(x): an odd polynomial near 0, where the exponential's form would cancel. A NaN stays a NaN.
inline Floats hyperbolic_tangent(Floats x) {
    Floats a = absolute(x), s = x * x;
    Floats p = splat(-5.70498872745e-3f);
    p = fma(p, s, splat(2.06390887954e-2f));
    p = fma(p, s, splat(-5.37397155531e-2f));
    p = fma(p, s, splat(1.33314422036e-1f));
    p = fma(p, s, splat(-3.33332819422e-1f));
    Floats near = fma(p * s, x, x);
    Floats far = splat(1.0f) - splat(2.0f) / (exponential(a + a) + splat(1.0f));
    far = if_less(x, splat(0.0f), splat(0.0f) - far, far);
    return if_less(a, splat(0.625f), near, far);
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], with a small relative error also near 0.
inline Floats logarithm_near_one(Floats f) {
    Floats s = f * f;
    Floats p = splat(7.0376836292e-2f);
    p = fma(p, f, splat(-1.1514610310e-1f));
    p = fma(p, f, splat(1.1676998740e-1f));
    p = fma(p, f, splat(-1.2420140846e-1f));
    p = fma(p, f, splat(1.4249322787e-1f));
    p = fma(p, f, splat(-1.6668057665e-1f));
    p = fma(p, f, splat(2.0000714765e-1f));
    p = fma(p, f, splat(-2.4999993993e-1f));
    p = fma(p, f, splat(3.3333331174e-1f));
    return fma(p * f, s, fma(splat(-0.5f), s, f));
}

// log(x) for normal x > 0.
inline Floats logarithm(Floats x) {
    Ints bits = as_ints(x);
    Floats exponent = to_floats(sub_int(shift_right<23>(bits), splat_int(126)));
    Floats m = as_floats(or_int(and_int(bits, splat_int(0x007fffff)), splat_int(0x3f000000)));  // [1/2, 1)
    Floats small = splat(0.707106781186547524f);
    Floats f = if_less(m, small, m + m, m) - splat(1.0f);
    exponent = if_less(m, small, exponent - splat(1.0f), exponent);
    return fma(exponent, splat(0.693147180559945f), logarithm_near_one(f));
}

enum Type : int32_t { TYPE_FP32 = 0, TYPE_BF16 = 1, TYPE_FP16 = 2, TYPE_INT8 = 3 };
inline int64_t size_of(int type) { return type == TYPE_FP32 ? 4 : type == TYPE_INT8 ? 1 : 2; }
// Behind `count` elements of a type.
inline void* behind(void* p, int type, int64_t count) { return static_cast<char*>(p) + count * size_of(type); }
inline const void* behind(const void* p, int type, int64_t count) { return static_cast<const char*>(p) + count * size_of(type); }

// Calls work with a value of the floating-point type that the code names.
template <class Work>
inline void with_type(int type, const Work& work) {
    if (type == TYPE_BF16)
        work(BF16());
    else if (type == TYPE_FP16)
        work(FP16());
    else
        work(float());
}
