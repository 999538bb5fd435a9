// x86 intrinsics on any CPU, for tests: AVX2 and AVX-512 from SIMDe, AMX tiles as plain loops.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  std::uint8_t bytes[16][64];
};
inline Tile tiles[8];
inline std::uint16_t widths[8];
inline std::uint8_t heights[8];
inline bool configured = false;

inline void require(bool holds) {
  if (!holds) std::abort();  // what a CPU answers with a fault
}

inline void load_config(const void* from) {
  const auto* bytes = static_cast<const std::uint8_t*>(from);
  require(bytes[0] == 1 && bytes[1] == 0);
  std::memcpy(widths, bytes + 16, sizeof widths);
  std::memcpy(heights, bytes + 48, sizeof heights);
  for (int i = 0; i < 8; ++i) require(widths[i] <= 64 && heights[i] <= 16);
  std::memset(tiles, 0, sizeof tiles);
  configured = true;
}

inline void load(int tile, const void* from, std::size_t stride) {
  require(configured);
  std::memset(&tiles[tile], 0, sizeof tiles[tile]);
  for (int r = 0; r < heights[tile]; ++r)
    std::memcpy(tiles[tile].bytes[r], static_cast<const std::uint8_t*>(from) + r * stride, widths[tile]);
}

inline void store(int tile, void* to, std::size_t stride) {
  require(configured);
  for (int r = 0; r < heights[tile]; ++r)
    std::memcpy(static_cast<std::uint8_t*>(to) + r * stride, tiles[tile].bytes[r], widths[tile]);
}

// Intel's TDPBF16PS: bf16 numbers of `a` times those of `b`, two by two.
inline void multiply(int out, int a, int b) {
  require(configured && heights[out] == heights[a] && widths[out] == widths[b] && widths[a] / 4 == heights[b]);
  const auto value = [](const std::uint8_t* from) {
    std::uint16_t half;
    std::memcpy(&half, from, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  };
  for (int m = 0; m < heights[out]; ++m)
    for (int n = 0; n < widths[out] / 4; ++n) {
      float sum;
      std::memcpy(&sum, &tiles[out].bytes[m][4 * n], 4);
      for (int k = 0; k < widths[a] / 4; ++k)
        for (int i = 0; i < 2; ++i)
          sum += value(&tiles[a].bytes[m][4 * k + 2 * i]) * value(&tiles[b].bytes[k][4 * n + 2 * i]);
      std::memcpy(&tiles[out].bytes[m][4 * n], &sum, 4);
    }
}

}  // namespace emulated

// Some compilers' own are macros; SIMDe includes them.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_release() (emulated::configured = false)
#define _tile_zero(tile) std::memset(&emulated::tiles[tile], 0, sizeof emulated::tiles[tile])
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(out, a, b) emulated::multiply(out, a, b)

// Missing in SIMDe 0.7, and an alias of it that takes the arguments of another function.
namespace emulated {

inline __m512 to_float(__m512i in) {
  std::int32_t from[16];
  float to[16];
  std::memcpy(from, &in, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(from[i]);
  return _mm512_loadu_ps(to);
}

inline __m512 widened(__m256i in) {
  __m128i halves[2];
  float to[16];
  std::memcpy(halves, &in, sizeof halves);
  for (int i = 0; i < 2; ++i) _mm256_storeu_ps(to + 8 * i, _mm256_cvtph_ps(halves[i]));
  return _mm512_loadu_ps(to);
}

inline __m256i narrowed(__m512 in) {
  float from[16];
  __m128i halves[2];
  _mm512_storeu_ps(from, in);
  for (int i = 0; i < 2; ++i) halves[i] = _mm256_cvtps_ph(_mm256_loadu_ps(from + 8 * i), _MM_FROUND_TO_NEAREST_INT);
  __m256i out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}

// The 64 / sizeof(To) lanes of `in`, each of type From, as lanes of type To.
template <class From, class To, class Vector>
inline __m512i widened_lanes(Vector in) {
  constexpr std::size_t count = 64 / sizeof(To);
  static_assert(sizeof in == count * sizeof(From));
  From from[count];
  To to[count];
  std::memcpy(from, &in, sizeof from);
  for (std::size_t i = 0; i < count; ++i) to[i] = from[i];
  __m512i out;
  std::memcpy(&out, to, sizeof out);
  return out;
}

inline __m256 upper_or_lower(__m512 in, int half) {
  __m256 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&in) + 32 * half, sizeof out);
  return out;
}

}  // namespace emulated

#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu16_epi64
#undef _mm512_cvtepu32_epi64
#undef _mm512_extractf32x8_ps
#define _mm512_cvtepi8_epi32(in) emulated::widened_lanes<std::int8_t, std::int32_t>(in)
#define _mm512_cvtepu8_epi16(in) emulated::widened_lanes<std::uint8_t, std::uint16_t>(in)
#define _mm512_cvtepu8_epi32(in) emulated::widened_lanes<std::uint8_t, std::uint32_t>(in)
#define _mm512_cvtepu16_epi32(in) emulated::widened_lanes<std::uint16_t, std::uint32_t>(in)
#define _mm512_cvtepu16_epi64(in) emulated::widened_lanes<std::uint16_t, std::uint64_t>(in)
#define _mm512_cvtepu32_epi64(in) emulated::widened_lanes<std::uint32_t, std::uint64_t>(in)
#define _mm512_extractf32x8_ps(in, half) emulated::upper_or_lower(in, half)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(in) emulated::widened(in)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(in, rounding) emulated::narrowed(in)  // rounding: to nearest, whatever is asked
#define _mm512_cvtepi32_ps(in) emulated::to_float(in)
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
