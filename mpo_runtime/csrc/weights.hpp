// Weight matrices where they lie in a memory-mapped file, and the lists of what such a matrix can be: bit widths, group
// sizes, element types. Nothing here owns memory; pointers may be unaligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "target.hpp"

namespace mpo {

// -- bit widths

// A code of `bits` is stored in one or two planes: its low bits, and those above (0: there is no such plane).
struct Width {
  int bits, low, high;
};
constexpr Width kWidths[] = {{8, 8, 0}, {6, 4, 2}, {5, 4, 1}, {4, 4, 0}, {3, 2, 1}, {2, 2, 0}};

// Throws std::invalid_argument, naming `where`, for a width that is not in the list.
const Width& width_of(const char* where, int bits);

template <int Low, int High>
struct Planes {
  static constexpr int low = Low, high = High;
};

template <class Function, std::size_t... I>
MPO_INLINE bool call_with_planes(int bits, Function& function, std::index_sequence<I...>) {
  return ((bits == kWidths[I].bits && (function(Planes<kWidths[I].low, kWidths[I].high>{}), true)) || ...);
}

// Calls function(Planes<low, high>{}) for a matrix of so many bits: the one place where a width becomes template
// arguments. Throws std::invalid_argument for a width that is not in the list.
template <class Function>
MPO_INLINE void with_planes(int bits, Function function) {
  if (!call_with_planes(bits, function, std::make_index_sequence<std::size(kWidths)>{})) width_of("kernel", bits);
}

// -- group sizes

constexpr int kGroups[] = {16, 32, 64, 128, 256};

bool is_group(std::size_t group);
std::string group_names();  // "16, 32, 64, 128 or 256"
// Throws std::invalid_argument, naming `where`, for a size that is not in the list.
void expect_group(const char* where, std::size_t group);

template <int Group>
struct GroupSize {
  static constexpr int value = Group;
};

template <class Function, std::size_t... I>
MPO_INLINE bool call_with_group(std::size_t group, Function& function, std::index_sequence<I...>) {
  return ((group == kGroups[I] && (function(GroupSize<kGroups[I]>{}), true)) || ...);
}

// Calls function(GroupSize<group>{}); throws std::invalid_argument for a size that is not in the list.
template <class Function>
MPO_INLINE void with_group(std::size_t group, Function function) {
  if (!call_with_group(group, function, std::make_index_sequence<std::size(kGroups)>{})) expect_group("kernel", group);
}

// -- element types

enum class Type { f32, f16, bf16, int8 };  // int8 only in the KV cache, with a scale for each vector

constexpr std::size_t element_size(Type type) { return type == Type::f32 ? 4 : type == Type::int8 ? 1 : 2; }
std::optional<Type> type_named(const std::string& name);

template <Type Value>
struct FloatType {
  static constexpr Type value = Value;
};

// Throws std::invalid_argument, naming `where`, for int8.
void expect_float_type(const char* where, Type type);

// Calls function(FloatType<type>{}); throws std::invalid_argument for int8.
template <class Function>
MPO_INLINE void with_float_type(Type type, Function function) {
  switch (type) {
    case Type::f32: return function(FloatType<Type::f32>{});
    case Type::f16: return function(FloatType<Type::f16>{});
    case Type::bf16: return function(FloatType<Type::bf16>{});
    case Type::int8: break;
  }
  expect_float_type("kernel", type);
}

// -- matrices

// SPEC.md, section 5: w[r, c] = scale[r, c / group] * (q[r, c] - zero[r, c / group]).
struct QuantizedMatrix {
  int bits;                    // one of kWidths
  std::size_t rows, columns;   // group divides columns
  std::size_t group;           // one of kGroups
  const std::uint8_t* low;     // the plane of the low bits, [rows, columns * p / 8]
  const std::uint8_t* high;    // the plane of the bits above, or null
  const std::uint16_t* scale;  // f16 [rows, columns / group]
  const std::uint16_t* zero;   // f16 [rows, columns / group], or null: implicit_zero(bits)
};

struct DenseMatrix {
  Type type;  // f32, f16 or bf16
  std::size_t rows, columns;
  const void* data;
};

// The zero of groups that store none: at 2 bits the four levels are symmetric.
constexpr float implicit_zero(int bits) { return bits == 2 ? 1.5f : static_cast<float>(1 << (bits - 1)); }

// Rows of floats in memory, `stride` floats apart.
template <class T>
struct Rows {
  T* data;
  std::size_t stride;

  MPO_INLINE T* row(std::size_t r) const { return data + r * stride; }
  MPO_INLINE Rows from(std::size_t r) const { return {row(r), stride}; }  // without the rows before r
};

}  // namespace mpo
