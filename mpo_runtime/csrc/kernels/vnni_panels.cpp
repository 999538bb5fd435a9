// Panels of int8 for AVX-512 VNNI, and of float32 for AVX-512 (see panels.hpp).
#include "kernels/panels.hpp"

#if MPO_X86

#include <algorithm>

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX512)

#include "kernels/panels_body.hpp"
#include "vectors/avx512.hpp"

namespace mpo {
namespace {

// P panels with four rows of x. Sums of the codes of a step, or of half of it, are scaled by the weights' and by x's scale.
template <int P, bool Halves, bool Zeros>
MPO_INLINE void tile(const IntegerPanel* w, const IntegerGroup& x, std::size_t steps, float* sums, std::size_t apart,
                     bool fresh) {
  constexpr std::size_t kParts = Halves ? 2 : 1, kQuads = 8 / kParts;  // of a step; vectors of four columns of a part
  const std::size_t wide = steps * kPanelStep;
  __m512 totals[P][kTileTokens];
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (std::size_t t = 0; t < kTileTokens; ++t)
      totals[p][t] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + p * apart + t * kPanelRows);
  for (std::size_t part = 0; part < kParts * steps; ++part) {
    __m512i dots[P][kTileTokens];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t) dots[p][t] = _mm512_loadu_si512(w[p].starts + part * kPanelRows);
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kQuads; ++k) {
      const std::size_t quad = part * kQuads + k;
      __m512i weights[P];
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) weights[p] = _mm512_loadu_si512(w[p].codes + quad * 4 * kPanelRows);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t) {
        std::int32_t four;
        std::memcpy(&four, x.codes + t * wide + quad * 4, 4);
        const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) dots[p][t] = _mm512_dpbusd_epi32(dots[p][t], codes, weights[p]);
      }
    }
    const float* x_sums = Halves ? x.half_sums : x.sums;
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
      const __m512 scales = _mm512_loadu_ps(w[p].scales + part * kPanelRows);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t) {
        const __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[t * steps + part / kParts]));
        totals[p][t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dots[p][t]), totals[p][t]);
        if constexpr (Zeros)
          totals[p][t] = _mm512_fmadd_ps(_mm512_loadu_ps(w[p].shifts + part * kPanelRows),
                                         _mm512_set1_ps(x_sums[t * kParts * steps + part]), totals[p][t]);
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (std::size_t t = 0; t < kTileTokens; ++t) _mm512_storeu_ps(sums + p * apart + t * kPanelRows, totals[p][t]);
}

template <int P, bool Halves, bool Zeros>
void all_rows(const PanelProduct& product, std::size_t panel) {
  const std::size_t steps = product.steps, apart = panel_count(product.rows) * kPanelSums;
  const auto of = [&](std::size_t p) {
    return IntegerPanel(const_cast<std::uint8_t*>(product.w) + p * steps * IntegerPanel::kBytes, steps);
  };
  const IntegerPanel w[2] = {of(panel), of(panel + P - 1)};
  for (std::size_t t = 0; t < product.rows; t += kTileTokens) {
    const std::size_t group = t / kPanelRows, row = t % kPanelRows;
    IntegerGroup x(const_cast<std::uint8_t*>(product.x) + group * steps * IntegerGroup::kBytes, steps);
    x.codes += row * steps * kPanelStep, x.scales += row * steps, x.sums += row * steps, x.half_sums += row * 2 * steps;
    tile<P, Halves, Zeros>(w, x, steps, product.sums + panel * apart + t * kPanelRows, apart, product.fresh);
  }
}

template <bool Halves, bool Zeros>
void all_panels(const PanelProduct& product) {
  std::size_t p = 0;
  for (; p + 2 <= product.panels; p += 2) all_rows<2, Halves, Zeros>(product, p);
  if (p < product.panels) all_rows<1, Halves, Zeros>(product, p);
}

void multiply(const PanelProduct& product) {
  const PanelCodes codes = product.codes;
  if (codes.halves) codes.zeros ? all_panels<true, true>(product) : all_panels<true, false>(product);
  else codes.zeros ? all_panels<false, true>(product) : all_panels<false, false>(product);
}

using Integers = IntegerPanels<true>;
constexpr PanelKernels kIntegers = {IntegerGroup::kBytes, IntegerPanel::kBytes, Integers::arrange, Integers::unpack, nullptr,
                                    nullptr, multiply, add_panel_sums};
constexpr PanelKernels kFloats = make_float_panels<Avx512Floats>();

}  // namespace

extern const PanelSet kVnniPanels = {&kIntegers, &kFloats, &kFloats, &kFloats};
extern const PanelSet kAvx512FloatPanels = {&kFloats, &kFloats, &kFloats, &kFloats};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
