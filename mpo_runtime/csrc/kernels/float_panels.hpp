// Panels of float32, written over the vectors X of an instruction set. Included after the target is set (see target.hpp).
#pragma once

#include "kernels/panels_body.hpp"
#include "vectors/elements.hpp"

namespace mpo {
namespace {

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

template <class X>
constexpr PanelKernels make_float_panels() {
  using P = FloatPanels<X>;
  return {P::kBytes, P::kBytes, P::arrange, P::unpack, P::copy, P::round, P::multiply, add_panel_sums, nullptr};
}

}  // namespace
}  // namespace mpo
