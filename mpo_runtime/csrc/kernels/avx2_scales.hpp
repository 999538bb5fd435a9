// The scales of the int8 products as vectors of eight floats, for AVX2 and AVX-512. Included after the target is set (see
// target.hpp).
#pragma once

#include "kernels/kernels.hpp"
#include "vectors/avx2.hpp"

namespace mpo {
namespace {

struct Avx2Scales : Avx2Floats {
  using Integers = __m256i;
  template <int G>
  struct Scales {
    __m256 s[G == 16 ? 2 : 1];
  };

  static MPO_INLINE Floats to_float(__m256i in) { return _mm256_cvtepi32_ps(in); }

  // The scales of a chunk, repeated for every block of their group; reads no more than they take.
  template <int G>
  static MPO_INLINE Scales<G> load_scales(const std::uint16_t* from) {
    Scales<G> out;
    if constexpr (G <= 32) {
      for (std::size_t i = 0; i < sizeof out.s / sizeof out.s[0]; ++i)
        out.s[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
    } else if constexpr (G == 64) {
      const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      out.s[0] = _mm256_cvtph_ps(_mm_unpacklo_epi16(four, four));
    } else {
      std::uint32_t two = 0;
      std::memcpy(&two, from, 2 * kChunk / G);
      const __m128i order = G == 128 ? _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3)
                                     : _mm_set1_epi16(0x0100);
      out.s[0] = _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_cvtsi32_si128(static_cast<int>(two)), order));
    }
    return out;
  }

  template <int G>
  static MPO_INLINE Scales<G> times_zero(Scales<G> scales, const std::uint16_t* zero, float bias) {
    const Scales<G> zeros = load_scales<G>(zero);
    for (std::size_t i = 0; i < sizeof scales.s / sizeof scales.s[0]; ++i)
      scales.s[i] = _mm256_mul_ps(scales.s[i], _mm256_sub_ps(zeros.s[i], _mm256_set1_ps(bias)));
    return scales;
  }

  template <int G>
  static MPO_INLINE Floats add_offsets(const Scales<G>& scales, const float* sums, Floats total) {
    for (std::size_t i = 0; i < sizeof scales.s / sizeof scales.s[0]; ++i)
      total = _mm256_fmadd_ps(scales.s[i], _mm256_loadu_ps(sums + 8 * i), total);
    return total;
  }

  // The scale of each of the 8 blocks of 32 columns; for groups of 16 that of its first or second half.
  template <int G>
  static MPO_INLINE Floats block_scales(const Scales<G>& scales, int half) {
    if constexpr (G == 16) {
      const __m256 picked = half ? _mm256_shuffle_ps(scales.s[0], scales.s[1], 0xdd)
                                 : _mm256_shuffle_ps(scales.s[0], scales.s[1], 0x88);
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(picked), 0xd8));
    }
    return scales.s[0];
  }
};

}  // namespace
}  // namespace mpo
