// AVX2 + FMA + F16C: vectors of eight floats.
#include "ops.hpp"

#if MPO_X86_OPS

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

// Only what follows may use the level: inline functions of the headers above are shared with baseline code.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "attention_body.hpp"

namespace mpo {
namespace {

struct Avx2 {
  using Floats = __m256;
  static constexpr std::size_t kLanes = 8;

  static MPO_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static MPO_INLINE Floats load_unaligned(const std::uint8_t* from) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  }
  static MPO_INLINE __m128i sixteen(const std::uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) { return _mm256_cvtph_ps(sixteen(from)); }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen(from)), 16));
  }
  static MPO_INLINE Floats load_codes(const std::uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static MPO_INLINE void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static MPO_INLINE void store_halves(std::uint8_t* to, Floats value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static MPO_INLINE Floats broadcast(float value) { return _mm256_set1_ps(value); }
  static MPO_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static MPO_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static MPO_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static MPO_INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static MPO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  // The instruction gives its second operand where one is NaN, so NaN in x stays.
  static MPO_INLINE Floats smaller(Floats x, Floats bound) { return _mm256_min_ps(bound, x); }
  static MPO_INLINE Floats larger(Floats x, Floats bound) { return _mm256_max_ps(bound, x); }
  static MPO_INLINE Floats round(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static MPO_INLINE Floats scale_by_power(Floats value, Floats n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }
  static MPO_INLINE Floats zero_below(Floats x, Floats bound, Floats value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), value);
  }
  static MPO_INLINE float total(Floats a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static MPO_INLINE float largest(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
};

}  // namespace

extern const Ops kAvx2Ops = make_ops<Avx2>();

}  // namespace mpo

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MPO_X86_OPS
