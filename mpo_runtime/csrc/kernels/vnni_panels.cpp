// Panels of int8 for AVX-512 VNNI, and of float32 for AVX-512 (see panels.hpp).
#include "kernels/panels.hpp"

#if MPO_X86

#include <algorithm>
#include <type_traits>

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX512)

#include "kernels/float_panels.hpp"
#include "kernels/integer_panels.hpp"
#include "vectors/avx512.hpp"

namespace mpo {
namespace {

// -- whole panels

// The scales or zeros of the 16 steps of a row.
template <int G>
MPO_INLINE __m512i of_steps(const std::uint16_t* from) {
  __m256i raw;
  if constexpr (G == 32) raw = load_vector(from);
  else if constexpr (G == 64) raw = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  else {
    std::uint64_t few = 0;
    std::memcpy(&few, from, 2 * kPanelChunk / G);
    raw = _mm256_castsi128_si256(_mm_cvtsi64_si128(static_cast<long long>(few)));
  }
  constexpr auto at = [](int step) { return static_cast<short>(step * 32 / G); };
  const __m256i order = _mm256_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11),
                                          at(12), at(13), at(14), at(15));
  return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_permutexvar_epi16(order, raw)));
}

// 16 rows of a chunk of 512 columns, as IntegerPanels::unpack() makes them.
template <int Low, int High, int G, PanelOrder Order>
void unpack_whole(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
  constexpr int kPacked = Order == natural ? 8 : Low;
  constexpr std::size_t kFields = 8 / kPacked, kBytes = kPanelChunk / kFields;  // of a row
  const IntegerPanel panel(to.out, panel_steps(kPanelChunk));
  alignas(64) std::uint8_t codes[kPacked == Low ? 1 : kPanelRows * kPanelChunk];
  const std::size_t at = row * w.columns + column;
  const std::uint8_t *low = w.low + at / 8 * Low, *high = High ? w.high + at / 8 * High : nullptr;
  const std::size_t low_step = w.columns / 8 * Low, high_step = w.columns / 8 * High, groups = w.columns / G;
  for (std::size_t i = 0; i < kPanelRows && to.ahead; ++i) {
    Avx2Floats::prefetch_lines(low + i * low_step + to.ahead / 8 * Low, kPanelChunk / 8 * Low);
    if (High) Avx2Floats::prefetch_lines(high + i * high_step + to.ahead / 8 * High, kPanelChunk / 8 * High);
    Avx2Floats::prefetch_lines(w.scale + at / G + i * groups + to.ahead / G, 2 * kPanelChunk / G);
  }
  if constexpr (kPacked != Low)
    for (std::size_t i = 0; i < kPanelRows; ++i)
      Avx2Floats::spread<Low, High>(low + i * low_step, High ? high + i * high_step : nullptr, kPanelChunk, codes + i * kPanelChunk);
  const std::uint8_t* from = kPacked == Low ? low : codes;
  const std::size_t step = kPacked == Low ? low_step : kPanelChunk;
  for (std::size_t v = 0; v < kBytes / 64; ++v) {
    __m512i rows[kPanelRows];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kPanelRows; ++i) rows[i] = _mm512_loadu_si512(from + i * step + 64 * v);
    transpose(rows);
    std::uint8_t* out = panel.codes + v * 16 * kFields * 64;
#pragma GCC unroll 16
    for (std::size_t k = 0; k < kPanelRows; ++k)
#pragma GCC unroll 4
      for (std::size_t f = 0; f < kFields; ++f, out += 64)
        _mm512_storeu_si512(out, kPacked == 8 ? rows[k]
                                              : _mm512_and_si512(_mm512_srli_epi32(rows[k], static_cast<int>(f) * kPacked),
                                                                 _mm512_set1_epi8((1 << kPacked) - 1)));
  }
  const auto put = [&](const std::uint16_t* values, float* out) {
    __m512i rows[kPanelRows];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kPanelRows; ++i) rows[i] = of_steps<G>(values + at / G + i * groups);
    transpose(rows);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kPanelRows; ++i) _mm512_storeu_si512(out + i * kPanelRows, rows[i]);
  };
  put(w.scale, panel.scales);
  if (w.zero) put(w.zero, panel.zeros);
}

