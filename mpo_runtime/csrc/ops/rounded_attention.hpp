// Attention of prompts over products of numbers rounded to bf16, sums in float32, written once for the instruction sets that
// have such products. A block of 64 positions is arranged for the products of all queries; queries are taken in tiles, whose
// softmax is brought up to date block by block (Milakov & Gimelshein 2018, Dao et al. 2022). Include it behind MPO_BEGIN_TARGET.
//
// A `Kernel` says how a tile is multiplied:
//   kRows                                   queries of a tile, at most 16
//   scores(work, row, size, scores)         [kRows, kBlock] of the queries from `row` on and the keys
//   mix(work, row, size, positions)         adds the values of the first positions, an even number or all, times work.weights
//   largest(rows)                           the largest lane of each of kRows vectors, in their order; behind them anything
#pragma once

#include "ops/ops_body.hpp"
#include "vectors/avx512.hpp"

namespace mpo {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::size_t kVectors = 4;                // of the positions of a block
constexpr std::size_t kBlock = kVectors * kLanes;  // positions taken at a time
constexpr float kLn2 = 0.693147180559945f, kLog2E = 1.44269504088896341f;
static_assert(kBlock % kPagePositions == 0 && kPagePositions % kLanes == 0);

constexpr std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// The first `count` lanes.
MPO_INLINE __mmask16 lanes(std::size_t count) { return static_cast<__mmask16>(count < kLanes ? (1u << count) - 1 : 0xffffu); }

// 16 elements of a stored row [size] from element `at` on, zeros behind its end.
template <Type Element>
MPO_INLINE __m512 load_some(const std::uint8_t* row, std::size_t at, std::size_t size, float scale) {
  const std::uint8_t* const from = row + at * element_size(Element);
  const __mmask16 inside = lanes(size > at ? size - at : 0);
  if constexpr (Element == Type::int8) {
    const __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(inside, from));
    return _mm512_maskz_mul_ps(inside, _mm512_cvtepi32_ps(codes), _mm512_set1_ps(scale));
  } else if constexpr (Element == Type::f32) {
    return _mm512_maskz_loadu_ps(inside, from);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(inside, from);
    if constexpr (Element == Type::f16) return _mm512_cvtph_ps(halves);
    else return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

MPO_INLINE __m512i rounded(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// Pairs of neighbouring elements of up to 16 keys [some, size]: to [wide / 2, kBlock], of which 16 columns are written.
template <Type Element>
MPO_INLINE void arrange_keys(const std::uint8_t* keys, const float* scales, std::size_t some, std::size_t size,
                             std::uint32_t* to) {
  for (std::size_t at = 0; at < size; at += 2 * kLanes) {
    __m512i rows[kLanes];
    for (std::size_t r = 0; r < kLanes; ++r) {
      rows[r] = _mm512_setzero_si512();
      if (r >= some) continue;
      const std::uint8_t* const row = keys + r * size * element_size(Element);
      const float scale = Element == Type::int8 ? scales[r] : 1.0f;
      rows[r] = rounded(load_some<Element>(row, at, size, scale), load_some<Element>(row, at + kLanes, size, scale));
    }
    transpose(rows);
    for (std::size_t p = 0; p < kLanes; ++p) _mm512_store_si512(to + (at / 2 + p) * kBlock, rows[p]);
  }
}

// Pairs of the same element of neighbouring positions, of up to 16 values [some, size]: to [8, wide].
template <Type Element>
MPO_INLINE void arrange_values(const std::uint8_t* values, const float* scales, std::size_t some, std::size_t size,
                               std::size_t wide, std::uint32_t* to) {
  alignas(64) static constexpr std::uint16_t kTurns[2 * kLanes] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                   8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turns = _mm512_load_si512(kTurns);
  const auto row = [&](std::size_t r, std::size_t at) {
    if (r >= some) return _mm512_setzero_ps();
    return load_some<Element>(values + r * size * element_size(Element), at, size, Element == Type::int8 ? scales[r] : 1.0f);
  };
  for (std::size_t r = 0; r < kLanes; r += 2, to += wide)
    for (std::size_t at = 0; at < wide; at += kLanes)
      _mm512_store_si512(to + at, _mm512_permutexvar_epi16(turns, rounded(row(r, at), row(r + 1, at))));
}

// 2^x of x <= 0 to 8e-5, which is little beside the rounding to bf16: a polynomial of degree 3 of x - floor(x), fitted to the
// least relative error. The scaling rounds its exponent down by itself.
MPO_INLINE __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802452f), r, _mm512_set1_ps(0.22606716f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69583354f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992522f));
  return _mm512_scalef_ps(p, x);
}

