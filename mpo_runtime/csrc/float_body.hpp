// The products with float32 arithmetic, written once over the vector operations X of a level. Included once by the
// source of every level.
#pragma once

#include "kernels.hpp"
#include "spread.hpp"

namespace mpo {
namespace {

template <class X>
struct FloatBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;

  // -- quantised weights times rows of x

  // Adds the products of a run of columns that share a scale, as scale * (q - zero), with T rows of x.
  template <int T>
  static MPO_INLINE void add_group(const std::uint8_t* codes, std::size_t columns, F scale, F zero, const float* x,
                                   std::size_t step, F* sums) {
    F parts[2 * T];
    for (F& part : parts) part = X::nothing();
    for (std::size_t i = 0; i < columns; i += 2 * kLanes) {
      const F even = X::subtract(X::widen(codes + i), zero), odd = X::subtract(X::widen(codes + i + kLanes), zero);
      for (int t = 0; t < T; ++t) {
        const float* from = x + static_cast<std::size_t>(t) * step + i;
        parts[2 * t] = X::fma(even, X::load(from), parts[2 * t]);
        parts[2 * t + 1] = X::fma(odd, X::load(from + kLanes), parts[2 * t + 1]);
      }
    }
    for (int i = 0; i < 2 * T; ++i) sums[i] = X::fma(scale, parts[i], sums[i]);
  }

  template <int T>
  static MPO_INLINE void put(const F* sums, const float* rest, float* y, std::size_t stride, bool accumulate) {
    for (int t = 0; t < T; ++t) {
      const float value = X::total(X::add(sums[2 * t], sums[2 * t + 1])) + rest[t];
      float* place = y + static_cast<std::size_t>(t) * stride;
      *place = accumulate ? *place + value : value;
    }
  }

  template <int Low, int High, int T>
  static void exact_row(const QuantizedMatrix& w, const float* x, std::size_t r, float* y, std::size_t stride,
                        bool accumulate) {
    F sums[2 * T];
    const float rest[T] = {};
    for (F& sum : sums) sum = X::nothing();
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
        add_group<T>(from + done, size, scale, zero, x + c + done, w.columns, sums);
        done += size;
      }
    }
    put<T>(sums, rest, y + r, stride, accumulate);
  }

  template <int Low, int High>
  static void exact_rows(const QuantizedMatrix& w, const float* x, std::size_t batch, std::size_t begin,
                         std::size_t end, float* y, std::size_t stride, bool accumulate) {
    for (std::size_t r = begin; r < end; ++r) {
      std::size_t t = 0;
      for (; t + 4 <= batch; t += 4)
        exact_row<Low, High, 4>(w, x + t * w.columns, r, y + t * stride, stride, accumulate);
      for (; t < batch; ++t) exact_row<Low, High, 1>(w, x + t * w.columns, r, y + t * stride, stride, accumulate);
    }
  }

  static void multiply_exact(const QuantizedMatrix& w, const float* x, std::size_t batch, std::size_t begin,
                             std::size_t end, float* y, std::size_t stride, bool accumulate) {
    switch (w.bits) {
      case 8: return exact_rows<8, 0>(w, x, batch, begin, end, y, stride, accumulate);
      case 6: return exact_rows<4, 2>(w, x, batch, begin, end, y, stride, accumulate);
      case 5: return exact_rows<4, 1>(w, x, batch, begin, end, y, stride, accumulate);
      case 4: return exact_rows<4, 0>(w, x, batch, begin, end, y, stride, accumulate);
      case 3: return exact_rows<2, 1>(w, x, batch, begin, end, y, stride, accumulate);
      default: return exact_rows<2, 0>(w, x, batch, begin, end, y, stride, accumulate);
    }
  }

  // -- float weights times rows of x

  static constexpr std::size_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

  template <Float Type>
  static MPO_INLINE F load_as(const std::uint8_t* from) {
    if constexpr (Type == Float::f32) return X::load_unaligned(from);
    else if constexpr (Type == Float::f16) return X::load_halves(from);
    else return X::load_bf16(from);
  }

  template <Float Type>
  static MPO_INLINE float one_as(const std::uint8_t* from) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, from, size_of(Type));
    if constexpr (Type == Float::f16) {
      const auto half = static_cast<std::uint16_t>(bits);
      return X::half(&half);
    }
    if constexpr (Type == Float::bf16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  template <Float Type, int T>
  static void dense_row(const DenseMatrix& w, const float* x, std::size_t r, float* y, std::size_t stride,
                        bool accumulate) {
    constexpr std::size_t kSize = size_of(Type), kUnroll = T == 1 ? 4 : 2;
    const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + r * w.columns * kSize;
    F sums[kUnroll * T];
    float rest[T] = {};
    for (F& sum : sums) sum = X::nothing();
    std::size_t c = 0;
    for (; c + kUnroll * kLanes <= w.columns; c += kUnroll * kLanes) {
      X::prefetch(from + c * kSize);
#pragma GCC unroll 4
      for (std::size_t u = 0; u < kUnroll; ++u) {
        const F value = load_as<Type>(from + (c + u * kLanes) * kSize);
        for (int t = 0; t < T; ++t) {
          F& sum = sums[static_cast<std::size_t>(t) * kUnroll + u];
          sum = X::fma(value, X::load(x + static_cast<std::size_t>(t) * w.columns + c + u * kLanes), sum);
        }
      }
    }
    for (; c < w.columns; ++c)
      for (int t = 0; t < T; ++t)
        rest[t] += one_as<Type>(from + c * kSize) * x[static_cast<std::size_t>(t) * w.columns + c];
    if constexpr (T == 1) {
      sums[0] = X::add(sums[0], sums[2]);
      sums[1] = X::add(sums[1], sums[3]);
    }
    put<T>(sums, rest, y + r, stride, accumulate);
  }

  template <Float Type>
  static void dense_rows(const DenseMatrix& w, const float* x, std::size_t batch, std::size_t begin, std::size_t end,
                         float* y, std::size_t stride, bool accumulate) {
    for (std::size_t r = begin; r < end; ++r) {
      std::size_t t = 0;
      for (; t + 4 <= batch; t += 4) dense_row<Type, 4>(w, x + t * w.columns, r, y + t * stride, stride, accumulate);
      for (; t < batch; ++t) dense_row<Type, 1>(w, x + t * w.columns, r, y + t * stride, stride, accumulate);
    }
  }

  static void multiply_dense(const DenseMatrix& w, const float* x, std::size_t batch, std::size_t begin,
                             std::size_t end, float* y, std::size_t stride, bool accumulate) {
    switch (w.type) {
      case Float::f32: return dense_rows<Float::f32>(w, x, batch, begin, end, y, stride, accumulate);
      case Float::f16: return dense_rows<Float::f16>(w, x, batch, begin, end, y, stride, accumulate);
      default: return dense_rows<Float::bf16>(w, x, batch, begin, end, y, stride, accumulate);
    }
  }
};

}  // namespace
}  // namespace mpo
