// The level that every CPU runs: plain loops that compilers turn into vectors of their baseline.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "kernels.hpp"

#include "activations_body.hpp"
#include "float_body.hpp"
#include "transposed_body.hpp"

// A failed build is not an error: the package then installs without native kernels.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "these kernels read packed fields as little-endian words"
#endif

namespace mpo {
namespace {

struct Generic {
  struct Floats {
    float f[4];
  };
  static constexpr std::size_t kLanes = 4;
  static void prefetch(const void*) {}

  static MPO_INLINE Floats nothing() { return Floats{}; }
  static MPO_INLINE Floats broadcast(float value) { return {{value, value, value, value}}; }
  static MPO_INLINE Floats load(const float* from) { return load_unaligned(from); }
  static MPO_INLINE Floats load_unaligned(const void* from) {
    Floats out;
    std::memcpy(out.f, from, sizeof out.f);
    return out;
  }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) {
    Floats out;
    for (int i = 0; i < 4; ++i) out.f[i] = half(from + 2 * i);
    return out;
  }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    std::uint16_t in[4];
    std::memcpy(in, from, sizeof in);
    std::uint32_t bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = static_cast<std::uint32_t>(in[i]) << 16;
    return load_unaligned(bits);
  }
  static MPO_INLINE Floats widen(const std::uint8_t* from) {
    Floats out;
    for (int i = 0; i < 4; ++i) out.f[i] = static_cast<float>(static_cast<int>(from[i]));
    return out;
  }
  static MPO_INLINE void store(float* to, const Floats& value) { std::memcpy(to, value.f, sizeof value.f); }
  static MPO_INLINE Floats fma(const Floats& a, const Floats& b, Floats c) {
    for (int i = 0; i < 4; ++i) c.f[i] += a.f[i] * b.f[i];
    return c;
  }
  static MPO_INLINE Floats multiply(const Floats& a, Floats b) {
    for (int i = 0; i < 4; ++i) b.f[i] *= a.f[i];
    return b;
  }
  static MPO_INLINE Floats add(const Floats& a, Floats b) {
    for (int i = 0; i < 4; ++i) b.f[i] += a.f[i];
    return b;
  }
  static MPO_INLINE Floats subtract(Floats a, const Floats& b) {
    for (int i = 0; i < 4; ++i) a.f[i] -= b.f[i];
    return a;
  }
  static MPO_INLINE float total(const Floats& a) { return (a.f[0] + a.f[1]) + (a.f[2] + a.f[3]); }
  static MPO_INLINE float half(const void* from) {
    std::uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return half_to_float(bits);
  }
  template <int Low, int High>
  static MPO_INLINE void spread(const std::uint8_t* low, const std::uint8_t* high, std::size_t columns,
                                std::uint8_t* codes) {
    mpo::spread<Low, High>(low, high, columns, codes);
  }
};

constexpr std::size_t kTile = 4;  // rows of x for which a row of w is unpacked once

// One row of w with `count` (at most kTile) rows of x, whose codes are in the order of the columns.
template <int Low, int High>
void multiply_row(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
                  std::size_t r, float* y, std::size_t stride, bool accumulate) {
  constexpr std::size_t kHalf = 16;  // the smallest group
  constexpr int kMiddle = 1 << (Low + High - 1);
  float sums[kTile] = {};
  std::uint8_t codes[kChunk];
  for (std::size_t c = 0; c < w.columns; c += kChunk) {
    const std::size_t at = r * w.columns + c, columns = w.columns - c < kChunk ? w.columns - c : kChunk;
    spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, columns, codes);
    for (std::size_t i = 0; i < columns; i += kHalf) {
      const std::size_t group = (at + i) / w.group;
      const float scale = Generic::half(w.scale + group);
      const float zero = w.zero ? Generic::half(w.zero + group) - kMiddle : implicit_zero(Low + High) - kMiddle;
      for (std::size_t t = 0; t < count; ++t) {
        const std::int8_t* from = x.codes[0] + (first + t) * x.padded + c + i;
        std::int32_t dot = 0, sum = 0;
        for (std::size_t j = 0; j < kHalf; ++j) {
          dot += static_cast<std::int16_t>(codes[i + j] - kMiddle) * static_cast<std::int16_t>(from[j]);
          sum += from[j];
        }
        const float factor = scale * x.scales[(first + t) * x.padded / kScaleBlock + (c + i) / kScaleBlock];
        sums[t] += factor * (static_cast<float>(dot) - zero * static_cast<float>(sum));
      }
    }
  }
  for (std::size_t t = 0; t < count; ++t) {
    float* place = y + (first + t) * stride + r;
    *place = accumulate ? *place + sums[t] : sums[t];
  }
}

template <int Low, int High>
void multiply_rows(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
                   std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
  for (std::size_t r = begin; r < end; ++r)
    for (std::size_t t = 0; t < count; t += kTile)
      multiply_row<Low, High>(w, x, first + t, count - t < kTile ? count - t : kTile, r, y, stride, accumulate);
}

void multiply(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
              std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
  switch (w.bits) {
    case 8: return multiply_rows<8, 0>(w, x, first, count, begin, end, y, stride, accumulate);
    case 6: return multiply_rows<4, 2>(w, x, first, count, begin, end, y, stride, accumulate);
    case 5: return multiply_rows<4, 1>(w, x, first, count, begin, end, y, stride, accumulate);
    case 4: return multiply_rows<4, 0>(w, x, first, count, begin, end, y, stride, accumulate);
    case 3: return multiply_rows<2, 1>(w, x, first, count, begin, end, y, stride, accumulate);
    default: return multiply_rows<2, 0>(w, x, first, count, begin, end, y, stride, accumulate);
  }
}

}  // namespace

const Kernels kGenericKernels = {
    {{16, 16, 16, 16}, false, false, false},
    ActivationsBody<PlainRows>::arrange,
    multiply,
    FloatBody<Generic>::multiply_exact,
    FloatBody<Generic>::multiply_dense,
    TransposedBody<Generic>::add,
    TransposedBody<Generic>::add_dense,
};

}  // namespace mpo
