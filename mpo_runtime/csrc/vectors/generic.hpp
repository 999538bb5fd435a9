// "Vectors" of four floats as plain loops, which compilers turn into whatever the baseline has. The same operations, with
// the same meaning, are what kernels/*_body.hpp and ops/*_body.hpp ask of every instruction set; they are described here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "target.hpp"
#include "vectors/spread.hpp"

namespace mpo {
namespace {

struct GenericFloats {
  struct Floats {
    float f[4];
  };
  static constexpr std::size_t kLanes = 4;

  template <class Function>
  static MPO_INLINE Floats map(Function function) {
    Floats out;
    for (int i = 0; i < 4; ++i) out.f[i] = function(i);
    return out;
  }

  static MPO_INLINE void prefetch(const void*) {}  // memory that a loop reads soon

  static MPO_INLINE Floats zero() { return Floats{}; }
  static MPO_INLINE Floats broadcast(float value) { return {{value, value, value, value}}; }

  // -- memory; only load() and store() need the alignment of a float

  static MPO_INLINE Floats load(const float* from) { return load_unaligned(from); }
  static MPO_INLINE Floats load_unaligned(const void* from) {
    Floats out;
    std::memcpy(out.f, from, sizeof out.f);
    return out;
  }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) {  // binary16
    std::uint16_t in[4];
    std::memcpy(in, from, sizeof in);
    return map([&](int i) { return half_to_float(in[i]); });
  }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    std::uint16_t in[4];
    std::memcpy(in, from, sizeof in);
    std::uint32_t bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = static_cast<std::uint32_t>(in[i]) << 16;
    return load_unaligned(bits);
  }
  static MPO_INLINE Floats load_uint8(const std::uint8_t* from) {
    Floats out;
    for (int i = 0; i < 4; ++i) out.f[i] = static_cast<float>(static_cast<int>(from[i]));
    return out;
  }
  static MPO_INLINE Floats load_int8(const std::uint8_t* from) {
    return map([&](int i) { return static_cast<float>(static_cast<std::int8_t>(from[i])); });
  }
  static MPO_INLINE void store(float* to, const Floats& value) { std::memcpy(to, value.f, sizeof value.f); }
  static MPO_INLINE void store_halves(std::uint8_t* to, const Floats& value) {  // rounded to nearest, ties to even
    std::uint16_t out[4];
    for (int i = 0; i < 4; ++i) out[i] = float_to_half(value.f[i]);
    std::memcpy(to, out, sizeof out);
  }
  static MPO_INLINE float half(const void* from) {
    std::uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return half_to_float(bits);
  }
  // `count` codes, a multiple of 8, of a Low-bit plane with those of a High-bit plane (0: none) above them, a byte each.
  template <int Low, int High>
  static MPO_INLINE void spread(const std::uint8_t* low, const std::uint8_t* high, std::size_t count,
                                std::uint8_t* codes) {
    mpo::spread<Low, High>(low, high, count, codes);
  }

  // -- arithmetic

  static MPO_INLINE Floats add(const Floats& a, const Floats& b) {
    return map([&](int i) { return a.f[i] + b.f[i]; });
  }
  static MPO_INLINE Floats subtract(const Floats& a, const Floats& b) {
    return map([&](int i) { return a.f[i] - b.f[i]; });
  }
  static MPO_INLINE Floats multiply(const Floats& a, const Floats& b) {
    return map([&](int i) { return a.f[i] * b.f[i]; });
  }
  static MPO_INLINE Floats divide(const Floats& a, const Floats& b) {
    return map([&](int i) { return a.f[i] / b.f[i]; });
  }
  static MPO_INLINE Floats fma(const Floats& a, const Floats& b, const Floats& c) {  // a * b + c, rounded once or twice
    Floats out = c;  // a plain loop here and in load_uint8(): gcc 12 makes better code of it than of map()
    for (int i = 0; i < 4; ++i) out.f[i] += a.f[i] * b.f[i];
    return out;
  }
  // The smaller or larger of x and a bound that is a number; where x is not a number it stays.
  static MPO_INLINE Floats smaller(const Floats& x, const Floats& bound) {
    return map([&](int i) { return bound.f[i] < x.f[i] ? bound.f[i] : x.f[i]; });
  }
  static MPO_INLINE Floats larger(const Floats& x, const Floats& bound) {
    return map([&](int i) { return bound.f[i] > x.f[i] ? bound.f[i] : x.f[i]; });
  }
  static MPO_INLINE Floats round(const Floats& x) {  // to nearest even, for |x| < 2^22
    return map([&](int i) { return x.f[i] + 12582912.0f - 12582912.0f; });
  }
  static MPO_INLINE Floats scale_by_power(const Floats& value, const Floats& n) {  // value * 2^n, whole n in -126 ... 127
    return map([&](int i) {
      const float shifted = n.f[i] + 12582912.0f;  // n in the low bits
      std::uint32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      bits = (bits + 127u) << 23;
      float power;
      std::memcpy(&power, &bits, sizeof power);
      return value.f[i] * power;
    });
  }
  static MPO_INLINE Floats zero_below(const Floats& x, const Floats& bound, const Floats& value) {  // x < bound ? 0 : value
    return map([&](int i) { return x.f[i] < bound.f[i] ? 0.0f : value.f[i]; });
  }
  static MPO_INLINE Floats select_below(const Floats& x, const Floats& bound, const Floats& a, const Floats& b) {
    return map([&](int i) { return x.f[i] < bound.f[i] ? a.f[i] : b.f[i]; });
  }
  static MPO_INLINE float total(const Floats& a) { return (a.f[0] + a.f[1]) + (a.f[2] + a.f[3]); }
  static MPO_INLINE float largest(const Floats& a) {
    const float left = a.f[0] > a.f[1] ? a.f[0] : a.f[1], right = a.f[2] > a.f[3] ? a.f[2] : a.f[3];
    return left > right ? left : right;
  }
};

}  // namespace
}  // namespace mpo
