// Panels of int8 and of float32 with AVX2, which AVX-512 unpacks and arranges alike. Included after the target is set (see
// target.hpp).
#pragma once

#include "kernels/avx2_activations.hpp"
#include "kernels/avx2_scales.hpp"
#include "kernels/panels.hpp"
#include "vectors/elements.hpp"

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

// Eight rows of a chunk of 256 columns of an integer matrix: codes, a byte each, and scales. Missing rows and columns are
// zeros with the scale zero.
template <int Low, int High, int G>
class HalfPanel {
 public:
  using Scales = Avx2Scales::Scales<G>;

  HalfPanel(const QuantizedMatrix& w, std::size_t row, std::size_t count, std::size_t column, std::size_t columns)
      : w_(w), columns_(columns) {
    for (std::size_t i = 0; i < kHalfPanel; ++i) {
      at_[i] = i < count ? (row + i) * w.columns + column : kMissing;
      if (i < count) spread(at_[i], codes_[i]);
      else std::memset(codes_[i], 0, kChunk);
    }
  }

  // The codes of a step: vector k holds four columns of each row.
  MPO_INLINE void step(std::size_t step, __m256i* columns) const {
    for (std::size_t i = 0; i < kHalfPanel; ++i) columns[i] = load_vector(codes_[i] + step * kPanelStep);
    transpose(columns);
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
  void spread(std::size_t at, std::uint8_t* codes) const {
    const std::uint8_t *low = w_.low + at / 8 * Low, *high = High ? w_.high + at / 8 * High : nullptr;
    std::uint8_t low_rest[32 * Low], high_rest[32 * (High ? High : 1)];
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
    Avx2Floats::spread<Low, High>(low, high, kChunk, codes);
    prefetch(low + kPanelChunk / 8 * Low, 32 * Low);  // for the next panel of these rows
    if (High) prefetch(high + kPanelChunk / 8 * High, 32 * High);
  }

  static MPO_INLINE void prefetch(const std::uint8_t* from, std::size_t bytes) {
    for (std::size_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(from + line), _MM_HINT_T1);
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
  alignas(64) std::uint8_t codes_[kHalfPanel][kChunk];
};

// Calls take(first row of the half panel, first step, steps, HalfPanel) for all parts of a panel.
template <int Low, int High, int G, class Take>
MPO_INLINE void for_half_panels(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to,
                                Take take) {
  for (std::size_t done = 0; done < to.columns; done += kChunk)
    for (std::size_t half = 0; half < kPanelRows; half += kHalfPanel) {
      const std::size_t count = to.count > half ? (to.count - half < kHalfPanel ? to.count - half : kHalfPanel) : 0;
      const std::size_t columns = to.columns - done < kChunk ? to.columns - done : kChunk;
      const HalfPanel<Low, High, G> part(w, row + half, count, column + done, columns);
      take(half, done / kPanelStep, panel_steps(columns), part);
    }
}

// -- int8

// The memory of a panel of weights: codes [steps, 8, 16 rows, 4 columns], then for each step or half step and row a scale,
// what sums of codes begin with, and what the sum of x is multiplied with.
struct IntegerPanel {
  static constexpr std::size_t kCodes = kPanelRows * kPanelStep, kBytes = kCodes + 6 * kPanelRows * sizeof(float);

  std::uint8_t* codes;
  float* scales;
  std::int32_t* starts;
  float* shifts;

  MPO_INLINE IntegerPanel(std::uint8_t* at, std::size_t steps)
      : codes(at),
        scales(reinterpret_cast<float*>(at + steps * kCodes)),
        starts(reinterpret_cast<std::int32_t*>(scales + 2 * kPanelRows * steps)),
        shifts(scales + 4 * kPanelRows * steps) {}
};

// The memory of a group of rows of x: codes [16, columns], then [16, steps] scales and sums, and [16, 2 * steps] sums of half
// steps. The sums are of what the codes stand for.
struct IntegerGroup {
  static constexpr std::size_t kCodes = kPanelRows * kPanelStep, kBytes = kCodes + 4 * kPanelRows * sizeof(float);

  std::uint8_t* codes;
  float *scales, *sums, *half_sums;

  MPO_INLINE IntegerGroup(std::uint8_t* at, std::size_t steps)
      : codes(at),
        scales(reinterpret_cast<float*>(at + steps * kCodes)),
        sums(scales + kPanelRows * steps),
        half_sums(sums + kPanelRows * steps) {}
};

// Signed: weights are q - zero as signed bytes, x plus 128 as unsigned ones (dpbusd). Else weights are q as unsigned bytes,
// or of 8 bits q - 128 as signed ones, and x is signed (maddubs).
template <bool Signed>
struct IntegerPanels {
  // What codes become: at 2 bits, whose zero is 1.5, twice as much.
  template <int Bits>
  static MPO_INLINE __m256i weights(__m256i codes) {
    if constexpr (Bits == 8) return _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    if constexpr (!Signed) return codes;
    if constexpr (Bits == 2) return _mm256_sub_epi8(_mm256_add_epi8(codes, codes), _mm256_set1_epi8(3));
    return _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(1 << (Bits - 1))));
  }

