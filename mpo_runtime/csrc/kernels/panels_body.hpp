// Rows of weights by columns, and sums to rows of y: what panels of int8 and of float32 share. Included after the target is
// set (see target.hpp).
#pragma once

#include "kernels/avx2_scales.hpp"
#include "kernels/panels.hpp"

namespace mpo {
namespace {

constexpr std::size_t kHalfPanel = kPanelRows / 2;          // rows of a vector of 32-bit values
constexpr std::size_t kChunkSteps = kChunk / kPanelStep;    // steps that are unpacked at a time
constexpr std::size_t kTileTokens = 4;                      // rows of x whose sums are in registers

MPO_INLINE __m256i load_vector(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
MPO_INLINE void store_vector(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

// The rows of an 8 by 8 matrix of 32-bit values become its columns.
MPO_INLINE void transpose(__m256i* rows) {
  __m256i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2x128_si256(quads[j], quads[j + 4], 0x20);
    rows[j + 4] = _mm256_permute2x128_si256(quads[j], quads[j + 4], 0x31);
  }
}

// Eight rows of a chunk of 256 columns of an integer matrix: codes and scales. Missing rows and columns are zeros with the
// scale zero. Codes are taken as they lie in the plane, `Packed` bits each, or (8) spread to a byte each first.
template <int Low, int High, int G, int Packed>
class HalfPanel {
 public:
  using Scales = Avx2Scales::Scales<G>;
  static constexpr std::size_t kFields = 8 / Packed;                  // codes of a byte
  static constexpr std::size_t kVectors = kChunk / 32 / kFields;      // of a row
  static constexpr std::size_t kQuads = 8 * kFields;                  // vectors of four columns that a vector of each row gives

  HalfPanel(const QuantizedMatrix& w, std::size_t row, std::size_t count, std::size_t column, std::size_t columns,
            std::size_t ahead)
      : w_(w), columns_(columns) {
    for (std::size_t i = 0; i < kHalfPanel; ++i) {
      at_[i] = i < count ? (row + i) * w.columns + column : kMissing;
      rows_[i] = codes_[i];
      if (i < count) read(i, ahead);
      else std::memset(codes_[i], 0, kChunk / kFields);
    }
  }

  // Four columns of each row from each quad on, in the order of the panel.
  MPO_INLINE void quads(std::size_t vector, __m256i* out) const {
    __m256i columns[kHalfPanel];
    for (std::size_t i = 0; i < kHalfPanel; ++i) columns[i] = load_vector(rows_[i] + 32 * vector);
    transpose(columns);
#pragma GCC unroll 8
    for (std::size_t k = 0; k < 8; ++k)
#pragma GCC unroll 4
      for (std::size_t f = 0; f < kFields; ++f)
        out[k * kFields + f] = Packed == 8 ? columns[k]
                                           : _mm256_and_si256(_mm256_srli_epi32(columns[k], static_cast<int>(f) * Packed),
                                                              _mm256_set1_epi8((1 << Packed) - 1));
  }

  // The scales or zeros of the rows for each step (groups of 16: each half step, the first halves before the second ones).
  void turned(const std::uint16_t* from, __m256* steps) const {
    __m256i rows[G == 16 ? 2 : 1][kHalfPanel];
    for (std::size_t i = 0; i < kHalfPanel; ++i) {
      const Scales scales = of_row(from, at_[i]);
      for (int half = 0; half < (G == 16 ? 2 : 1); ++half)
        rows[half][i] = _mm256_castps_si256(Avx2Scales::block_scales<G>(scales, half));
    }
    for (int half = 0; half < (G == 16 ? 2 : 1); ++half) {
      transpose(rows[half]);
      for (std::size_t i = 0; i < kChunkSteps; ++i) steps[half * kChunkSteps + i] = _mm256_castsi256_ps(rows[half][i]);
    }
  }

 private:
  static constexpr std::size_t kMissing = ~std::size_t{0};

  // Nothing beyond the end of a tensor may be read.
  void read(std::size_t i, std::size_t ahead) {
    const std::size_t at = at_[i];
    const std::uint8_t *low = w_.low + at / 8 * Low, *high = High ? w_.high + at / 8 * High : nullptr;
    std::uint8_t low_rest[32 * Low], high_rest[32 * (High ? High : 1)];
    Avx2Floats::prefetch_lines(low + ahead / 8 * Low, 32 * Low);
    if (High) Avx2Floats::prefetch_lines(high + ahead / 8 * High, 32 * High);
    Avx2Floats::prefetch_lines(w_.scale + (at + ahead) / G, 2 * kChunk / G);
    if (columns_ < kChunk) {
      std::memset(low_rest, 0, sizeof low_rest);
      std::memcpy(low_rest, low, columns_ * Low / 8);
      low = low_rest;
      if (High) {
        std::memset(high_rest, 0, sizeof high_rest);
        std::memcpy(high_rest, high, columns_ * High / 8);
        high = high_rest;
      }
    }
    if constexpr (Packed == Low) {
      if (columns_ < kChunk) std::memcpy(codes_[i], low, sizeof low_rest);
      else rows_[i] = low;
    } else {
      Avx2Floats::spread<Low, High>(low, high, kChunk, codes_[i]);
    }
  }

  Scales of_row(const std::uint16_t* from, std::size_t at) const {
    std::uint16_t rest[kChunk / G] = {};
    if (at == kMissing) return Avx2Scales::load_scales<G>(rest);
    from += at / G;
    if (columns_ == kChunk) return Avx2Scales::load_scales<G>(from);
    std::memcpy(rest, from, (columns_ + G - 1) / G * 2);
    return Avx2Scales::load_scales<G>(rest);
  }

  const QuantizedMatrix& w_;
  std::size_t columns_;
  std::size_t at_[kHalfPanel];
  const std::uint8_t* rows_[kHalfPanel];
  alignas(64) std::uint8_t codes_[kHalfPanel][kChunk];
};

// Calls take(first row of the half panel, first step, steps, HalfPanel) for all parts of a panel.
template <int Low, int High, int G, int Packed, class Take>
MPO_INLINE void for_half_panels(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to,
                                Take take) {
  for (std::size_t done = 0; done < to.columns; done += kChunk)
    for (std::size_t half = 0; half < kPanelRows; half += kHalfPanel) {
      const std::size_t count = to.count > half ? (to.count - half < kHalfPanel ? to.count - half : kHalfPanel) : 0;
      const std::size_t columns = to.columns - done < kChunk ? to.columns - done : kChunk;
      const HalfPanel<Low, High, G, Packed> part(w, row + half, count, column + done, columns, to.ahead);
      take(half, done / kPanelStep, panel_steps(columns), part);
    }
}

// Sums [panels, rows of x, 16 rows of weights].
void add_panel_sums(const float* sums, std::size_t groups, const Task& task) {
  for (std::size_t t = 0; t < task.count; ++t) {
    const float* from = sums + t * kPanelRows;
    float* y = task.y.row(task.first + t);
    for (std::size_t r = task.begin; r < task.end; r += kPanelRows, from += groups * kPanelSums) {
      const std::size_t height = task.end - r < kPanelRows ? task.end - r : kPanelRows;
      if (height < kPanelRows) {
        for (std::size_t i = 0; i < height; ++i) y[r + i] = task.accumulate ? y[r + i] + from[i] : from[i];
        continue;
      }
      for (std::size_t i = 0; i < kPanelRows; i += 8) {
        const __m256 own = _mm256_loadu_ps(from + i);
        _mm256_storeu_ps(y + r + i, task.accumulate ? _mm256_add_ps(_mm256_loadu_ps(y + r + i), own) : own);
      }
    }
  }
}

}  // namespace
}  // namespace mpo