// One call's memory, all of it at cache lines. Scores are in powers of two.
struct Work {
  std::size_t wide;          // elements of a head, a multiple of 32
  std::uint16_t* q;          // [queries, wide], times the scale
  float *mixed, *sums;       // [queries, wide], [queries, kLanes]
  float* peaks;              // [queries]
  std::uint32_t *keys, *values;  // [wide / 2, kBlock], [kBlock / 2, wide]
  std::uint16_t* weights;    // [rows of a tile, kBlock]
};

Work reserve(std::size_t queries, std::size_t size, std::size_t tile) {
  Work work{};
  const std::size_t wide = work.wide = round_up(size, 2 * kLanes);
  float* at = scratch_floats(queries * (wide / 2 + wide + kLanes) + round_up(queries, kLanes) + wide * kBlock + tile * kBlock / 2);
  work.mixed = at, at += queries * wide;
  work.sums = at, at += queries * kLanes;
  work.keys = reinterpret_cast<std::uint32_t*>(at), at += wide / 2 * kBlock;
  work.values = reinterpret_cast<std::uint32_t*>(at), at += wide / 2 * kBlock;
  work.weights = reinterpret_cast<std::uint16_t*>(at), at += tile * kBlock / 2;
  work.q = reinterpret_cast<std::uint16_t*>(at), at += queries * wide / 2;
  work.peaks = at;
  return work;
}

// What the queries of a tile see of a block of positions.
template <std::size_t Rows>
struct Seen {
  std::uint64_t positions[Rows];  // a bit for each
  std::size_t end;                 // behind the last one that any query sees
  bool all;
};

template <std::size_t Rows>
Seen<Rows> look(const AttentionTask& task, std::size_t row, std::size_t start) {
  Seen<Rows> seen{{}, 0, true};
  for (std::size_t m = 0; m < Rows; ++m) {
    const std::size_t query = std::min(row + m, task.queries - 1), limit = task.limits[query], first = task.firsts[query];
    const std::size_t visible = limit > start ? std::min(limit - start, kBlock) : 0;
    const std::size_t hidden = first > start ? std::min(first - start, kBlock) : 0;
    seen.positions[m] = 0;
    if (hidden < visible) {
      seen.positions[m] = ~std::uint64_t{0} >> (kBlock - (visible - hidden)) << hidden;
      seen.end = std::max(seen.end, visible);
    }
    seen.all = seen.all && seen.positions[m] == ~std::uint64_t{0};
  }
  return seen;
}

// Brings the sums so far of the queries [row, row + Rows) to new peaks [kLanes]. A block that a query does not see changes no bit.
template <std::size_t Rows>
MPO_INLINE void rescale(const Work& work, std::size_t row, const float* peaks) {
  constexpr __mmask16 kQueries = (1u << Rows) - 1;
  const __m512 before = _mm512_maskz_loadu_ps(kQueries, work.peaks + row), now = _mm512_load_ps(peaks);
  if (!_mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ)) return;
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 factor = OpsBody<Avx512Floats>::exponential(_mm512_mul_ps(_mm512_sub_ps(before, now), _mm512_set1_ps(kLn2)));
  alignas(64) float factors[kLanes];
  _mm512_store_ps(factors, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(before, nothing, _CMP_NEQ_UQ), factor));
  _mm512_mask_storeu_ps(work.peaks + row, kQueries, now);
  for (std::size_t m = 0; m < Rows; ++m) {
    const __m512 by = _mm512_set1_ps(factors[m]);
    float* const sums = work.sums + (row + m) * kLanes;
    _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), by));
    float* const mixed = work.mixed + (row + m) * work.wide;
    for (std::size_t i = 0; i < work.wide; i += kLanes) _mm512_store_ps(mixed + i, _mm512_mul_ps(_mm512_load_ps(mixed + i), by));
  }
}

