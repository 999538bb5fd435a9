// The int8 product, written once over the vectors X of an instruction set. Included after the target is set (see
// target.hpp).
//
// A row is taken in chunks of 256 columns. X::dots gives the 8 integer dot products of the chunk's 8 blocks of 32
// columns, in one vector of 8 lanes; a block has one activation scale and, from groups of 32 on, one weight scale, so
// that the float work is one multiplication and one fused multiply-add a chunk, whatever the width.
#pragma once

#include "kernels/kernels.hpp"

namespace mpo {
namespace {

// With a single row of x, `Together` rows of w are multiplied at once (half as many at 4 bits) in the widths for which
// X::takes_together() is true.
template <class X, std::size_t Together = 1>
struct IntegerBody {
  using F = typename X::Floats;

  // Row r of w with T rows of x, from row `first` of x on.
  template <int Low, int High, int G, int T>
  static MPO_INLINE void row(const QuantizedMatrix& w, const ActivationView& x, const Task& task, std::size_t first,
                             std::size_t r) {
    constexpr std::size_t kPlaces = scales_per_chunk(G), kHalves = kChunk / G;
    const std::size_t padded = x.padded, chunks = (w.columns + kChunk - 1) / kChunk, whole = w.columns / kChunk;
    const std::size_t groups = w.columns / G, places = padded / kChunk * kPlaces;
    const std::uint8_t* low = w.low + r * w.columns / 8 * Low;
    const std::uint8_t* high = High ? w.high + r * w.columns / 8 * High : nullptr;
    const std::uint16_t* scale = w.scale + r * groups;
    const std::uint16_t* zero = w.zero ? w.zero + r * groups : nullptr;
    const std::int8_t* low_codes = x.codes[plane_index(Low)] + first * padded;
    const std::int8_t* high_codes = x.codes[plane_index(High ? High : 1)] + first * padded;
    const float* blocks = x.scales + first * padded / kScaleBlock;
    const float* group_sums = (G == 16 ? x.half_sums : x.sums) + first * places;

    F sums[T], offsets[T];
    for (int t = 0; t < T; ++t) sums[t] = offsets[t] = X::zero();
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
        offsets[t] = X::template add_offsets<G>(shifts, group_sums + static_cast<std::size_t>(t) * places,
                                                offsets[t]);
      low += 32 * Low;
      low_codes += kChunk;
      if (High) high += 32 * High, high_codes += kChunk;
      blocks += kChunk / kScaleBlock;
      scale += kHalves;
      group_sums += kPlaces;
    }
    const float middle = w.zero ? 1.0f : implicit_zero(Low + High) - static_cast<float>(Low == 8 ? X::kBias8 : 0);
    for (int t = 0; t < T; ++t)
      task.put(first + static_cast<std::size_t>(t), r, X::total(sums[t]) - middle * X::total(offsets[t]));
  }

  static MPO_INLINE void copy_rest(void* to, std::size_t room, const void* from, std::size_t bytes) {
    std::memset(to, 0, room);
    std::memcpy(to, from, bytes);
  }

  // R rows of w with one row of x; columns are whole chunks, and no zeros are stored. What belongs to x is read once for
  // all rows, and while one row waits for its results the others go on.
  template <int Low, int High, int G, std::size_t R>
  static MPO_INLINE void together(const QuantizedMatrix& w, const ActivationView& x, const Task& task, std::size_t r) {
    constexpr std::size_t kLead = 1024;
    const std::size_t chunks = w.columns / kChunk, groups = w.columns / G;
    const std::size_t low_step = w.columns / 8 * Low, high_step = w.columns / 8 * High;
    const std::uint8_t* low = w.low + r * low_step;
    const std::uint8_t* high = High ? w.high + r * high_step : nullptr;
    const std::uint16_t* scale = w.scale + r * groups;
    const std::int8_t* low_codes = x.codes[plane_index(Low)] + task.first * x.padded;
    const float* blocks = x.scales + task.first * x.padded / kScaleBlock;
    const float* block_sums = x.sums + task.first * x.padded / kScaleBlock;
    const F middle = X::broadcast(static_cast<float>(Low == 8 ? X::kBias8 : 0) - implicit_zero(Low + High));
    // What the next rows need, in the order of memory, which its own prefetching follows; a bit more than R rows ahead.
    const std::uint8_t* next_low = low + R * low_step + kLead;
    const std::uint8_t* next_high = High ? high + R * high_step + kLead : nullptr;
    const std::uint16_t* next_scale = scale + R * groups + kLead / 4;
    F sums[R];
    for (std::size_t i = 0; i < R; ++i) sums[i] = X::zero();
    for (std::size_t c = 0; c < chunks; ++c) {
      const F block = X::template ordered<Low>(X::load(blocks));
      const F offset = X::multiply(middle, X::template ordered<Low>(X::load(block_sums)));
      for (std::size_t line = 0; line < R * 32 * Low; line += 64) X::prefetch_line(next_low + line);
      next_low += R * 32 * Low;
      if (High) {
        for (std::size_t line = 0; line < R * 32 * High; line += 64) X::prefetch_line(next_high + line);
        next_high += R * 32 * High;
      }
      X::prefetch_line(next_scale);
      next_scale += R * kChunk / G;
      typename X::Integers dots[R];
      X::template rows_dots<Low, High, R>(low, low_step, high, high_step, low_codes, dots);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < R; ++i) {
        const F scales = X::template ordered_scales<Low, G>(scale + i * groups);
        sums[i] = X::fma(scales, X::fma(X::to_float(dots[i]), block, offset), sums[i]);
      }
      low += 32 * Low;
      low_codes += kChunk;
      if (High) high += 32 * High;
      blocks += kChunk / kScaleBlock;
      block_sums += kChunk / kScaleBlock;
      scale += kChunk / G;
    }
    for (std::size_t i = 0; i < R; ++i) task.put(task.first, r + i, X::total(sums[i]));
  }

