// Products with the transposed matrix, y += s w, for cores whose short side is the row count. Included once by the
// source of every level, after float_body.hpp.
#pragma once

#include "kernels.hpp"
#include "spread.hpp"

namespace mpo {
namespace {

template <class X>
struct TransposedBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;

  // Columns [c, c + 16), which share a scale, for T rows of s, held in registers while the rows of w pass.
  template <int Low, int High, int T>
  static void block(const QuantizedMatrix& w, const float* s, std::size_t s_stride, std::size_t c, float* y,
                    std::size_t stride) {
    constexpr std::size_t kVectors = 16 / kLanes;
    F sums[T][kVectors];
    float offsets[T] = {};
    for (auto& row : sums)
      for (F& sum : row) sum = X::nothing();
    for (std::size_t r = 0; r < w.rows; ++r) {
      const std::size_t at = r * w.columns + c, group = at / w.group;
      std::uint8_t codes[16];
      const std::uint8_t* from = codes;
      if constexpr (Low == 8) from = w.low + at;
      else X::template spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, 16, codes);
      const float scale = X::half(w.scale + group);
      const float zero = w.zero ? X::half(w.zero + group) : implicit_zero(Low + High);
      for (int t = 0; t < T; ++t) {
        const float factor = scale * s[static_cast<std::size_t>(t) * s_stride + r];
        offsets[t] += factor * zero;
        const F factors = X::broadcast(factor);
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kVectors; ++i) sums[t][i] = X::fma(factors, X::widen(from + i * kLanes), sums[t][i]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (std::size_t i = 0; i < kVectors; ++i) {
        float* place = y + static_cast<std::size_t>(t) * stride + c + i * kLanes;
        X::store(place, X::add(X::load(place), X::subtract(sums[t][i], X::broadcast(offsets[t]))));
      }
  }

  template <int Low, int High>
  static void columns(const QuantizedMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                      std::size_t begin, std::size_t end, float* y, std::size_t stride) {
    std::size_t t = 0;
    for (; t + 4 <= batch; t += 4)
      for (std::size_t c = begin; c < end; c += 16)
        block<Low, High, 4>(w, s + t * s_stride, s_stride, c, y + t * stride, stride);
    for (; t < batch; ++t) {
      std::size_t r = 0;
      for (; r + 4 <= w.rows; r += 4) stream<Low, High, 4>(w, s + t * s_stride, r, begin, end, y + t * stride);
      for (; r < w.rows; ++r) stream<Low, High, 1>(w, s + t * s_stride, r, begin, end, y + t * stride);
    }
  }

  // R rows of w times their values of a single row of s, added to y. The rows are followed in the order of memory: a block
  // of columns that goes down all rows would wait for each of its cache lines, which the memory does not foresee.
  template <int Low, int High, int R>
  static void stream(const QuantizedMatrix& w, const float* s, std::size_t r, std::size_t begin, std::size_t end,
                     float* y) {
    std::size_t c = begin;
    for (; c + 64 <= end; c += 64) {
      if (w.group >= 64 && c % 64 == 0) span<Low, High, R, 64, 64>(w, s, r, c, y);
      else if (w.group >= 32 && c % 32 == 0) span<Low, High, R, 64, 32>(w, s, r, c, y);
      else span<Low, High, R, 64, 16>(w, s, r, c, y);
    }
    for (; c < end; c += 16) span<Low, High, R, 16, 16>(w, s, r, c, y);
  }

  template <int Low, int High, int R, int Columns, int Sub>
  static MPO_INLINE void span(const QuantizedMatrix& w, const float* s, std::size_t r, std::size_t c, float* y) {
    constexpr std::size_t kSubs = Columns / Sub;
    std::uint8_t codes[Low == 8 ? 1 : R * Columns];
    const std::uint8_t* from[R];
    F factors[R][kSubs];
    float offsets[kSubs] = {};
    const std::size_t groups = w.columns / w.group, first = c / w.group;
    for (int k = 0; k < R; ++k) {
      const std::size_t row = r + static_cast<std::size_t>(k), at = row * w.columns + c;
      if constexpr (Low == 8) {
        from[k] = w.low + at;
      } else {
        from[k] = codes + k * Columns;
        X::template spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, Columns,
                                      codes + k * Columns);
      }
      for (std::size_t j = 0; j < kSubs; ++j) {
        const std::size_t group = row * groups + (j ? (c + j * Sub) / w.group : first);
        const float factor = X::half(w.scale + group) * s[row];
        offsets[j] += factor * (w.zero ? X::half(w.zero + group) : implicit_zero(Low + High));
        factors[k][j] = X::broadcast(factor);
      }
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Columns / kLanes; ++i) {
      const std::size_t sub = i * kLanes / Sub;
      F sum = X::subtract(X::load(y + c + i * kLanes), X::broadcast(offsets[sub]));
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k) sum = X::fma(factors[k][sub], X::widen(from[k] + i * kLanes), sum);
      X::store(y + c + i * kLanes, sum);
    }
  }