// The queries [row, row + Rows) against a block.
template <std::size_t Rows>
struct Tile {
  std::size_t row;
  Seen<Rows> seen;
  alignas(64) __m512 scores[Rows][kVectors];
};

// Mixes the values of a block by a tile's scores; with `All` its queries see every position.
template <bool All, class Kernel>
MPO_INLINE void finish(const Work& work, std::size_t size, const Tile<Kernel::kRows>& tile) {
  constexpr std::size_t kRows = Kernel::kRows;
  const std::size_t row = tile.row;
  const auto mask = [&](std::size_t m, std::size_t u) { return static_cast<__mmask16>(tile.seen.positions[m] >> (u * kLanes)); };
  __m512 largest[kRows];
  for (std::size_t m = 0; m < kRows; ++m) {
    largest[m] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (std::size_t u = 0; u < kVectors; ++u)
      largest[m] = All ? _mm512_max_ps(largest[m], tile.scores[m][u])
                       : _mm512_mask_max_ps(largest[m], mask(m, u), largest[m], tile.scores[m][u]);
  }
  // The instruction gives its second operand where one is not a number.
  const __m512 before = _mm512_maskz_loadu_ps((1u << kRows) - 1, work.peaks + row);
  alignas(64) float peaks[kLanes];
  _mm512_store_ps(peaks, _mm512_max_ps(Kernel::largest(largest), before));
  rescale<kRows>(work, row, peaks);

  for (std::size_t m = 0; m < kRows; ++m) {
    __m512 weights[kVectors];
    for (std::size_t u = 0; u < kVectors; ++u) {
      weights[u] = power_of_two(_mm512_sub_ps(tile.scores[m][u], _mm512_set1_ps(peaks[m])));
      if (!All) weights[u] = _mm512_maskz_mov_ps(mask(m, u), weights[u]);
    }
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(weights[0], weights[1]), _mm512_add_ps(weights[2], weights[3]));
    float* const sums = work.sums + (row + m) * kLanes;
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), sum));
    for (std::size_t u = 0; u < kVectors; u += 2)
      _mm512_store_si512(work.weights + m * kBlock + u * kLanes, rounded(weights[u], weights[u + 1]));
  }

  Kernel::mix(work, row, size, All ? kBlock : tile.seen.end);
}

template <class Kernel>
MPO_INLINE void finish(const Work& work, std::size_t size, const Tile<Kernel::kRows>& tile) {
  if (tile.seen.all) finish<true, Kernel>(work, size, tile);
  else finish<false, Kernel>(work, size, tile);
}

template <Type Element>
void arrange(const KvPlace& cache, std::size_t start, std::size_t count, const Work& work) {
  constexpr std::size_t kSize = element_size(Element);
  for (std::size_t at = 0; at < kBlock; at += kLanes) {
    const std::size_t position = start + at, some = count > at ? std::min(count - at, kLanes) : 0;
    const std::uint8_t *keys = nullptr, *values = nullptr;
    const float *key_scales = nullptr, *value_scales = nullptr;
    if (some > 0) {
      const std::size_t here = position % kPagePositions;
      const std::uint8_t* const page = cache.pages[position / kPagePositions];
      keys = page + cache.keys + here * cache.size * kSize;
      values = page + cache.values + here * cache.size * kSize;
      key_scales = reinterpret_cast<const float*>(page + cache.key_scales) + here;
      value_scales = reinterpret_cast<const float*>(page + cache.value_scales) + here;
    }
    arrange_keys<Element>(keys, key_scales, some, cache.size, work.keys + at);
    arrange_values<Element>(values, value_scales, some, cache.size, work.wide, work.values + at / 2 * work.wide);
  }
}

// Positions whose keys and values will be needed next.
struct Ahead {
  const AttentionTask& task;
  std::size_t start, end;