  // Sums of four neighbouring signed bytes.
  static MPO_INLINE __m256i sum_bytes(__m256i bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
  }

  template <int Low, int High, int G>
  static void unpack_as(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    constexpr int bits = Low + High;
    constexpr std::size_t kScales = G == 16 ? 2 : 1;  // of a step
    const IntegerPanel panel(to.out, panel_steps(to.columns));
    // The zero that the codes of a panel are counted from, in the codes of the file.
    const __m256 counted = _mm256_set1_ps(Signed ? implicit_zero(bits) : bits == 8 ? 128.0f : 0.0f);
    for_half_panels<Low, High, G>(w, row, column, to, [&](std::size_t half, std::size_t first, std::size_t steps, const auto& part) {
      __m256 scales[2 * kChunkSteps], zeros[2 * kChunkSteps];
      part.turned(w.scale, scales);
      if (w.zero) part.turned(w.zero, zeros);
      else std::fill_n(zeros, 2 * kChunkSteps, _mm256_set1_ps(implicit_zero(bits)));
      for (std::size_t s = 0; s < steps; ++s) {
        __m256i columns[8], sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        part.step(s, columns);
        std::uint8_t* codes = panel.codes + (first + s) * IntegerPanel::kCodes + 4 * half;
#pragma GCC unroll 8
        for (std::size_t k = 0; k < 8; ++k) {
          const __m256i values = weights<bits>(columns[k]);
          store_vector(codes + 4 * kPanelRows * k, values);
          if constexpr (Signed) sums[k / 4] = _mm256_add_epi32(sums[k / 4], sum_bytes(values));
        }
        if constexpr (Signed && kScales == 1) sums[0] = _mm256_add_epi32(sums[0], sums[1]);
        for (std::size_t i = 0; i < kScales; ++i) {
          const std::size_t at = (kScales * (first + s) + i) * kPanelRows + half;
          const __m256 scale = scales[i * kChunkSteps + s];
          const __m256 shift = _mm256_mul_ps(scale, _mm256_sub_ps(counted, zeros[i * kChunkSteps + s]));
          _mm256_storeu_ps(panel.scales + at, Signed && bits == 2 ? _mm256_mul_ps(scale, _mm256_set1_ps(0.5f)) : scale);
          _mm256_storeu_ps(panel.shifts + at, shift);
          if constexpr (Signed)
            store_vector(panel.starts + at, _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sums[i], 7)));
        }
      }
    });
  }

  static void unpack(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    with_planes(w.bits, [&](auto planes) {
      with_group(w.group, [&](auto group) { unpack_as<planes.low, planes.high, group.value>(w, row, column, to); });
    });
  }

  static void arrange(Rows<const float> x, std::size_t count, std::size_t columns, std::uint8_t* out) {
    const std::size_t steps = panel_steps(columns), wide = steps * kPanelStep;
    const IntegerGroup group(out, steps);
    std::memset(group.codes + count * wide, 0, (kPanelRows - count) * wide);
    std::memset(group.scales + count * steps, 0, (kPanelRows - count) * steps * sizeof(float));
    std::memset(group.sums + count * steps, 0, (kPanelRows - count) * steps * sizeof(float));
    std::memset(group.half_sums + count * 2 * steps, 0, (kPanelRows - count) * 2 * steps * sizeof(float));
    for (std::size_t t = 0; t < count; ++t)
      for (std::size_t c = 0; c < columns; c += kChunk) {
        const std::size_t there = columns - c < kChunk ? columns - c : kChunk, parts = panel_steps(there);
        float rest[kChunk], scales[kChunkSteps];
        alignas(32) std::int8_t codes[kChunk];
        std::int32_t half_sums[2 * kChunkSteps];
        const float* from = x.row(t) + c;
        if (there < kChunk) {
          std::memset(rest, 0, sizeof rest);
          std::memcpy(rest, from, there * sizeof(float));
          from = rest;
        }
        Avx2Rows::quantize(from, codes, scales, half_sums);
        for (std::size_t s = 0; s < parts; ++s) {
          const std::size_t at = t * steps + c / kPanelStep + s;
          const __m256i values = load_vector(codes + s * kPanelStep);
          store_vector(group.codes + t * wide + c + s * kPanelStep,
                       Signed ? _mm256_xor_si256(values, _mm256_set1_epi8(-128)) : values);
          group.scales[at] = scales[s];
          group.sums[at] = scales[s] * static_cast<float>(half_sums[2 * s] + half_sums[2 * s + 1]);
          group.half_sums[2 * at] = scales[s] * static_cast<float>(half_sums[2 * s]);
          group.half_sums[2 * at + 1] = scales[s] * static_cast<float>(half_sums[2 * s + 1]);
        }
      }
  }
};

