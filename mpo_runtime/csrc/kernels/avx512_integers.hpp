// The integer side of AVX-512 VNNI: 64-byte vectors, int8 products by dpbusd. The float side is AVX2's. Included after the
// target is set (see target.hpp).
#pragma once

#include "kernels/avx2_scales.hpp"

namespace mpo {
namespace {

constexpr Layout kAvx512Layout = {{64, 64, 64, 32}, true, true};

struct Avx512 : Avx2Scales {
  static constexpr int kBias8 = 0;  // dpbusd takes unsigned codes of all 8 bits

  static MPO_INLINE __m512i load_wide(const void* from) { return _mm512_loadu_si512(from); }
  static MPO_INLINE __m512i add_products(__m512i sums, __m512i codes, const std::int8_t* x) {
    return _mm512_dpbusd_epi32(sums, codes, load_wide(x));
  }

  // Zeroes the bytes that belong to the other half of each block of 32 codes, of which a byte holds 8 / P.
  template <int P>
  static MPO_INLINE __m512i keep(__m512i raw, int half) {
    if (half == kWhole) return raw;
    const __m512i first = P == 8   ? _mm512_setr_epi64(-1, -1, 0, 0, -1, -1, 0, 0)
                          : P == 4 ? _mm512_setr_epi64(-1, 0, -1, 0, -1, 0, -1, 0)
                          : P == 2 ? _mm512_set1_epi64(0xffffffff)
                                   : _mm512_set1_epi32(0xffff);
    return half ? _mm512_andnot_si512(first, raw) : _mm512_and_si512(first, raw);
  }

  static MPO_INLINE __m256i add_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
  // Sums of neighbouring lanes, all of which fit 16 bits.
  static MPO_INLINE __m256i fold(__m512i lanes) { return add_pairs(_mm512_cvtsepi32_epi16(lanes)); }

  template <int T>
  static MPO_INLINE void four(const std::uint8_t* w, const std::int8_t* x, std::size_t step, int half, __m256i* out) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i lanes[2][T];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m512i raw = keep<4>(load_wide(w + 64 * v), half);
      const __m512i even = _mm512_and_si512(raw, mask), odd = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const std::int8_t* from = x + static_cast<std::size_t>(t) * step + 128 * v;
        lanes[v][t] = add_products(add_products(_mm512_setzero_si512(), even, from), odd, from + 64);
      }
    }
    for (int t = 0; t < T; ++t) {  // 8 codes a lane, at most 8 * 15 * 127 < 2^15; then 16, still below
      const __m512i packed = _mm512_packs_epi32(lanes[0][t], lanes[1][t]);
      const __m256i sums = fold(_mm512_madd_epi16(packed, _mm512_set1_epi16(1)));
      out[t] = _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    }
  }

  template <int T>
  static MPO_INLINE void four_codes(const __m512i* codes, const std::int8_t* x, std::size_t step, __m256i* out) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      __m512i lanes = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) lanes = add_products(lanes, codes[k], x + static_cast<std::size_t>(t) * step + 64 * k);
      out[t] = fold(lanes);
    }
  }

  template <int T>
  static MPO_INLINE void two(const std::uint8_t* w, const std::int8_t* x, std::size_t step, int half, __m256i* out) {
    const __m512i mask = _mm512_set1_epi8(3), raw = keep<2>(load_wide(w), half);
    const __m512i codes[4] = {_mm512_and_si512(raw, mask), _mm512_and_si512(_mm512_srli_epi16(raw, 2), mask),
                              _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask),
                              _mm512_and_si512(_mm512_srli_epi16(raw, 6), mask)};
    four_codes<T>(codes, x, step, out);
  }

  // 2 + 1 bits: the high bits are looked up into the places above the low ones (see avx2.cpp).
  template <int T>
  static MPO_INLINE void three(const std::uint8_t* low, const std::uint8_t* high, const std::int8_t* x,
                               std::size_t step, int half, __m256i* out) {
    const __m512i mask = _mm512_set1_epi8(7), fields = _mm512_set1_epi8(0x33), nibble = _mm512_set1_epi8(15);
    const __m512i even_bits =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const __m512i odd_bits =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
    const auto widened = [high](int i) {
      return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high) + i));
    };
    const __m512i raw = keep<2>(load_wide(low), half);
    const __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(widened(0)), widened(1), 1);
    const __m512i bits = keep<2>(_mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), nibble), half);
    const __m512i even = _mm512_or_si512(_mm512_and_si512(raw, fields), _mm512_shuffle_epi8(even_bits, bits));
    const __m512i odd =
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(raw, 2), fields), _mm512_shuffle_epi8(odd_bits, bits));
    const __m512i codes[4] = {_mm512_and_si512(even, mask), _mm512_and_si512(odd, mask),
                              _mm512_and_si512(_mm512_srli_epi16(even, 4), mask),
                              _mm512_and_si512(_mm512_srli_epi16(odd, 4), mask)};
    four_codes<T>(codes, x, step, out);
  }

  // A chunk of a 1-bit plane is half a vector: used twice, the second time shifted by 4 (Layout::split_ones).
  template <int T>
  static MPO_INLINE void one(const std::uint8_t* w, const std::int8_t* x, std::size_t step, int half, __m256i* out) {
    const __m256i plane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(plane), _mm256_srli_epi16(plane, 4), 1);
    // Which bytes a half keeps does not depend on the bits inside them, but the shift moves some to the byte below.
    const __m512i mask = _mm512_set1_epi8(1);
    __m512i codes[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) codes[k] = keep<1>(_mm512_and_si512(_mm512_srli_epi16(both, k), mask), half);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      __m512i lanes = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) lanes = add_products(lanes, codes[k], x + static_cast<std::size_t>(t) * step + 64 * k);
      out[t] = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
    }
  }

  static MPO_INLINE __m256i eight(const std::uint8_t* w, const std::int8_t* x, int half) {
    __m512i lanes[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      lanes[v] = add_products(_mm512_setzero_si512(), keep<8>(load_wide(w + 64 * v), half), x + 64 * v);
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(lanes[0], lanes[1]), _mm512_unpackhi_epi32(lanes[0], lanes[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(lanes[2], lanes[3]), _mm512_unpackhi_epi32(lanes[2], lanes[3]));
    const __m512i quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    // Now 128-bit part j holds, for each of the four vectors, the sum of its part j; a block is two parts.
    const __m512i blocks = _mm512_add_epi32(quarters, _mm512_shuffle_i32x4(quarters, quarters, 0xb1));
    const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, blocks));
  }

  template <int Low, int High, int T>
  static MPO_INLINE void dots(const std::uint8_t* low, const std::uint8_t* high, const std::int8_t* low_codes,
                              const std::int8_t* high_codes, std::size_t step, int half, __m256i* out) {
    if constexpr (Low == 8)
      for (int t = 0; t < T; ++t) out[t] = eight(low, low_codes + static_cast<std::size_t>(t) * step, half);
    else if constexpr (Low == 4) four<T>(low, low_codes, step, half, out);
    else if constexpr (High == 1) three<T>(low, high, low_codes, step, half, out);
    else two<T>(low, low_codes, step, half, out);
    if constexpr (Low == 4 && High > 0) {
      __m256i above[T];
      if constexpr (High == 2) two<T>(high, high_codes, step, half, above);
      else one<T>(high, high_codes, step, half, above);
      for (int t = 0; t < T; ++t) out[t] = _mm256_add_epi32(out[t], _mm256_slli_epi32(above[t], 4));
    }
  }
};

}  // namespace
}  // namespace mpo