  // Asks for one of `shares` parts of them. Inline, because GCC takes a function that only prefetches for one without effect.
  MPO_INLINE void fetch(std::size_t share, std::size_t shares) const {
    constexpr std::size_t kLine = 64;
    const KvPlace& cache = task.cache;
    const std::size_t bytes = kPagePositions * cache.size * element_size(cache.type);
    for (std::size_t at = start; at < end; at += kPagePositions) {
      const std::uint8_t* const page = cache.pages[at / kPagePositions];
      for (std::size_t line = share * kLine; line < bytes; line += shares * kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(page + cache.keys + line), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(page + cache.values + line), _MM_HINT_T0);
      }
    }
  }
};

void round_queries(const AttentionTask& task, const Work& work) {
  for (std::size_t m = 0; m < task.queries; ++m)
    for (std::size_t at = 0; at < work.wide; at += 2 * kLanes) {
      const auto* const row = reinterpret_cast<const std::uint8_t*>(task.q[m]);
      const __m512 low = load_some<Type::f32>(row, at, task.cache.size, 1), factor = _mm512_set1_ps(task.scale * kLog2E);
      const __m512 high = load_some<Type::f32>(row, at + kLanes, task.cache.size, 1);
      _mm512_store_si512(work.q + m * work.wide + at, rounded(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor)));
    }
}

template <class Kernel>
void attend(const AttentionTask& task) {
  constexpr std::size_t kRows = Kernel::kRows;
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const std::size_t size = task.cache.size, rows = round_up(task.queries, kRows);
  const Work work = reserve(rows, size, kRows);
  std::memset(work.mixed, 0, rows * (work.wide + kLanes) * sizeof(float));  // and sums
  std::memset(work.q + task.queries * work.wide, 0, (rows - task.queries) * work.wide * sizeof(std::uint16_t));
  std::fill(work.peaks, work.peaks + rows, kNothing);
  round_queries(task, work);
  const std::size_t first = *std::min_element(task.firsts, task.firsts + task.queries);
  const std::size_t end = std::min(task.end, *std::max_element(task.limits, task.limits + task.queries));
  const std::size_t skipped = first > task.begin ? (first - task.begin) / kBlock * kBlock : 0;
  const std::size_t all_first = *std::max_element(task.firsts, task.firsts + task.queries);
  const std::size_t all_limit = *std::min_element(task.limits, task.limits + task.queries);
  for (std::size_t start = task.begin + skipped; start < end; start += kBlock) {
    const std::size_t count = std::min(end - start, kBlock);
    switch (task.cache.type) {
      case Type::f32: arrange<Type::f32>(task.cache, start, count, work); break;
      case Type::f16: arrange<Type::f16>(task.cache, start, count, work); break;
      case Type::bf16: arrange<Type::bf16>(task.cache, start, count, work); break;
      case Type::int8: arrange<Type::int8>(task.cache, start, count, work); break;
    }
    const Ahead ahead{task, std::min(start + kBlock, end), std::min(start + 2 * kBlock, end)};
    const bool whole = all_first <= start && all_limit >= start + kBlock;
    // A tile is finished after the next one's scores are multiplied: finding its peaks takes long, but nothing waits for them.
    Tile<kRows> tiles[2];
    std::size_t made = 0;
    for (std::size_t row = 0; row < rows; row += kRows) {
      ahead.fetch(row / kRows, rows / kRows);
      Tile<kRows>& tile = tiles[made % 2];
      tile.row = row;
      tile.seen = whole ? Seen<kRows>{{}, kBlock, true} : look<kRows>(task, row, start);
      if (tile.seen.end == 0) continue;
      Kernel::scores(work, row, size, tile.scores);
      if (made > 0) finish<Kernel>(work, size, tiles[(made - 1) % 2]);
      ++made;
    }
    if (made > 0) finish<Kernel>(work, size, tiles[(made - 1) % 2]);
  }
  for (std::size_t m = 0; m < task.queries; ++m) {
    std::memcpy(task.mixed + m * size, work.mixed + m * work.wide, size * sizeof(float));
    task.peaks[m] = work.peaks[m] * kLn2;
    task.sums[m] = Avx512Floats::total(_mm512_load_ps(work.sums + m * kLanes));
  }
}

}  // namespace
}  // namespace mpo
