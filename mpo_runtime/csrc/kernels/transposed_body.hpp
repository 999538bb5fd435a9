// Products with the transposed matrix, y += s w, for cores whose short side is the row count. Included after the target is
// set (see target.hpp).
#pragma once

#include "kernels/float_body.hpp"

namespace mpo {
namespace {

template <class X>
struct TransposedBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;

  template <int Low, int High>
  static void columns(const QuantizedMatrix& w, Rows<const float> s, const Task& task) {
    for (std::size_t t = task.first; t < task.first + task.count; ++t) {
      std::size_t r = 0;
      for (; r + 4 <= w.rows; r += 4) stream<Low, High, 4>(w, s.row(t), r, task.begin, task.end, task.y.row(t));
      for (; r < w.rows; ++r) stream<Low, High, 1>(w, s.row(t), r, task.begin, task.end, task.y.row(t));
    }
  }

  // R rows of w times their values of a single row of s, added to y. The rows are read in the order of memory: a block of
  // columns that goes down all rows would wait for each of its cache lines, which no prefetcher foresees.
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
      for (int k = 0; k < R; ++k) sum = X::fma(factors[k][sub], X::load_uint8(from[k] + i * kLanes), sum);
      X::store(y + c + i * kLanes, sum);
    }
  }

  static void add(const QuantizedMatrix& w, Rows<const float> s, const Task& task) {
    with_planes(w.bits, [&](auto planes) { columns<planes.low, planes.high>(w, s, task); });
  }

  template <Type Element, int Vectors>
  static void dense_block(const DenseMatrix& w, const float* s, std::size_t c, float* y) {
    constexpr std::size_t kSize = element_size(Element);
    F sums[Vectors];
    for (int i = 0; i < Vectors; ++i) sums[i] = X::load(y + c + static_cast<std::size_t>(i) * kLanes);
    const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + c * kSize;
    for (std::size_t r = 0; r < w.rows; ++r, from += w.columns * kSize) {
      const F factor = X::broadcast(s[r]);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i)
        sums[i] = X::fma(factor, load_as<X, Element>(from + static_cast<std::size_t>(i) * kLanes * kSize),
                         sums[i]);
    }
    for (int i = 0; i < Vectors; ++i) X::store(y + c + static_cast<std::size_t>(i) * kLanes, sums[i]);
  }

  template <Type Element>
  static void dense_columns(const DenseMatrix& w, Rows<const float> s, const Task& task) {
    constexpr std::size_t kSize = element_size(Element);
    for (std::size_t t = task.first; t < task.first + task.count; ++t) {
      const float* factors = s.row(t);
      float* y = task.y.row(t);
      std::size_t c = task.begin;
      for (; c + 8 * kLanes <= task.end; c += 8 * kLanes) dense_block<Element, 8>(w, factors, c, y);
      for (; c + kLanes <= task.end; c += kLanes) dense_block<Element, 1>(w, factors, c, y);
      for (; c < task.end; ++c) {
        const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + c * kSize;
        for (std::size_t r = 0; r < w.rows; ++r)
          y[c] += factors[r] * one_as<X, Element>(from + r * w.columns * kSize);
      }
    }
  }

  static void add_dense(const DenseMatrix& w, Rows<const float> s, const Task& task) {
    with_float_type(w.type, [&](auto type) { dense_columns<type.value>(w, s, task); });
  }
};

// The table of an instruction set.
template <class X>
constexpr FloatKernels make_float_kernels() {
  return {FloatBody<X>::multiply_exact, FloatBody<X>::multiply_dense, TransposedBody<X>::add,
          TransposedBody<X>::add_dense};
}

}  // namespace
}  // namespace mpo
