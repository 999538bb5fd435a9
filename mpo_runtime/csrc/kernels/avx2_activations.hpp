// Rows of x to int8 with AVX2. Included after the target is set (see target.hpp).
#pragma once

#include "kernels/activations_body.hpp"

namespace mpo {
namespace {

struct Avx2Rows : PlainRows {
  static void quantize(const float* x, std::int8_t* codes, float* scales, std::int32_t* half_sums) {
    constexpr int kBlocks = static_cast<int>(kChunk / kScaleBlock);
    const __m256i ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    __m256i sums[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const float* from = x + 32 * b;
      float inverse;
      scales[b] = scale_of(largest(from), inverse);
      const __m256 factor = _mm256_set1_ps(inverse);
      const auto eight = [&](int i) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * i), factor)); };
      const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(eight(0), eight(1)), _mm256_packs_epi32(eight(2), eight(3)));
      const __m256i in_order = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * b), in_order);
      sums[b] = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, in_order), pairs);  // a half block in each 128-bit lane
    }
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; b += 4) {
      const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[b], sums[b + 1]), _mm256_hadd_epi32(sums[b + 2], sums[b + 3]));
      const __m256i in_order = _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(half_sums + 2 * b), in_order);
    }
  }

  // The largest bit pattern of |x| of 32 values.
  static MPO_INLINE std::int32_t largest(const float* x) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    const auto eight = [&](int i) {
      return _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i)), mask);
    };
    const __m256i all = _mm256_max_epi32(_mm256_max_epi32(eight(0), eight(1)), _mm256_max_epi32(eight(2), eight(3)));
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

  static void deinterleave(const std::int8_t* in, std::size_t bytes, std::int8_t* even, std::int8_t* odd) {
    const __m256i low = _mm256_set1_epi16(255);
    for (std::size_t i = 0; i < bytes; i += 64) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + 32));
      const __m256i evens = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
      const __m256i odds = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + i / 2), _mm256_permute4x64_epi64(evens, 0xd8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd + i / 2), _mm256_permute4x64_epi64(odds, 0xd8));
    }
  }
};

}  // namespace
}  // namespace mpo
