// Packed codes to one byte each, in the order of the columns, with plain 64-bit arithmetic that compilers vectorise.
// Included after the target is set (see target.hpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mpo {
namespace {

// 8 codes of `Bits` bits, packed in the low bits of `packed`, to one code per byte: each step halves the fields' width
// and doubles their distance.
template <int Bits>
inline std::uint64_t spread_eight(std::uint64_t packed) {
  if constexpr (Bits == 8) return packed;
  packed = (packed | (packed << (32 - 4 * Bits))) & (0x0000000100000001u * ((1ull << (4 * Bits)) - 1));
  packed = (packed | (packed << (16 - 2 * Bits))) & (0x0001000100010001u * ((1ull << (2 * Bits)) - 1));
  packed = (packed | (packed << (8 - Bits))) & (0x0101010101010101u * ((1ull << Bits) - 1));
  return packed;
}

// `count` codes, a multiple of 8, of a Low-bit plane with those of a High-bit plane (0: none) above them.
template <int Low, int High>
inline void spread(const std::uint8_t* low, const std::uint8_t* high, std::size_t count, std::uint8_t* codes) {
  for (std::size_t i = 0; i < count / 8; ++i) {
    std::uint64_t packed = 0;
    std::memcpy(&packed, low + i * Low, Low);  // 8 codes of p bits are p bytes
    std::uint64_t code = spread_eight<Low>(packed);
    if constexpr (High > 0) {
      packed = 0;
      std::memcpy(&packed, high + i * High, High);
      code |= spread_eight<High>(packed) << Low;
    }
    std::memcpy(codes + i * 8, &code, 8);
  }
}

}  // namespace
}  // namespace mpo
