// The float side of the AVX2 kernels, which the AVX-512 ones share: 8 lanes. Included after the target is set.
#pragma once

#include "kernels.hpp"
#include "spread.hpp"

namespace mpo {
namespace {

struct Avx2Floats {
  using Floats = __m256;
  using Integers = __m256i;
  template <int G>
  struct Scales {
    __m256 s[G == 16 ? 2 : 1];
  };
  static constexpr std::size_t kLanes = 8;

  // Far enough ahead to hide a trip to memory; beyond the end of a tensor it does nothing.
  static MPO_INLINE void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at) + 2048, _MM_HINT_T0);
  }

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

  static MPO_INLINE Floats to_float(__m256i in) { return _mm256_cvtepi32_ps(in); }
  static MPO_INLINE Floats nothing() { return _mm256_setzero_ps(); }
  static MPO_INLINE Floats broadcast(float value) { return _mm256_set1_ps(value); }
  static MPO_INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static MPO_INLINE Floats load_unaligned(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static MPO_INLINE Floats widen(const std::uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static MPO_INLINE void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static MPO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static MPO_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static MPO_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static MPO_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static MPO_INLINE float total(Floats a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
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
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
    }
    if constexpr (Bits == 2) {
      __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
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
  // `columns` codes, a multiple of 8, of a Low-bit plane with those of a High-bit plane (0: none) above them.
  template <int Low, int High>
  static MPO_INLINE void spread(const std::uint8_t* low, const std::uint8_t* high, std::size_t columns,
                                std::uint8_t* codes) {
    std::size_t c = 0;
    for (; c + 32 <= columns; c += 32) {
      __m256i code = spread_plane<Low>(low + c / 8 * Low);
      if constexpr (High > 0)
        code = _mm256_or_si256(code, _mm256_slli_epi16(spread_plane<High>(high + c / 8 * High), Low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + c), code);
    }
    if (c < columns) mpo::spread<Low, High>(low + c / 8 * Low, High ? high + c / 8 * High : nullptr, columns - c, codes + c);
  }
};

}  // namespace
}  // namespace mpo
