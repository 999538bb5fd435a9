// Panels of int8 and of float32 for AVX2 (see panels.hpp).
#include "kernels/panels.hpp"

#if MPO_X86

#include <algorithm>
#include <type_traits>

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX2)

#include "kernels/float_panels.hpp"
#include "kernels/integer_panels.hpp"

namespace mpo {
namespace {

// How many vectors of four columns fit a sum of 16 bits. A lane holds products of two columns, 2 * 127 * (2^bits - 1) each;
// of 8 bits, whose codes are signed, 2 * 127 * 128.
constexpr std::size_t quads_of(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

// A panel with T rows of x.
template <int Bits, bool Halves, std::size_t T>
MPO_INLINE void tile(const IntegerPanel& w, const IntegerGroup& x, const PanelProduct& product, float* sums) {
  constexpr std::size_t kParts = Halves ? 2 : 1, kQuads = 8 / kParts;
  constexpr std::size_t kRun = quads_of(Bits) < kQuads ? quads_of(Bits) : kQuads;
  const std::size_t steps = product.steps, wide = steps * kPanelStep;
  const bool zeros = product.codes.zeros;
  const __m256 middle = _mm256_set1_ps(IntegerPanels<natural, true>::middle(product.codes.bits));
  const __m256i ones = _mm256_set1_epi16(1);
  if (product.fresh)
    for (std::size_t t = 0; t < T; ++t) std::memset(sums + t * kPanelRows, 0, kPanelRows * sizeof(float));
  for (std::size_t part = 0; part < kParts * steps; ++part) {
    __m256i dots[2][T];
#pragma GCC unroll 8
    for (std::size_t begin = 0; begin < kQuads; begin += kRun) {
      __m256i run[2][T];
#pragma GCC unroll 8
      for (std::size_t k = 0; k < kRun; ++k) {
        const std::size_t quad = part * kQuads + begin + k;
        const std::uint8_t* codes = w.codes + quad * 4 * kPanelRows;
        const __m256i weights[2] = {load_vector(codes), load_vector(codes + 32)};
#pragma GCC unroll 4
        for (std::size_t t = 0; t < T; ++t) {
          std::int32_t four;
          std::memcpy(&four, x.codes + t * wide + quad * 4, 4);
          const __m256i value = _mm256_set1_epi32(four);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            __m256i product;
            if constexpr (Bits == 8)
              product = _mm256_maddubs_epi16(_mm256_abs_epi8(weights[v]), _mm256_sign_epi8(value, weights[v]));
            else product = _mm256_maddubs_epi16(weights[v], value);
            run[v][t] = k ? _mm256_add_epi16(run[v][t], product) : product;
          }
        }
      }
#pragma GCC unroll 4
      for (std::size_t t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const __m256i wider = _mm256_madd_epi16(run[v][t], ones);
          dots[v][t] = begin ? _mm256_add_epi32(dots[v][t], wider) : wider;
        }
    }
    const float* x_sums = Halves ? x.half_sums : x.sums;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const std::size_t at = part * kPanelRows + 8 * static_cast<std::size_t>(v);
      const __m256 scales = _mm256_loadu_ps(w.scales + at), zero = zeros ? _mm256_loadu_ps(w.zeros + at) : middle;
#pragma GCC unroll 4
      for (std::size_t t = 0; t < T; ++t) {
        float* total = sums + t * kPanelRows + 8 * v;
        const __m256 own = _mm256_mul_ps(zero, _mm256_set1_ps(x_sums[t * kParts * steps + part]));
        const __m256 x_scale = _mm256_set1_ps(x.scales[t * steps + part / kParts]);
        const __m256 product = _mm256_fmsub_ps(_mm256_cvtepi32_ps(dots[v][t]), x_scale, own);
        _mm256_storeu_ps(total, _mm256_fmadd_ps(scales, product, _mm256_loadu_ps(total)));
      }
    }
  }
}

template <int Bits, bool Halves>
void all_panels(const PanelProduct& product) {
  constexpr std::size_t kRows = quads_of(Bits) == 8 ? 4 : 2;  // of x: as many sums as there are registers
  const std::size_t steps = product.steps, apart = panel_count(product.rows) * kPanelSums;
  for (std::size_t p = 0; p < product.panels; ++p) {
    const IntegerPanel w(const_cast<std::uint8_t*>(product.w) + p * steps * IntegerPanel::kBytes, steps);
    for (std::size_t t = 0; t < product.rows; t += kRows) {
      const IntegerGroup group(const_cast<std::uint8_t*>(product.x) + t / kPanelRows * steps * IntegerGroup::kBytes, steps);
      tile<Bits, Halves, kRows>(w, group.from(t % kPanelRows, steps), product, product.sums + p * apart + t * kPanelRows);
    }
  }
}

template <int Bits>
void multiply_bits(const PanelProduct& product) {
  product.codes.halves ? all_panels<Bits, true>(product) : all_panels<Bits, false>(product);
}

void multiply(const PanelProduct& product) {
  switch (product.codes.bits) {
    case 8: return multiply_bits<8>(product);
    case 6: return multiply_bits<6>(product);
    case 5: return multiply_bits<5>(product);
    default: return multiply_bits<4>(product);
  }
}

template <PanelOrder Order>
constexpr PanelKernels make_integers() {
  using P = IntegerPanels<Order, true>;
  return {IntegerGroup::kBytes, IntegerPanel::kBytes, P::arrange, P::unpack, nullptr, nullptr, multiply, add_panel_sums,
          nullptr};
}

constexpr PanelKernels kIntegers[panel_orders] = {make_integers<natural>(), make_integers<nibbles>(),
                                                  make_integers<pairs_of_bits>()};
constexpr PanelKernels kFloats = make_float_panels<Avx2Floats>();

}  // namespace

extern const PanelSet kAvx2Panels = {{&kIntegers[0], &kIntegers[1], &kIntegers[2]}, &kFloats, &kFloats, &kFloats};
extern const PanelSet kAvx2FloatPanels = {{&kFloats, &kFloats, &kFloats}, &kFloats, &kFloats, &kFloats};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