// -- float32

// Panels [columns, 16 rows] and groups [16, columns] of float32; products over the vectors X.
template <class X>
struct FloatPanels {
  using F = typename X::Floats;
  static constexpr std::size_t kBytes = kPanelRows * kPanelStep * sizeof(float), kLanes = X::kLanes;
  static constexpr std::size_t kNear = 128;  // columns of two vectors' rows that stay in the first-level cache

  static void arrange(Rows<const float> x, std::size_t count, std::size_t columns, std::uint8_t* out) {
    const std::size_t wide = panel_steps(columns) * kPanelStep;
    std::memset(out, 0, kPanelRows * wide * sizeof(float));
    for (std::size_t t = 0; t < count; ++t) std::memcpy(out + t * wide * sizeof(float), x.row(t), columns * sizeof(float));
  }

  template <int Low, int High, int G>
  static void unpack_as(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    auto* out = reinterpret_cast<float*>(to.out);
    for_half_panels<Low, High, G>(w, row, column, to, [&](std::size_t half, std::size_t first, std::size_t steps, const auto& part) {
      __m256 scales[2 * kChunkSteps], zeros[2 * kChunkSteps];
      part.turned(w.scale, scales);
      if (w.zero) part.turned(w.zero, zeros);
      else std::fill_n(zeros, 2 * kChunkSteps, _mm256_set1_ps(implicit_zero(Low + High)));
      for (std::size_t s = 0; s < steps; ++s) {
        __m256i columns[8];
        part.step(s, columns);
        for (std::size_t k = 0; k < 8; ++k) {
          const std::size_t at = (G == 16 ? k / 4 * kChunkSteps : 0) + s;
#pragma GCC unroll 4
          for (std::size_t j = 0; j < 4; ++j) {
            const __m256i code = _mm256_and_si256(_mm256_srli_epi32(columns[k], static_cast<int>(8 * j)), _mm256_set1_epi32(255));
            const __m256 value = _mm256_mul_ps(scales[at], _mm256_sub_ps(_mm256_cvtepi32_ps(code), zeros[at]));
            _mm256_storeu_ps(out + ((first + s) * kPanelStep + 4 * k + j) * kPanelRows + half, value);
          }
        }
      }
    });
  }

  static void unpack(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    with_planes(w.bits, [&](auto planes) {
      with_group(w.group, [&](auto group) { unpack_as<planes.low, planes.high, group.value>(w, row, column, to); });
    });
  }

