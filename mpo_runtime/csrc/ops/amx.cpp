// Attention of prompts with AMX-BF16 (see rounded_attention.hpp).
#include <algorithm>
#include <cstring>
#include <limits>

#include "ops/ops.hpp"

#if MPO_X86 && !defined(MPO_EMULATED_INTRINSICS)

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AMX)

#include "ops/rounded_attention.hpp"
#include "vectors/tiles.hpp"

namespace mpo {
namespace {

constexpr std::size_t kDepth = 32;  // of a product of tiles: elements, or positions

// Tiles 0 to 3 hold sums, 4 what belongs to the queries, 5 to 7 keys or values.
struct TileProducts {
  static constexpr std::size_t kRows = 16;

  static MPO_INLINE void scores(const Work& work, std::size_t row, std::size_t, __m512 (&scores)[kRows][kVectors]) {
    const std::uint16_t* const q = work.q + row * work.wide;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t at = 0; at < work.wide; at += kDepth) {
      const std::uint32_t* const keys = work.keys + at / 2 * kBlock;
      _tile_loadd(4, q + at, work.wide * sizeof *q);
      _tile_loadd(5, keys, kBlock * sizeof *keys);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, keys + kLanes, kBlock * sizeof *keys);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, keys + 2 * kLanes, kBlock * sizeof *keys);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, keys + 3 * kLanes, kBlock * sizeof *keys);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, &scores[0][0], sizeof scores[0]);
    _tile_stored(1, &scores[0][1], sizeof scores[0]);
    _tile_stored(2, &scores[0][2], sizeof scores[0]);
    _tile_stored(3, &scores[0][3], sizeof scores[0]);
  }

  static MPO_INLINE void mix(const Work& work, std::size_t row, std::size_t, std::size_t positions) {
    for (std::size_t at = 0; at < work.wide; at += 2 * kLanes) {  // two tiles of the values' elements
      float* const mixed = work.mixed + row * work.wide + at;
      const std::uint32_t* values = work.values + at;
      _tile_loadd(0, mixed, work.wide * sizeof *mixed);
      _tile_loadd(1, mixed + kLanes, work.wide * sizeof *mixed);
      for (std::size_t p = 0; p < positions; p += kDepth, values += kDepth / 2 * work.wide) {
        _tile_loadd(4, work.weights + p, kBlock * sizeof *work.weights);
        _tile_loadd(5, values, work.wide * sizeof *values);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, values + kLanes, work.wide * sizeof *values);
        _tile_dpbf16ps(1, 4, 6);
      }
      _tile_stored(0, mixed, work.wide * sizeof *mixed);
      _tile_stored(1, mixed + kLanes, work.wide * sizeof *mixed);
    }
  }

  static MPO_INLINE __m512 largest(const __m512 (&rows)[kRows]) {
    __m512i lanes[kRows];
    for (std::size_t m = 0; m < kRows; ++m) lanes[m] = _mm512_castps_si512(rows[m]);
    transpose(lanes);
    __m512 most = _mm512_castsi512_ps(lanes[0]);
    for (std::size_t i = 1; i < kRows; ++i) most = _mm512_max_ps(most, _mm512_castsi512_ps(lanes[i]));
    return most;
  }
};

void attend_in_tiles(const AttentionTask& task) {
  const Tiles configured;
  attend<TileProducts>(task);
}

}  // namespace

extern const Attend kAmxAttend = attend_in_tiles;

}  // namespace mpo

MPO_END_TARGET

#endif