template <PanelOrder Order>
void unpack(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
  if (to.count < kPanelRows || to.columns < kPanelChunk || w.group == 16)
    return IntegerPanels<Order, false>::unpack(w, row, column, to);
  with_planes(w.bits, [&](auto planes) {
    constexpr int low = planes.low, high = planes.high;
    if constexpr (panel_order(low + high) == Order)
      with_group(w.group, [&](auto group) {
        if constexpr (group.value != 16) unpack_whole<low, high, group.value, Order>(w, row, column, to);
      });
  });
}

// -- products

// P panels with four rows of x. Sums of the codes of a step, or of half of it, are scaled by the weights' and by x's scale,
// by the operations of PairedChunks::pair().
template <int P, bool Halves, bool Zeros, bool Lanes>
MPO_INLINE void tile(const IntegerPanel* w, const IntegerGroup& x, const PanelProduct& product, float* sums) {
  constexpr std::size_t kParts = Halves ? 2 : 1, kQuads = 8 / kParts;  // of a step; vectors of four columns of a part
  const std::size_t steps = product.steps, wide = steps * kPanelStep, lane = panel_count(product.rows) * kPanelSums;
  const std::size_t apart = Lanes ? kPanelLanes * lane : lane;  // of panels
  const __m512 middle = _mm512_set1_ps(implicit_zero(product.codes.bits));
  __m512 totals[P][kTileTokens];
  const auto load = [&](const float* from) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t)
        totals[p][t] = product.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(from + p * apart + t * kPanelRows);
  };
  const auto store = [&](float* to) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t) _mm512_storeu_ps(to + p * apart + t * kPanelRows, totals[p][t]);
  };
  if (!Lanes) load(sums);
  for (std::size_t part = 0; part < kParts * steps; ++part) {
    __m512i dots[P][kTileTokens];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (std::size_t t = 0; t < kTileTokens; ++t) dots[p][t] = _mm512_setzero_si512();
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
        for (int p = 0; p < P; ++p) dots[p][t] = _mm512_dpbusd_epi32(dots[p][t], weights[p], codes);
      }
    }
    if (Lanes) load(sums + part * lane);
    const float* x_sums = Halves ? x.half_sums : x.sums;
#pragma GCC unroll 4
    for (std::size_t t = 0; t < kTileTokens; ++t) {
      const __m512 x_scale = _mm512_set1_ps(x.scales[t * steps + part / kParts]);
      __m512 x_sum = _mm512_set1_ps(x_sums[t * kParts * steps + part]);
      if constexpr (!Zeros) x_sum = _mm512_mul_ps(middle, x_sum);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        __m512 own = x_sum;
        if constexpr (Zeros) own = _mm512_mul_ps(_mm512_loadu_ps(w[p].zeros + part * kPanelRows), own);
        const __m512 product = _mm512_fmsub_ps(_mm512_cvtepi32_ps(dots[p][t]), x_scale, own);
        totals[p][t] = _mm512_fmadd_ps(_mm512_loadu_ps(w[p].scales + part * kPanelRows), product, totals[p][t]);
      }
    }
    if (Lanes) store(sums + part * lane);
  }
  if (!Lanes) store(sums);
}

template <int P, bool Halves, bool Zeros, bool Lanes>
void all_rows(const PanelProduct& product, std::size_t panel) {
  const std::size_t steps = product.steps, sums = panel_count(product.rows) * kPanelSums * (Lanes ? kPanelLanes : 1);
  const auto of = [&](std::size_t p) {
    return IntegerPanel(const_cast<std::uint8_t*>(product.w) + p * steps * IntegerPanel::kBytes, steps);
  };
  const IntegerPanel w[2] = {of(panel), of(panel + P - 1)};
  for (std::size_t t = 0; t < product.rows; t += kTileTokens) {
    const IntegerGroup group(const_cast<std::uint8_t*>(product.x) + t / kPanelRows * steps * IntegerGroup::kBytes, steps);
    tile<P, Halves, Zeros, Lanes>(w, group.from(t % kPanelRows, steps), product, product.sums + panel * sums + t * kPanelRows);
  }
}