  // Rows of elements of a type, `stride` elements apart.
  template <Type Element>
  static void copy_as(const std::uint8_t* from, std::size_t stride, const PanelRows& to) {
    constexpr std::size_t kSize = element_size(Element);
    auto* out = reinterpret_cast<float*>(to.out);
    if (to.count < kPanelRows || to.columns % kPanelStep)
      std::memset(out, 0, panel_steps(to.columns) * kPanelStep * kPanelRows * sizeof(float));
    for (std::size_t half = 0; half < to.count; half += kHalfPanel) {
      const std::size_t count = to.count - half < kHalfPanel ? to.count - half : kHalfPanel;
      const std::uint8_t* row = from + half * stride * kSize;
      std::size_t c = 0;
      for (; c + 8 <= to.columns; c += 8) {
        __m256i rows[kHalfPanel];
        for (std::size_t i = 0; i < kHalfPanel; ++i)
          rows[i] = i < count ? _mm256_castps_si256(load_as<Avx2Floats, Element>(row + (i * stride + c) * kSize))
                              : _mm256_setzero_si256();
        transpose(rows);
        for (std::size_t j = 0; j < 8; ++j) store_vector(out + (c + j) * kPanelRows + half, rows[j]);
      }
      for (; c < to.columns; ++c)
        for (std::size_t i = 0; i < count; ++i)
          out[c * kPanelRows + half + i] = one_as<Avx2Floats, Element>(row + (i * stride + c) * kSize);
    }
  }

  static void copy(const DenseMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    with_float_type(w.type, [&](auto type) {
      const std::size_t at = (row * w.columns + column) * element_size(type.value);
      copy_as<type.value>(static_cast<const std::uint8_t*>(w.data) + at, w.columns, to);
    });
  }
  static void round(Rows<const float> rows, const PanelRows& to) {
    copy_as<Type::f32>(reinterpret_cast<const std::uint8_t*>(rows.data), rows.stride, to);
  }

  // Two vectors of rows of weights, `apart` floats from each other, with four rows of x; sums likewise.
  template <int V>
  static MPO_INLINE void tile(const float* w, std::size_t apart, const float* x, std::size_t wide, std::size_t columns,
                              float* sums, std::size_t sums_apart, bool fresh) {
    F own[V * kTileTokens];
#pragma GCC unroll 8
    for (std::size_t i = 0; i < V * kTileTokens; ++i)
      own[i] = fresh ? X::zero() : X::load(sums + i / kTileTokens * sums_apart + i % kTileTokens * kPanelRows);
    for (std::size_t c = 0; c < columns; ++c) {
      F weights[V];
      for (std::size_t v = 0; v < V; ++v) weights[v] = X::load(w + v * apart + c * kPanelRows);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t) {
        const F value = X::broadcast(x[t * wide + c]);
        for (std::size_t v = 0; v < V; ++v) own[v * kTileTokens + t] = X::fma(weights[v], value, own[v * kTileTokens + t]);
      }
    }
#pragma GCC unroll 8
    for (std::size_t i = 0; i < V * kTileTokens; ++i)
      X::store(sums + i / kTileTokens * sums_apart + i % kTileTokens * kPanelRows, own[i]);
  }

  template <int V>
  static MPO_INLINE void all_rows(const PanelProduct& product, std::size_t panel, std::size_t begin, std::size_t columns) {
    const std::size_t wide = product.steps * kPanelStep, size = wide * kPanelRows;
    const std::size_t sums = panel_count(product.rows) * kPanelSums;
    const std::size_t apart = kLanes < kPanelRows ? kLanes : size, sums_apart = kLanes < kPanelRows ? kLanes : sums;
    const float* w = reinterpret_cast<const float*>(product.w) + panel * size + begin * kPanelRows;
    const float* x = reinterpret_cast<const float*>(product.x) + begin;
    for (std::size_t t = 0; t < product.rows; t += kTileTokens)
      tile<V>(w, apart, x + t * wide, wide, columns, product.sums + panel * sums + t * kPanelRows, sums_apart,
              product.fresh && begin == 0);
  }

  static void multiply(const PanelProduct& product) {
    constexpr std::size_t kPanels = kLanes < kPanelRows ? 1 : 2;  // of two vectors
    const std::size_t wide = product.steps * kPanelStep;
    for (std::size_t begin = 0; begin < wide; begin += kNear) {
      const std::size_t columns = wide - begin < kNear ? wide - begin : kNear;
      std::size_t p = 0;
      for (; p + kPanels <= product.panels; p += kPanels) all_rows<2>(product, p, begin, columns);
      if constexpr (kPanels == 2)
        if (p < product.panels) all_rows<1>(product, p, begin, columns);
    }
  }
};

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

template <class X>
constexpr PanelKernels make_float_panels() {
  using P = FloatPanels<X>;
  return {P::kBytes, P::kBytes, P::arrange, P::unpack, P::copy, P::round, P::multiply, add_panel_sums};
}

}  // namespace
}  // namespace mpo
