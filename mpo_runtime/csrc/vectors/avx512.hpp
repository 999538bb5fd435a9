// Vectors of sixteen floats with AVX-512. Included after the target is set (see target.hpp); what each operation means is
// said in generic.hpp. The kernels' float side uses AVX2's vectors of eight: their chunk has eight scales.
#pragma once

#include "vectors/avx2.hpp"

namespace mpo {
namespace {

struct Avx512Floats {
  using Floats = __m512;
  static constexpr std::size_t kLanes = 16;

  static MPO_INLINE Floats zero() { return _mm512_setzero_ps(); }
  static MPO_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }

  static MPO_INLINE __m256i half_vector(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }

  static MPO_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static MPO_INLINE Floats load_unaligned(const void* from) { return _mm512_loadu_ps(from); }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) { return _mm512_cvtph_ps(half_vector(from)); }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_vector(from)), 16));
  }
  static MPO_INLINE Floats load_int8(const std::uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Avx2Floats::sixteen_bytes(from)));
  }
  static MPO_INLINE void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static MPO_INLINE void store_halves(std::uint8_t* to, Floats value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static MPO_INLINE float half(const void* from) { return Avx2Floats::half(from); }

  static MPO_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static MPO_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static MPO_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static MPO_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static MPO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  // The instruction gives its second operand where one is not a number.
  static MPO_INLINE Floats smaller(Floats x, Floats bound) { return _mm512_min_ps(bound, x); }
  static MPO_INLINE Floats larger(Floats x, Floats bound) { return _mm512_max_ps(bound, x); }
  static MPO_INLINE Floats round(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static MPO_INLINE Floats scale_by_power(Floats value, Floats n) { return _mm512_scalef_ps(value, n); }
  static MPO_INLINE Floats zero_below(Floats x, Floats bound, Floats value) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), _mm512_setzero_ps());
  }
  static MPO_INLINE Floats select_below(Floats x, Floats bound, Floats a, Floats b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), b, a);
  }
  static MPO_INLINE float total(Floats a) { return Avx2Floats::total(Avx2Floats::add(upper(a), lower(a))); }
  static MPO_INLINE float largest(Floats a) { return Avx2Floats::largest(_mm256_max_ps(upper(a), lower(a))); }

  static MPO_INLINE __m256 lower(Floats a) { return _mm512_castps512_ps256(a); }
  static MPO_INLINE __m256 upper(Floats a) { return _mm512_extractf32x8_ps(a, 1); }
};

// The rows of a 16 by 16 matrix of 32-bit values become its columns.
MPO_INLINE void transpose(__m512i* rows) {
  __m512i pairs[16], quads[16];
  for (std::size_t i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (std::size_t i = 0; i < 16; i += 4)
    for (std::size_t j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  // quads[4 * i + j]: in its 128-bit part p the values of rows 4i ... 4i + 3 in column 4p + j
  for (std::size_t j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88), b = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd), d = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    rows[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

}  // namespace
}  // namespace mpo