  static void add(const QuantizedMatrix& w, const float* s, std::size_t batch, std::size_t s_stride, std::size_t begin,
                  std::size_t end, float* y, std::size_t stride) {
    switch (w.bits) {
      case 8: return columns<8, 0>(w, s, batch, s_stride, begin, end, y, stride);
      case 6: return columns<4, 2>(w, s, batch, s_stride, begin, end, y, stride);
      case 5: return columns<4, 1>(w, s, batch, s_stride, begin, end, y, stride);
      case 4: return columns<4, 0>(w, s, batch, s_stride, begin, end, y, stride);
      case 3: return columns<2, 1>(w, s, batch, s_stride, begin, end, y, stride);
      default: return columns<2, 0>(w, s, batch, s_stride, begin, end, y, stride);
    }
  }

  template <Float Type, int Vectors>
  static void dense_block(const DenseMatrix& w, const float* s, std::size_t c, float* y) {
    constexpr std::size_t kSize = FloatBody<X>::size_of(Type);
    F sums[Vectors];
    for (int i = 0; i < Vectors; ++i) sums[i] = X::load(y + c + static_cast<std::size_t>(i) * kLanes);
    const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + c * kSize;
    for (std::size_t r = 0; r < w.rows; ++r, from += w.columns * kSize) {
      const F factor = X::broadcast(s[r]);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i)
        sums[i] = X::fma(factor, FloatBody<X>::template load_as<Type>(from + static_cast<std::size_t>(i) * kLanes * kSize),
                         sums[i]);
    }
    for (int i = 0; i < Vectors; ++i) X::store(y + c + static_cast<std::size_t>(i) * kLanes, sums[i]);
  }

  template <Float Type>
  static void dense_columns(const DenseMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                            std::size_t begin, std::size_t end, float* y, std::size_t stride) {
    constexpr std::size_t kSize = FloatBody<X>::size_of(Type);
    for (std::size_t t = 0; t < batch; ++t, s += s_stride, y += stride) {
      std::size_t c = begin;
      for (; c + 8 * kLanes <= end; c += 8 * kLanes) dense_block<Type, 8>(w, s, c, y);
      for (; c + kLanes <= end; c += kLanes) dense_block<Type, 1>(w, s, c, y);
      for (; c < end; ++c) {
        const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + c * kSize;
        for (std::size_t r = 0; r < w.rows; ++r)
          y[c] += s[r] * FloatBody<X>::template one_as<Type>(from + r * w.columns * kSize);
      }
    }
  }

  static void add_dense(const DenseMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                        std::size_t begin, std::size_t end, float* y, std::size_t stride) {
    switch (w.type) {
      case Float::f32: return dense_columns<Float::f32>(w, s, batch, s_stride, begin, end, y, stride);
      case Float::f16: return dense_columns<Float::f16>(w, s, batch, s_stride, begin, end, y, stride);
      default: return dense_columns<Float::bf16>(w, s, batch, s_stride, begin, end, y, stride);
    }
  }
};

}  // namespace
}  // namespace mpo
