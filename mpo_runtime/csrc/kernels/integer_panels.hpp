// Panels of int8 with AVX2: how weights are unpacked and x is rounded; AVX-512 does it alike. Included after the target is set
// (see target.hpp).
#pragma once

#include "kernels/avx2_activations.hpp"
#include "kernels/panels_body.hpp"

namespace mpo {
namespace {

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

}  // namespace
}  // namespace mpo
