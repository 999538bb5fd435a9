// The products in float32 arithmetic, written once over the vectors X of an instruction set. Included after the target is
// set (see target.hpp).
#pragma once

#include "kernels/kernels.hpp"
#include "vectors/elements.hpp"

namespace mpo {
namespace {

template <class X>
struct FloatBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;

  // -- quantised weights times rows of x

  template <int T>
  struct Count {
    static constexpr int value = T;
  };

  // Adds the products of a run of columns that share a scale, as scale * (q - zero), with T rows of x.
  template <int T>
  static MPO_INLINE void add_group(const std::uint8_t* codes, std::size_t columns, F scale, F zero, const float* x,
                                   std::size_t step, F* sums) {
    F parts[2 * T];
    for (F& part : parts) part = X::zero();
    for (std::size_t i = 0; i < columns; i += 2 * kLanes) {
      const F even = X::subtract(X::load_uint8(codes + i), zero), odd = X::subtract(X::load_uint8(codes + i + kLanes), zero);
      for (int t = 0; t < T; ++t) {
        const float* from = x + static_cast<std::size_t>(t) * step + i;
        parts[2 * t] = X::fma(even, X::load(from), parts[2 * t]);
        parts[2 * t + 1] = X::fma(odd, X::load(from + kLanes), parts[2 * t + 1]);
      }
    }
    for (int i = 0; i < 2 * T; ++i) sums[i] = X::fma(scale, parts[i], sums[i]);
  }

  // Results of row r of w with the rows of x from `first` on.
  template <std::size_t T>
  static MPO_INLINE void put(const F* sums, const float* rest, const Task& task, std::size_t first, std::size_t r) {
    for (std::size_t t = 0; t < T; ++t)
      task.put(first + t, r, X::total(X::add(sums[2 * t], sums[2 * t + 1])) + rest[t]);
  }

  // Calls row(rows of x at once, the first of them, row of w) for all of the task.
  template <int T, class Row>
  static MPO_INLINE void for_rows(const Task& task, Row row) {
    const std::size_t stop = task.first + task.count;
    for (std::size_t r = task.begin; r < task.end; ++r) {
      std::size_t t = task.first;
      for (; t + T <= stop; t += T) row(Count<T>{}, t, r);
      for (; t < stop; ++t) row(Count<1>{}, t, r);
    }
  }

  template <int Low, int High, int T>
  static void exact_row(const QuantizedMatrix& w, Rows<const float> x, const Task& task, std::size_t first,
                        std::size_t r) {
    F sums[2 * T];
    const float rest[T] = {};
    for (F& sum : sums) sum = X::zero();
    std::uint8_t codes[kChunk];
    for (std::size_t c = 0; c < w.columns; c += kChunk) {
      const std::size_t columns = w.columns - c < kChunk ? w.columns - c : kChunk, at = r * w.columns + c;
      const std::uint8_t* low = w.low + at / 8 * Low;
      const std::uint8_t* from = codes;
      if constexpr (Low == 8) from = low;
      else X::template spread<Low, High>(low, High ? w.high + at / 8 * High : nullptr, columns, codes);
      for (std::size_t done = 0; done < columns;) {
        const std::size_t group = (at + done) / w.group;
        const std::size_t size = w.group < columns - done ? w.group : columns - done;
        const F scale = X::broadcast(X::half(w.scale + group));
        const F zero = X::broadcast(w.zero ? X::half(w.zero + group) : implicit_zero(Low + High));
        add_group<T>(from + done, size, scale, zero, x.row(first) + c + done, x.stride, sums);
        done += size;
      }
    }
    put<T>(sums, rest, task, first, r);
  }

  static void multiply_exact(const QuantizedMatrix& w, Rows<const float> x, const Task& task) {
    with_planes(w.bits, [&](auto planes) {
      for_rows<4>(task, [&](auto count, std::size_t first, std::size_t r) {
        exact_row<planes.low, planes.high, count.value>(w, x, task, first, r);
      });
    });
  }

  // -- float weights times rows of x

  template <Type Element, int T>
  static void dense_row(const DenseMatrix& w, Rows<const float> x, const Task& task, std::size_t first,
                        std::size_t r) {
    constexpr std::size_t kSize = element_size(Element), kUnroll = 4;
    const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + r * w.columns * kSize;
    const float* inputs = x.row(first);
    F sums[kUnroll * T];
    float rest[T] = {};
    for (F& sum : sums) sum = X::zero();
    std::size_t c = 0;
    for (; c + kUnroll * kLanes <= w.columns; c += kUnroll * kLanes) {
      X::prefetch(from + c * kSize);
#pragma GCC unroll 4
      for (std::size_t u = 0; u < kUnroll; ++u) {
        const F value = load_as<X, Element>(from + (c + u * kLanes) * kSize);
        for (std::size_t t = 0; t < T; ++t) {
          F& sum = sums[t * kUnroll + u];
          sum = X::fma(value, X::load(inputs + t * x.stride + c + u * kLanes), sum);
        }
      }
    }
    for (; c < w.columns; ++c)
      for (std::size_t t = 0; t < T; ++t) rest[t] += one_as<X, Element>(from + c * kSize) * inputs[t * x.stride + c];
    F pairs[2 * T];  // the same sums in the same order for every T
    for (std::size_t t = 0; t < T; ++t)
      for (std::size_t i = 0; i < 2; ++i) pairs[2 * t + i] = X::add(sums[t * kUnroll + i], sums[t * kUnroll + 2 + i]);
    put<T>(pairs, rest, task, first, r);
  }

  static void multiply_dense(const DenseMatrix& w, Rows<const float> x, const Task& task) {
    with_float_type(w.type, [&](auto type) {
      for_rows<2>(task, [&](auto count, std::size_t first, std::size_t r) {  // as many sums as there are registers
        dense_row<type.value, count.value>(w, x, task, first, r);
      });
    });
  }
};

}  // namespace
}  // namespace mpo
