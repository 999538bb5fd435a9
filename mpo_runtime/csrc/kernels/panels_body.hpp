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
    prefetch(low + ahead / 8 * Low, 32 * Low);
    if (High) prefetch(high + ahead / 8 * High, 32 * High);
    prefetch(reinterpret_cast<const std::uint8_t*>(w_.scale + (at + ahead) / G), 2 * kChunk / G);
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

// -- int8

// The memory of a panel of weights: codes [steps, 8, 16 rows, 4 columns], then for each step or half step and row a scale,
// and a zero where they are stored.
struct IntegerPanel {
  static constexpr std::size_t kCodes = kPanelRows * kPanelStep, kBytes = kCodes + 4 * kPanelRows * sizeof(float);

  std::uint8_t* codes;
  float *scales, *zeros;

  MPO_INLINE IntegerPanel(std::uint8_t* at, std::size_t steps)
      : codes(at), scales(reinterpret_cast<float*>(at + steps * kCodes)), zeros(scales + 2 * kPanelRows * steps) {}
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

  // Without the rows before `row`.
  MPO_INLINE IntegerGroup from(std::size_t row, std::size_t steps) const {
    IntegerGroup rest = *this;
    rest.codes += row * steps * kPanelStep, rest.scales += row * steps, rest.sums += row * steps;
    rest.half_sums += row * 2 * steps;
    return rest;
  }
};

// Weights are q as unsigned bytes. With Signed8 those of 8 bits are q - 128 as signed ones, and their zeros are less by as
// much. x is signed.
template <PanelOrder Order, bool Signed8>
struct IntegerPanels {
  // The zero of groups that store none, in the codes of a panel.
  static constexpr float middle(int bits) { return Signed8 && bits == 8 ? 0.0f : implicit_zero(bits); }

  template <int Low, int High, int G>
  static void unpack_as(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    constexpr int kPacked = Order == nibbles ? 4 : Order == pairs_of_bits ? 2 : 8;
    constexpr bool kFlip = Signed8 && Low == 8;
    constexpr std::size_t kScales = G == 16 ? 2 : 1;  // of a step
    const IntegerPanel panel(to.out, panel_steps(to.columns));
    for_half_panels<Low, High, G, kPacked>(w, row, column, to, [&](std::size_t half, std::size_t first, std::size_t steps, const auto& part) {
      using Part = std::decay_t<decltype(part)>;
      std::uint8_t* codes = panel.codes + first * IntegerPanel::kCodes + 4 * half;
      const auto all_quads = [&](std::size_t count) {
#pragma GCC unroll 1
        for (std::size_t v = 0; v < Part::kVectors; ++v) {
          __m256i quads[Part::kQuads];
          part.quads(v, quads);
#pragma GCC unroll 32
          for (std::size_t k = 0; k < Part::kQuads; ++k) {
            if (v * Part::kQuads + k >= count) return;
            store_vector(codes + (v * Part::kQuads + k) * 4 * kPanelRows,
                         kFlip ? _mm256_xor_si256(quads[k], _mm256_set1_epi8(-128)) : quads[k]);
          }
        }
      };
      if (steps == kChunkSteps) all_quads(8 * kChunkSteps);
      else all_quads(8 * steps);
      const auto put = [&](const std::uint16_t* from, float* out, float less) {
        __m256 values[2 * kChunkSteps];
        part.turned(from, values);
        for (std::size_t s = 0; s < steps; ++s)
          for (std::size_t i = 0; i < kScales; ++i)
            _mm256_storeu_ps(out + (kScales * (first + s) + i) * kPanelRows + half,
                             _mm256_sub_ps(values[i * kChunkSteps + s], _mm256_set1_ps(less)));
      };
      put(w.scale, panel.scales, 0.0f);
      if (w.zero) put(w.zero, panel.zeros, kFlip ? 128.0f : 0.0f);
    });
  }

  static void unpack(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
    with_planes(w.bits, [&](auto planes) {
      constexpr int low = planes.low, high = planes.high;
      if constexpr (panel_order(low + high) == Order)
        with_group(w.group, [&](auto group) { unpack_as<low, high, group.value>(w, row, column, to); });
    });
  }

  // Codes of 32 columns in the order of a panel.
  static MPO_INLINE __m256i ordered(__m256i codes) {
    if constexpr (Order == natural) return codes;
    const __m128i order = Order == nibbles ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                           : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(order));
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
          store_vector(group.codes + t * wide + c + s * kPanelStep, ordered(load_vector(codes + s * kPanelStep)));
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
    for_half_panels<Low, High, G, 8>(w, row, column, to, [&](std::size_t half, std::size_t first, std::size_t steps, const auto& part) {
      __m256 scales[2 * kChunkSteps], zeros[2 * kChunkSteps];
      part.turned(w.scale, scales);
      if (w.zero) part.turned(w.zero, zeros);
      else std::fill_n(zeros, 2 * kChunkSteps, _mm256_set1_ps(implicit_zero(Low + High)));
      for (std::size_t s = 0; s < steps; ++s) {
        __m256i columns[8];
        part.quads(s, columns);
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
  return {P::kBytes, P::kBytes, P::arrange, P::unpack, P::copy, P::round, P::multiply, add_panel_sums, nullptr};
}

}  // namespace
}  // namespace mpo
