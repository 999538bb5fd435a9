// The int8 product, written once over the vector operations X of a level. Included once by the source of every level.
//
// A row is taken in chunks of 256 columns. X::dots gives the 8 integer dot products of the chunk's 8 blocks of 32
// columns, in one vector of 8 lanes; a block has one activation scale and, from groups of 32 on, one weight scale, so
// that the float work is one multiplication and one fused multiply-add a chunk, whatever the width.
#pragma once

#include "kernels.hpp"

namespace mpo {
namespace {

template <class X>
struct IntegerBody {
  using F = typename X::Floats;

  // One row of w with T rows of x, from row `first` of x on.
  template <int Low, int High, int G, int T>
  static MPO_INLINE void row(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t r,
                             float* y, std::size_t stride, bool accumulate) {
    constexpr std::size_t kPlaces = scales_per_chunk(G), kHalves = kChunk / G;
    const std::size_t padded = x.padded, chunks = padded / kChunk, whole = w.columns / kChunk, groups = w.columns / G;
    const std::uint8_t* low = w.low + r * w.columns / 8 * Low;
    const std::uint8_t* high = High ? w.high + r * w.columns / 8 * High : nullptr;
    const std::uint16_t* scale = w.scale + r * groups;
    const std::uint16_t* zero = w.zero ? w.zero + r * groups : nullptr;
    const std::int8_t* low_codes = x.codes[plane_index(Low)] + first * padded;
    const std::int8_t* high_codes = x.codes[plane_index(High ? High : 1)] + first * padded;
    const float* blocks = x.scales + first * padded / kScaleBlock;
    const float* group_sums = (G == 16 ? x.half_sums : x.sums) + first * chunks * kPlaces;

    F sums[T], offsets[T];
    for (int t = 0; t < T; ++t) sums[t] = offsets[t] = X::nothing();
    std::uint8_t low_rest[32 * Low], high_rest[32 * (High ? High : 1)];
    std::uint16_t scale_rest[kHalves], zero_rest[kHalves];
    for (std::size_t c = 0; c < chunks; ++c) {
      if (c == whole) {  // the tail: nothing beyond the end of a tensor may be read
        const std::size_t columns = w.columns - whole * kChunk;
        copy_rest(low_rest, sizeof low_rest, low, columns * Low / 8);
        low = low_rest;
        if (High) copy_rest(high_rest, sizeof high_rest, high, columns * High / 8), high = high_rest;
        copy_rest(scale_rest, sizeof scale_rest, scale, columns / G * 2);
        scale = scale_rest;
        if (zero) copy_rest(zero_rest, sizeof zero_rest, zero, columns / G * 2), zero = zero_rest;
      }
      for (int line = 0; line < 32 * Low; line += 64) X::prefetch(low + line);
      if (High) X::prefetch(high);
      const auto scales = X::template load_scales<G>(scale);
      constexpr int kPasses = G == 16 ? 2 : 1;  // a block of two groups: first its first half, then the second
      for (int pass = 0; pass < kPasses; ++pass) {
        typename X::Integers dots[T];
        X::template dots<Low, High, T>(low, high, low_codes, high_codes, padded, kPasses == 2 ? pass : kWhole, dots);
        const F spread_scales = X::template block_scales<G>(scales, pass);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const F factor = X::multiply(spread_scales, X::load(blocks + static_cast<std::size_t>(t) * padded / kScaleBlock));
          sums[t] = X::fma(X::to_float(dots[t]), factor, sums[t]);
        }
      }
      auto shifts = scales;
      if (zero) {
        shifts = X::template times_zero<G>(scales, zero, Low == 8 ? static_cast<float>(X::kBias8) : 0.0f);
        zero += kHalves;
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        offsets[t] = X::template add_offsets<G>(shifts, group_sums + static_cast<std::size_t>(t) * chunks * kPlaces,
                                                offsets[t]);
      low += 32 * Low;
      low_codes += kChunk;
      if (High) high += 32 * High, high_codes += kChunk;
      blocks += kChunk / kScaleBlock;
      scale += kHalves;
      group_sums += kPlaces;
    }
    const float middle = w.zero ? 1.0f : static_cast<float>((1 << (Low + High - 1)) - (Low == 8 ? X::kBias8 : 0));
    for (int t = 0; t < T; ++t) {
      const float value = X::total(sums[t]) - middle * X::total(offsets[t]);
      float* place = y + (first + static_cast<std::size_t>(t)) * stride + r;
      *place = accumulate ? *place + value : value;
    }
  }

  static MPO_INLINE void copy_rest(void* to, std::size_t room, const void* from, std::size_t bytes) {
    std::memset(to, 0, room);
    std::memcpy(to, from, bytes);
  }

  // Rows of w in blocks that stay in the first-level cache while the rows of x pass, four at a time.
  template <int Low, int High, int G>
  static void rows(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
                   std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
    constexpr std::size_t kBlock = 4;
    for (std::size_t start = begin; start < end; start += kBlock) {
      const std::size_t stop = start + kBlock < end ? start + kBlock : end;
      std::size_t t = first, left = count;
      for (; left >= 4; t += 4, left -= 4)
        for (std::size_t r = start; r < stop; ++r) row<Low, High, G, 4>(w, x, t, r, y, stride, accumulate);
      for (; left >= 2; t += 2, left -= 2)
        for (std::size_t r = start; r < stop; ++r) row<Low, High, G, 2>(w, x, t, r, y, stride, accumulate);
      if (left)
        for (std::size_t r = start; r < stop; ++r) row<Low, High, G, 1>(w, x, t, r, y, stride, accumulate);
    }
  }

  template <int Low, int High>
  static Multiply of_group(std::size_t group) {
    switch (group) {
      case 16: return rows<Low, High, 16>;
      case 32: return rows<Low, High, 32>;
      case 64: return rows<Low, High, 64>;
      case 128: return rows<Low, High, 128>;
      default: return rows<Low, High, 256>;
    }
  }

  static Multiply of(const QuantizedMatrix& w) {
    switch (w.bits) {
      case 8: return of_group<8, 0>(w.group);
      case 6: return of_group<4, 2>(w.group);
      case 5: return of_group<4, 1>(w.group);
      case 4: return of_group<4, 0>(w.group);
      case 3: return of_group<2, 1>(w.group);
      default: return of_group<2, 0>(w.group);
    }
  }

  static void multiply(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
                       std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
    of(w)(w, x, first, count, begin, end, y, stride, accumulate);
  }
};

}  // namespace
}  // namespace mpo
