// Attention of prompts with AVX-512 BF16 (see rounded_attention.hpp).
#include <algorithm>
#include <cstring>
#include <limits>

#include "ops/ops.hpp"

#if MPO_X86 && !defined(MPO_EMULATED_INTRINSICS)

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_BF16)

#include "ops/rounded_attention.hpp"

namespace mpo {
namespace {

constexpr std::size_t kTileRows = 6;  // a tile of sums: queries, and vectors of positions or of elements

// sums [kTileRows, V vectors] += pairs of a [kTileRows, 2 * count] and of b [count, V vectors]
template <std::size_t V>
MPO_INLINE void add_pairs(const std::uint16_t* a, std::size_t a_row, const std::uint32_t* b, std::size_t b_row,
                          std::size_t count, __m512 (&sums)[kTileRows][V]) {
  for (std::size_t k = 0; k < count; ++k, a += 2, b += b_row) {
    __m512bh pairs[V];
    for (std::size_t u = 0; u < V; ++u) pairs[u] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + u * kLanes));
    for (std::size_t m = 0; m < kTileRows; ++m) {
      std::uint32_t pair;
      std::memcpy(&pair, a + m * a_row, sizeof pair);
      const auto one = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
      for (std::size_t u = 0; u < V; ++u) sums[m][u] = _mm512_dpbf16_ps(sums[m][u], one, pairs[u]);
    }
  }
}

// scores [kTileRows, kBlock] of pairs of a [kTileRows, 2 * count] and of b [count, kBlock]. They are needed in memory; sums of their own
// stay in registers until the end.
MPO_INLINE void multiply_pairs(const std::uint16_t* a, std::size_t a_row, const std::uint32_t* b, std::size_t count,
                               __m512 (&scores)[kTileRows][kVectors]) {
  __m512 sums[kTileRows][kVectors];
  for (auto& of_query : sums)
    for (__m512& sum : of_query) sum = _mm512_setzero_ps();
  add_pairs<kVectors>(a, a_row, b, kBlock, count, sums);
  for (std::size_t m = 0; m < kTileRows; ++m)
    for (std::size_t u = 0; u < kVectors; ++u) scores[m][u] = sums[m][u];
}

// Vectors [from, from + V) of what the tile's queries mix.
template <std::size_t V>
MPO_INLINE void mix_vectors(const Work& work, std::size_t row, std::size_t from, std::size_t pairs) {
  __m512 sums[kTileRows][V];
  float* const mixed = work.mixed + row * work.wide + from * kLanes;
  for (std::size_t m = 0; m < kTileRows; ++m)
    for (std::size_t u = 0; u < V; ++u) sums[m][u] = _mm512_load_ps(mixed + m * work.wide + u * kLanes);
  add_pairs<V>(work.weights, kBlock, work.values + from * kLanes, work.wide, pairs, sums);
  for (std::size_t m = 0; m < kTileRows; ++m)
    for (std::size_t u = 0; u < V; ++u) _mm512_store_ps(mixed + m * work.wide + u * kLanes, sums[m][u]);
}

// The largest lane of each of six vectors, in their order, zeros behind them.
MPO_INLINE __m512 largest_of_rows(const __m512 (&rows)[kTileRows]) {
  static_assert(kTileRows == 6);
  __m512 pairs[3];  // a row in each half
  for (std::size_t i = 0; i < 3; ++i) {
    const __m512 a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  __m512 quads[2];  // a row in each quarter, the second time the last two rows twice
  for (std::size_t i = 0; i < 2; ++i) {
    const __m512 a = pairs[2 * i], b = pairs[i + 1];
    quads[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    quads[i] = _mm512_max_ps(quads[i], _mm512_permute_ps(quads[i], 0x4e));
    quads[i] = _mm512_max_ps(quads[i], _mm512_permute_ps(quads[i], 0xb1));
  }
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_maskz_permutex2var_ps((1u << kTileRows) - 1, quads[0], order, quads[1]);
}

struct Pairs {
  static constexpr std::size_t kRows = kTileRows;
  static MPO_INLINE void scores(const Work& work, std::size_t row, std::size_t size, __m512 (&scores)[kRows][kVectors]) {
    multiply_pairs(work.q + row * work.wide, work.wide, work.keys, (size + 1) / 2, scores);
  }
  static MPO_INLINE void mix(const Work& work, std::size_t row, std::size_t size, std::size_t positions) {
    const std::size_t pairs = (positions + 1) / 2, vectors = round_up(size, kLanes) / kLanes;
    std::size_t from = 0;
    for (; from + 4 <= vectors; from += 4) mix_vectors<4>(work, row, from, pairs);
    if (vectors - from == 3) mix_vectors<3>(work, row, from, pairs);
    if (vectors - from == 2) mix_vectors<2>(work, row, from, pairs);
    if (vectors - from == 1) mix_vectors<1>(work, row, from, pairs);
  }
  static MPO_INLINE __m512 largest(const __m512 (&rows)[kRows]) { return largest_of_rows(rows); }
};

}  // namespace

extern const Attend kBf16Attend = attend<Pairs>;

}  // namespace mpo

MPO_END_TARGET

#endif
