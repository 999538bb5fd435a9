// Vectors of eight floats with AVX2, FMA and F16C. Included after the target is set (see target.hpp); what each operation
// means is said in generic.hpp.
#pragma once

#include "vectors/spread.hpp"

namespace mpo {
namespace {

struct Avx2Floats {
  using Floats = __m256;
  static constexpr std::size_t kLanes = 8;

  // Far enough ahead to hide the latency of memory; beyond the end of a tensor it does nothing.
  static MPO_INLINE void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at) + 2048, _MM_HINT_T0); }
  // Asks for bytes that are needed soon, not at once.
  static MPO_INLINE void prefetch_lines(const void* from, std::size_t bytes) {
    for (std::size_t line = 0; line < bytes; line += 64) _mm_prefetch(static_cast<const char*>(from) + line, _MM_HINT_T1);
  }

  static MPO_INLINE Floats zero() { return _mm256_setzero_ps(); }
  static MPO_INLINE Floats broadcast(float value) { return _mm256_set1_ps(value); }

  static MPO_INLINE __m128i sixteen_bytes(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static MPO_INLINE __m128i eight_bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

  static MPO_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static MPO_INLINE Floats load_unaligned(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) { return _mm256_cvtph_ps(sixteen_bytes(from)); }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sixteen_bytes(from)), 16));
  }
  static MPO_INLINE Floats load_uint8(const std::uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(from)));
  }
  static MPO_INLINE Floats load_int8(const std::uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(from)));
  }
  static MPO_INLINE void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static MPO_INLINE void store_halves(std::uint8_t* to, Floats value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static MPO_INLINE float half(const void* from) {
    std::uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
  }

  // The codes of 32 columns of one plane, a byte each.
  template <int Bits>
  static MPO_INLINE __m256i spread_plane(const std::uint8_t* from) {
    if constexpr (Bits == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (Bits == 4) {
      const __m256i wide = _mm256_cvtepu8_epi16(sixteen_bytes(from));
      return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
    }
    if constexpr (Bits == 2) {
      __m256i wide = _mm256_cvtepu8_epi32(eight_bytes(from));
      wide = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 12));
      return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi32(wide, 6)), _mm256_set1_epi8(3));
    }
    std::uint32_t packed;
    std::memcpy(&packed, from, sizeof packed);
    const __m256i order = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bits = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201));
    const __m256i repeated = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(packed)), order);
    return _mm256_min_epu8(_mm256_and_si256(repeated, bits), _mm256_set1_epi8(1));
  }
  template <int Low, int High>
  static MPO_INLINE void spread(const std::uint8_t* low, const std::uint8_t* high, std::size_t count,
                                std::uint8_t* codes) {
    std::size_t c = 0;
    for (; c + 32 <= count; c += 32) {
      __m256i code = spread_plane<Low>(low + c / 8 * Low);
      if constexpr (High > 0)
        code = _mm256_or_si256(code, _mm256_slli_epi16(spread_plane<High>(high + c / 8 * High), Low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + c), code);
    }
    if (c < count) mpo::spread<Low, High>(low + c / 8 * Low, High ? high + c / 8 * High : nullptr, count - c, codes + c);
  }

  static MPO_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static MPO_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static MPO_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static MPO_INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static MPO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  // The instruction gives its second operand where one is not a number.
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
  static MPO_INLINE Floats select_below(Floats x, Floats bound, Floats a, Floats b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
  }
  static MPO_INLINE float total(Floats a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static MPO_INLINE float largest(Floats a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
};

}  // namespace
}  // namespace mpo