template <bool Halves, bool Zeros, bool Lanes>
void all_panels(const PanelProduct& product) {
  std::size_t p = 0;
  for (; p + 2 <= product.panels; p += 2) all_rows<2, Halves, Zeros, Lanes>(product, p);
  if (p < product.panels) all_rows<1, Halves, Zeros, Lanes>(product, p);
}

template <bool Halves, bool Zeros>
void multiply_as(const PanelProduct& product) {
  product.lanes ? all_panels<Halves, Zeros, true>(product) : all_panels<Halves, Zeros, false>(product);
}

void multiply(const PanelProduct& product) {
  const PanelCodes codes = product.codes;
  if (codes.halves) codes.zeros ? multiply_as<true, true>(product) : multiply_as<true, false>(product);
  else codes.zeros ? multiply_as<false, true>(product) : multiply_as<false, false>(product);
}

// Adds the lanes up as Avx512Floats::total() does, lane i of a single row's sum being that of block paired_block(i).
void add_lanes(const float* sums, std::size_t groups, PanelCodes codes, const Task& task) {
  const int low = width_of("panels", codes.bits).low;
  std::size_t blocks[kPanelLanes];
  for (std::size_t i = 0; i < kPanelLanes; ++i)
    blocks[i] = static_cast<std::size_t>(paired_block(low, static_cast<int>(i))) * groups * kPanelSums;
  for (std::size_t r = task.begin; r < task.end; r += kPanelRows, sums += kPanelLanes * groups * kPanelSums) {
    const std::size_t height = task.end - r < kPanelRows ? task.end - r : kPanelRows;
    for (std::size_t t = 0; t < task.count; ++t) {
      __m512 lanes[kPanelLanes];
      for (std::size_t i = 0; i < kPanelLanes; ++i) lanes[i] = _mm512_loadu_ps(sums + blocks[i] + t * kPanelRows);
      for (std::size_t i = 0; i < 8; ++i) lanes[i] = _mm512_add_ps(lanes[i + 8], lanes[i]);
      for (std::size_t i = 0; i < 4; ++i) lanes[i] = _mm512_add_ps(lanes[i], lanes[i + 4]);
      for (std::size_t i = 0; i < 2; ++i) lanes[i] = _mm512_add_ps(lanes[i], lanes[i + 2]);
      float* y = task.y.row(task.first + t) + r;
      float rest[kPanelRows] = {};  // as y where fewer than 16 rows are left
      float* place = height < kPanelRows ? rest : y;
      if (height < kPanelRows) std::memcpy(rest, y, height * sizeof(float));
      const __m512 before = task.accumulate ? _mm512_loadu_ps(place) : _mm512_setzero_ps();
      _mm512_storeu_ps(place, _mm512_add_ps(before, _mm512_add_ps(lanes[0], lanes[1])));
      if (height < kPanelRows) std::memcpy(y, rest, height * sizeof(float));
    }
  }
}

template <PanelOrder Order>
constexpr PanelKernels make_integers() {
  using P = IntegerPanels<Order, false>;
  return {IntegerGroup::kBytes, IntegerPanel::kBytes, P::arrange, unpack<Order>, nullptr, nullptr, multiply, add_panel_sums,
          add_lanes};
}

constexpr PanelKernels kIntegers[panel_orders] = {make_integers<natural>(), make_integers<nibbles>(),
                                                  make_integers<pairs_of_bits>()};
constexpr PanelKernels kFloats = make_float_panels<Avx512Floats>();

}  // namespace

extern const PanelSet kVnniPanels = {{&kIntegers[0], &kIntegers[1], &kIntegers[2]}, &kFloats, &kFloats, &kFloats};
extern const PanelSet kAvx512FloatPanels = {{&kFloats, &kFloats, &kFloats}, &kFloats, &kFloats, &kFloats};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
