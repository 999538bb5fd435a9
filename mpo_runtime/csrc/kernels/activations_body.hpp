// Rows of x to int8, written once over the vectors X of an instruction set. Included after the target is set (see
// target.hpp).
#pragma once

#include "kernels/kernels.hpp"

namespace mpo {
namespace {

// Plain loops that compilers turn into vectors of any baseline.
struct PlainRows {
  // 256 values to int8, each block of 32 with the scale max|x| / 127, and the sums of the codes of each half block. The
  // maximum is taken over the bit patterns of |x|, which order like the values; adding 1.5 * 2^23 rounds to nearest even
  // and leaves the integer in the low bits of the sum.
  static void quantize(const float* x, std::int8_t* codes, float* scales, std::int32_t* half_sums) {
    for (std::size_t start = 0; start < kChunk; start += kScaleBlock) {
      std::int32_t bits[kScaleBlock];
      std::memcpy(bits, x + start, sizeof bits);
      std::int32_t largest = 0;
      for (std::size_t i = 0; i < kScaleBlock; ++i) {
        const std::int32_t pattern = bits[i] & 0x7fffffff;
        largest = pattern > largest ? pattern : largest;
      }
      float inverse;
      scales[start / kScaleBlock] = scale_of(largest, inverse);
      for (std::size_t i = 0; i < kScaleBlock; ++i) {
        const float shifted = x[start + i] * inverse + 12582912.0f;
        std::int32_t pattern;
        std::memcpy(&pattern, &shifted, sizeof pattern);
        codes[start + i] = static_cast<std::int8_t>(pattern);
      }
    }
    constexpr std::size_t kHalf = kScaleBlock / 2;
    for (std::size_t h = 0; h < kChunk / kHalf; ++h) {
      half_sums[h] = 0;
      for (std::size_t i = 0; i < kHalf; ++i) half_sums[h] += codes[h * kHalf + i];
    }
  }

  // The scale of a block, by the bit pattern of its largest |x|, and what its values are multiplied with.
  static MPO_INLINE float scale_of(std::int32_t largest, float& inverse) {
    constexpr float kSmallest = 1e-30f;  // below this 127 / maximum could overflow
    float maximum;
    std::memcpy(&maximum, &largest, sizeof maximum);
    const bool empty = maximum < kSmallest;
    inverse = empty ? 0.0f : 127.0f / maximum;
    return empty ? 0.0f : maximum / 127.0f;
  }

  // Separates the bytes at even places from those at odd places. `bytes` is a multiple of 64 where vectors have 32.
  static void deinterleave(const std::int8_t* in, std::size_t bytes, std::int8_t* even, std::int8_t* odd) {
    for (std::size_t i = 0; i < bytes / 2; ++i) {
      even[i] = in[2 * i];
      odd[i] = in[2 * i + 1];
    }
  }
};

template <class X>
struct ActivationsBody {
  // 256 codes in the order of a p-bit plane's vectors (see Layout).
  static void arrange_chunk(const std::int8_t* natural, int bits, std::size_t width, bool split_ones, std::int8_t* out) {
    const std::size_t vector = width * 8 / static_cast<std::size_t>(bits);  // codes in a vector
    const std::size_t step = vector / width;
    for (std::size_t start = 0; start < kChunk; start += vector) {
      const std::int8_t* in = natural + start;
      std::int8_t* to = out + start;
      std::int8_t halves[kChunk], quarters[kChunk];
      if (step == 2) {
        X::deinterleave(in, vector, to, to + width);
        continue;
      }
      X::deinterleave(in, vector, halves, halves + vector / 2);
      if (step == 4) {  // of the even ones the even are k = 0, the odd k = 2
        X::deinterleave(halves, vector / 2, to, to + 2 * width);
        X::deinterleave(halves + vector / 2, vector / 2, to + width, to + 3 * width);
        continue;
      }
      X::deinterleave(halves, vector / 2, quarters, quarters + vector / 4);
      X::deinterleave(halves + vector / 2, vector / 2, quarters + vector / 2, quarters + 3 * vector / 4);
      constexpr std::size_t kFirst[4] = {0, 2, 1, 3};  // k modulo 4 of each quarter
      for (std::size_t q = 0; q < 4; ++q) {
        const std::size_t k = kFirst[q];
        const std::size_t low = split_ones ? 2 * k : k, high = split_ones ? 2 * k + 1 : k + 4;
        X::deinterleave(quarters + q * (vector / 4), vector / 4, to + low * width, to + high * width);
      }
    }
  }

  // The first chunks of a row: codes, their scales and sums, and the codes in the order of each plane asked for.
  static void arrange(const ActivationRow& row, const Layout& layout, unsigned planes, std::size_t chunks) {
    constexpr std::size_t kBlocks = kChunk / kScaleBlock;
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
      const std::size_t start = chunk * kChunk;
      const float* x = row.x + start;
      float rest[kChunk];
      if (start + kChunk > row.columns) {  // the tail, or nothing at all
        const std::size_t columns = start < row.columns ? row.columns - start : 0;
        std::memset(rest, 0, sizeof rest);
        if (columns) std::memcpy(rest, x, columns * sizeof(float));
        x = rest;
      }
      std::int8_t* natural = row.codes[0] + start;
      std::int32_t half_sums[2 * kBlocks];
      float* scales = row.scales + chunk * kBlocks;
      X::quantize(x, natural, scales, half_sums);
      for (std::size_t b = 0; b < kBlocks; ++b) {
        float* halves = row.half_sums + 2 * (chunk * kBlocks + b);
        halves[0] = scales[b] * static_cast<float>(half_sums[2 * b]);
        halves[1] = scales[b] * static_cast<float>(half_sums[2 * b + 1]);
        row.sums[chunk * kBlocks + b] = scales[b] * static_cast<float>(half_sums[2 * b] + half_sums[2 * b + 1]);
      }
      for (int p = 1; p < 4; ++p)
        if (planes >> p & 1)
          arrange_chunk(natural, kPlaneBits[p], layout.width[p], layout.split_ones, row.codes[p] + start);
    }
  }
};

}  // namespace
}  // namespace mpo