  // Row r of w with T rows of x, by the operations of together() in the same order: a row's result does not depend on
  // those beside it.
  template <int Low, int High, int G, int T>
  static MPO_INLINE void beside(const QuantizedMatrix& w, const ActivationView& x, const Task& task, std::size_t first,
                                std::size_t r) {
    const std::size_t chunks = w.columns / kChunk, step = x.padded / kScaleBlock;
    const std::uint8_t* low = w.low + r * (w.columns / 8 * Low);
    const std::uint8_t* high = High ? w.high + r * (w.columns / 8 * High) : nullptr;
    const std::uint16_t* scale = w.scale + r * (w.columns / G);
    const std::int8_t* codes = x.codes[plane_index(Low)] + first * x.padded;
    const float *blocks = x.scales + first * step, *block_sums = x.sums + first * step;
    const F middle = X::broadcast(static_cast<float>(Low == 8 ? X::kBias8 : 0) - implicit_zero(Low + High));
    F sums[T];
    for (F& sum : sums) sum = X::zero();
    for (std::size_t c = 0; c < chunks; ++c) {
      for (int line = 0; line < 32 * Low; line += 64) X::prefetch(low + line);
      if (High) X::prefetch(high);
      typename X::Integers dots[T];
      X::template dots<Low, High, T>(low, high, codes, codes, x.padded, kWhole, dots);
      const F scales = X::template ordered_scales<Low, G>(scale);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < T; ++t) {
        const F block = X::template ordered<Low>(X::load(blocks + t * step));
        const F offset = X::multiply(middle, X::template ordered<Low>(X::load(block_sums + t * step)));
        sums[t] = X::fma(scales, X::fma(X::template ordered<Low>(X::to_float(dots[t])), block, offset), sums[t]);
      }
      low += 32 * Low;
      codes += kChunk;
      if (High) high += 32 * High;
      blocks += kChunk / kScaleBlock;
      block_sums += kChunk / kScaleBlock;
      scale += kChunk / G;
    }
    for (std::size_t t = 0; t < T; ++t) task.put(first + t, r, X::total(sums[t]));
  }

  // Rows of w in blocks that stay in the first-level cache while the rows of x pass, four at a time.
  template <int Low, int High, int G>
  static void rows(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
    if constexpr (Together > 1 && G != 16) {
      if constexpr (X::takes_together(Low, High)) {
        if (!w.zero && w.columns % kChunk == 0) return rows_together<Low, High, G>(w, x, task);
      }
    }
    in_blocks(task, [&](auto count, std::size_t t, std::size_t r) { row<Low, High, G, count.value>(w, x, task, t, r); });
  }

  template <int Low, int High, int G>
  static void rows_together(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
    constexpr std::size_t kRows = Low == 4 ? Together / 2 : Together;  // about as many bytes for each width
    if (task.count > 1)
      return in_blocks(task, [&](auto count, std::size_t t, std::size_t r) { beside<Low, High, G, count.value>(w, x, task, t, r); });
    std::size_t begin = task.begin;
    for (; begin + kRows <= task.end; begin += kRows) together<Low, High, G, kRows>(w, x, task, begin);
    for (; begin < task.end; ++begin) together<Low, High, G, 1>(w, x, task, begin);
  }

  template <int T>
  struct Count {
    static constexpr int value = T;
  };

  // Calls take(rows of x at once, the first of them, row of w) for all of the task.
  template <class Take>
  static MPO_INLINE void in_blocks(const Task& task, Take take) {
    constexpr std::size_t kBlock = 4;
    for (std::size_t start = task.begin; start < task.end; start += kBlock) {
      const std::size_t stop = start + kBlock < task.end ? start + kBlock : task.end;
      std::size_t t = task.first, left = task.count;
      for (; left >= 4; t += 4, left -= 4)
        for (std::size_t r = start; r < stop; ++r) take(Count<4>{}, t, r);
      for (; left >= 2; t += 2, left -= 2)
        for (std::size_t r = start; r < stop; ++r) take(Count<2>{}, t, r);
      if (left)
        for (std::size_t r = start; r < stop; ++r) take(Count<1>{}, t, r);
    }
  }

  static void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
    with_planes(w.bits, [&](auto planes) {
      with_group(w.group, [&](auto group) { rows<planes.low, planes.high, group.value>(w, x, task); });
    });
  }
};

}  // namespace
}  // namespace mpo
