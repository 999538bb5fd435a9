// Weight matrices where they lie in a memory-mapped file. Nothing here owns memory; pointers may be unaligned.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mpo {

// SPEC.md, section 5: w[r, c] = scale[r, c / group] * (q[r, c] - zero[r, c / group]).
struct QuantizedMatrix {
  int bits;                    // 8, 6, 5, 4, 3 or 2
  std::size_t rows, columns;   // group divides columns
  std::size_t group;           // 16, 32, 64, 128 or 256
  const std::uint8_t* low;     // plane of the low 8, 4 or 2 bits, [rows, columns * p / 8]
  const std::uint8_t* high;    // plane of the bits above (6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1), or null
  const std::uint16_t* scale;  // f16 [rows, columns / group]
  const std::uint16_t* zero;   // f16 [rows, columns / group], or null: implicit_zero(bits)
};

enum class Float { f32, f16, bf16 };

struct DenseMatrix {
  Float type;
  std::size_t rows, columns;
  const void* data;
};

// The zero of groups that store none: at 2 bits the four levels are symmetric.
constexpr float implicit_zero(int bits) { return bits == 2 ? 1.5f : static_cast<float>(1 << (bits - 1)); }

// The planes of a width: bits of the low one and of the high one (0: there is none).
inline int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }
inline int high_bits(int bits) { return bits - low_bits(bits); }

inline std::size_t element_size(Float type) { return type == Float::f32 ? 4 : 2; }

}  // namespace mpo
