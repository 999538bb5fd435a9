// Elements of any stored type as float32, by the vectors X of an instruction set. Included after the target is set (see
// target.hpp).
#pragma once

#include "half.hpp"
#include "weights.hpp"

namespace mpo {
namespace {

// X::kLanes elements, or one, from any address; those of int8 are times `scale`.
template <class X, Type Element>
MPO_INLINE typename X::Floats load_as(const std::uint8_t* from, float scale = 1.0f) {
  if constexpr (Element == Type::f32) return X::load_unaligned(from);
  else if constexpr (Element == Type::f16) return X::load_halves(from);
  else if constexpr (Element == Type::bf16) return X::load_bf16(from);
  else return X::multiply(X::load_int8(from), X::broadcast(scale));
}

template <class X, Type Element>
MPO_INLINE float one_as(const std::uint8_t* from, float scale = 1.0f) {
  if constexpr (Element == Type::int8) {
    return scale * static_cast<float>(static_cast<std::int8_t>(*from));
  } else if constexpr (Element == Type::f16) {
    return X::half(from);
  } else {
    std::uint32_t bits = 0;
    std::memcpy(&bits, from, element_size(Element));
    if constexpr (Element == Type::bf16) bits <<= 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
}

}  // namespace
}  // namespace mpo
