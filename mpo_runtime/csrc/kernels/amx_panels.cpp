// AMX-BF16: products of 16 rows of weights with 16 rows of x, 32 columns at a time (see panels.hpp).
#include "kernels/panels.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AMX)

#include "vectors/avx512.hpp"
#include "vectors/tiles.hpp"

namespace mpo {
namespace {

constexpr std::size_t kTile = kPanelSums;
constexpr std::size_t kStepValues = kPanelRows * kPanelStep;
constexpr std::size_t kStepBytes = kStepValues * sizeof(std::uint16_t);
constexpr std::size_t kChunk = 256, kRows = 2 * kPanelRows;  // panels of that size stay in the first-level cache

// -- bf16

MPO_INLINE __m256i to_bf16(__m512 values) {
#if defined(MPO_EMULATED_INTRINSICS)
  float from[16];
  std::uint16_t to[16];
  std::memcpy(from, &values, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = float_to_bf16(from[i]);
  __m256i out;
  std::memcpy(&out, to, sizeof out);
  return out;
#else
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
#endif
}

MPO_INLINE __m512 from_bf16(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

MPO_INLINE void put_half(std::uint16_t* to, __m256i values) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values); }

// -- x

// Groups [steps, 16 pairs of columns, 16 rows, 2]; with Pairs another such block follows, of what rounding left.
template <bool Pairs>
void arrange(Rows<const float> x, std::size_t count, std::size_t columns, std::uint8_t* out) {
  auto* high = reinterpret_cast<std::uint16_t*>(out);
  std::uint16_t* low = Pairs ? high + panel_steps(columns) * kStepValues : nullptr;
  for (std::size_t c = 0; c < columns; c += kPanelStep, high += kStepValues) {
    __m512i highs[kPanelRows], lows[kPanelRows];
    for (std::size_t t = 0; t < kPanelRows; ++t) {
      highs[t] = lows[t] = _mm512_setzero_si512();
      if (t >= count) continue;
      alignas(64) float rest[kPanelStep];
      const float* from = x.row(t) + c;
      if (columns - c < kPanelStep) {
        std::memset(rest, 0, sizeof rest);
        std::memcpy(rest, from, (columns - c) * sizeof(float));
        from = rest;
      }
      const __m512 values[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
      const __m256i near[2] = {to_bf16(values[0]), to_bf16(values[1])};
      highs[t] = _mm512_inserti64x4(_mm512_castsi256_si512(near[0]), near[1], 1);
      if (!low) continue;
      const __m256i left[2] = {to_bf16(_mm512_sub_ps(values[0], from_bf16(near[0]))),
                               to_bf16(_mm512_sub_ps(values[1], from_bf16(near[1])))};
      lows[t] = _mm512_inserti64x4(_mm512_castsi256_si512(left[0]), left[1], 1);
    }
    transpose(highs);
    for (std::size_t j = 0; j < kPanelRows; ++j) _mm512_storeu_si512(high + j * kPanelStep, highs[j]);
    if (!low) continue;
    transpose(lows);
    for (std::size_t j = 0; j < kPanelRows; ++j) _mm512_storeu_si512(low + j * kPanelStep, lows[j]);
    low += kStepValues;
  }
}

// -- weights: panels [steps, 16 rows, 32 columns]

MPO_INLINE std::uint16_t* values(const PanelRows& to) { return reinterpret_cast<std::uint16_t*>(to.out); }

MPO_INLINE void clear_missing(const PanelRows& to) {
  if (to.count == kPanelRows && to.columns % kPanelStep == 0) return;
  std::memset(to.out, 0, panel_steps(to.columns) * kStepBytes);
}

MPO_INLINE __m512 spread_half(const std::uint16_t* from) { return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(*from))); }

// 16 codes as scale * (code - zero).
MPO_INLINE __m256i scaled(const std::uint8_t* codes, __m512 scale, __m512 zero) {
  const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  return to_bf16(_mm512_mul_ps(_mm512_sub_ps(values, zero), scale));
}

// What the codes of a group stand for, as bf16: looked up by codes of up to 6 bits.
template <int Bits>
struct Table {
  __m512i first, second;

  MPO_INLINE Table(__m512 scale, __m512 zero) {
    first = half(0, scale, zero);
    second = Bits > 5 ? half(32, scale, zero) : first;
  }
  // 32 numbers from a code on; up to 4 bits twice the same 16, so that a fifth bit of a code may be anything.
  static MPO_INLINE __m512i half(int begin, __m512 scale, __m512 zero) {
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 low = _mm512_add_ps(steps, _mm512_set1_ps(static_cast<float>(begin)));
    const __m512 high = Bits > 4 ? _mm512_add_ps(low, _mm512_set1_ps(16.0f)) : low;
    const __m256i parts[2] = {to_bf16(_mm512_mul_ps(_mm512_sub_ps(low, zero), scale)),
                              to_bf16(_mm512_mul_ps(_mm512_sub_ps(high, zero), scale))};
    return _mm512_inserti64x4(_mm512_castsi256_si512(parts[0]), parts[1], 1);
  }
  MPO_INLINE __m512i at(__m512i codes) const {
    if constexpr (Bits > 5) return _mm512_permutex2var_epi16(first, codes, second);
    else return _mm512_permutexvar_epi16(codes, first);
  }
};

// Rows whose groups are whole steps, `Steps` of them.
template <int Low, int High, std::size_t Steps>
void look_up_rows(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
  constexpr bool kNibbles = Low == 4 && High == 0;
  constexpr std::size_t kGroup = Steps * kPanelStep;
  alignas(64) std::uint8_t codes[kPanelChunk];
  for (std::size_t ahead = 0; ahead <= to.ahead; ahead += kChunk)
    for (std::size_t i = 0; i < to.count; ++i) {
      const std::size_t at = (row + i) * w.columns + column + ahead;
      Avx2Floats::prefetch_lines(w.low + at / 8 * Low, kChunk / 8 * Low);
      if (High) Avx2Floats::prefetch_lines(w.high + at / 8 * High, kChunk / 8 * High);
    }
  const std::size_t groups = (to.columns + kGroup - 1) / kGroup;
  const __m512 middle = _mm512_set1_ps(implicit_zero(Low + High));
  for (std::size_t i = 0; i < to.count; ++i) {
    const std::size_t at = (row + i) * w.columns + column;
    const std::uint8_t* low = w.low + at / 8 * Low;
    if constexpr (!kNibbles) Avx2Floats::spread<Low, High>(low, High ? w.high + at / 8 * High : nullptr, to.columns, codes);
    const std::uint16_t *scales = w.scale + at / kGroup, *zeros = w.zero ? w.zero + at / kGroup : nullptr;
    std::uint16_t* out = values(to) + i * kPanelStep;
    for (std::size_t g = 0; g < groups; ++g, out += Steps * kStepValues) {
      const Table<Low + High> table(spread_half(scales + g), zeros ? spread_half(zeros + g) : middle);
      for (std::size_t k = 0; k < Steps; ++k) {
        const std::size_t c = (g * Steps + k) * kPanelStep;
        __m512i index;
        if constexpr (kNibbles) {
          index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + c / 2)));
          index = _mm512_or_si512(index, _mm512_slli_epi32(index, 12));
        } else {
          index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + c)));
        }
        _mm512_storeu_si512(out + k * kStepValues, table.at(index));
      }
    }
  }
}

template <int Low, int High>
void unpack_rows(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
  alignas(64) std::uint8_t codes[kPanelChunk];
  for (std::size_t i = 0; i < to.count; ++i) {
    const std::size_t at = (row + i) * w.columns + column;
    Avx2Floats::spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, to.columns, codes);
    std::uint16_t* out = values(to) + i * kPanelStep;
    for (std::size_t c = 0; c < to.columns; c += w.group) {
      const std::size_t group = (at + c) / w.group, end = c + w.group < to.columns ? c + w.group : to.columns;
      const __m512 scale = _mm512_set1_ps(Avx2Floats::half(w.scale + group));
      const __m512 zero = _mm512_set1_ps(w.zero ? Avx2Floats::half(w.zero + group) : implicit_zero(Low + High));
      for (std::size_t k = c; k < end; k += 16)
        put_half(out + k / kPanelStep * kStepValues + k % kPanelStep, scaled(codes + k, scale, zero));
    }
  }
}

void unpack(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
  clear_missing(to);
  with_planes(w.bits, [&](auto planes) {
    if constexpr (planes.low != 8)
      switch (to.columns % w.group ? 0 : w.group) {
        case 32: return look_up_rows<planes.low, planes.high, 1>(w, row, column, to);
        case 64: return look_up_rows<planes.low, planes.high, 2>(w, row, column, to);
        case 128: return look_up_rows<planes.low, planes.high, 4>(w, row, column, to);
        case 256: return look_up_rows<planes.low, planes.high, 8>(w, row, column, to);
      }
    unpack_rows<planes.low, planes.high>(w, row, column, to);
  });
}

void copy(const DenseMatrix& w, std::size_t row, std::size_t column, const PanelRows& to) {
  clear_missing(to);
  for (std::size_t i = 0; i < to.count; ++i) {
    const std::uint8_t* from = static_cast<const std::uint8_t*>(w.data) + ((row + i) * w.columns + column) * 2;
    std::uint16_t* out = values(to) + i * kPanelStep;
    std::size_t c = 0;
    for (; c + kPanelStep <= to.columns; c += kPanelStep, out += kStepValues) std::memcpy(out, from + c * 2, kPanelStep * 2);
    if (c < to.columns) std::memcpy(out, from + c * 2, (to.columns - c) * 2);
  }
}

void round(Rows<const float> rows, const PanelRows& to) {
  clear_missing(to);
  for (std::size_t i = 0; i < to.count; ++i) {
    std::uint16_t* out = values(to) + i * kPanelStep;
    const float* from = rows.row(i);
    std::size_t c = 0;
    for (; c + 16 <= to.columns; c += 16)
      put_half(out + c / kPanelStep * kStepValues + c % kPanelStep, to_bf16(_mm512_loadu_ps(from + c)));
    for (; c < to.columns; ++c) out[c / kPanelStep * kStepValues + c % kPanelStep] = float_to_bf16(from[c]);
  }
}

// -- products

// P panels of weights times G groups of x: tiles 0 to 3 hold their sums, 4 and 5 the weights, 6 and 7 x. With Pairs what
// rounding left of x is multiplied too.
template <bool Pairs, int P, int G>
MPO_INLINE void multiply_block(const PanelProduct& product, std::size_t p, std::size_t g) {
  const std::size_t steps = product.steps, size = steps * kStepValues, groups = panel_count(product.rows);
  const auto* w0 = reinterpret_cast<const std::uint16_t*>(product.w) + p * size;
  const auto* x0 = reinterpret_cast<const std::uint16_t*>(product.x) + g * size * (Pairs ? 2 : 1);
  const std::uint16_t *w1 = w0 + size, *x1 = x0 + size * (Pairs ? 2 : 1);
  float *sums0 = product.sums + (p * groups + g) * kTile, *sums1 = sums0 + groups * kTile;
  if (product.fresh) {
    _tile_zero(0);
    if (G > 1) _tile_zero(1);
    if (P > 1) _tile_zero(2);
    if (P > 1 && G > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums0, 64);
    if (G > 1) _tile_loadd(1, sums0 + kTile, 64);
    if (P > 1) _tile_loadd(2, sums1, 64);
    if (P > 1 && G > 1) _tile_loadd(3, sums1 + kTile, 64);
  }
  for (int part = 0; part < (Pairs ? 2 : 1); ++part, x0 += size, x1 += size)
    for (std::size_t at = 0; at < size; at += kStepValues) {
      _tile_loadd(4, w0 + at, 64);
      _tile_loadd(6, x0 + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (G > 1) {
        _tile_loadd(7, x1 + at, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (P > 1) {
        _tile_loadd(5, w1 + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (G > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, sums0, 64);
  if (G > 1) _tile_stored(1, sums0 + kTile, 64);
  if (P > 1) _tile_stored(2, sums1, 64);
  if (P > 1 && G > 1) _tile_stored(3, sums1 + kTile, 64);
}

template <bool Pairs, int P>
MPO_INLINE void multiply_panels(const PanelProduct& product, std::size_t p) {
  const std::size_t groups = panel_count(product.rows);
  std::size_t g = 0;
  for (; g + 2 <= groups; g += 2) multiply_block<Pairs, P, 2>(product, p, g);
  if (g < groups) multiply_block<Pairs, P, 1>(product, p, g);
}

template <bool Pairs>
void multiply(const PanelProduct& product) {
  const Tiles configured;
  std::size_t p = 0;
  for (; p + 2 <= product.panels; p += 2) multiply_panels<Pairs, 2>(product, p);
  if (p < product.panels) multiply_panels<Pairs, 1>(product, p);
}

// Token by token, so that what is written lies together.
void add(const float* sums, std::size_t groups, const Task& task) {
  for (std::size_t g = 0; g < groups; ++g) {
    const float* from = sums + g * kTile;
    for (std::size_t r = task.begin; r < task.end; r += kPanelRows, from += groups * kTile) {
      const std::size_t height = task.end - r < kPanelRows ? task.end - r : kPanelRows;
      __m512i rows[kPanelRows];
      for (std::size_t i = 0; i < kPanelRows; ++i) rows[i] = _mm512_loadu_si512(from + i * kPanelRows);
      transpose(rows);
      for (std::size_t t = 0; t < kPanelRows && g * kPanelRows + t < task.count; ++t) {
        float* y = task.y.row(task.first + g * kPanelRows + t) + r;
        const __m512 total = _mm512_castsi512_ps(rows[t]);
        if (height == kPanelRows) {
          _mm512_storeu_ps(y, task.accumulate ? _mm512_add_ps(_mm512_loadu_ps(y), total) : total);
          continue;
        }
        float values[kPanelRows];
        _mm512_storeu_ps(values, total);
        for (std::size_t i = 0; i < height; ++i) y[i] = task.accumulate ? y[i] + values[i] : values[i];
      }
    }
  }
}

constexpr PanelKernels kRounded = {kStepBytes, kStepBytes, arrange<false>, unpack, copy, round, multiply<false>, add, nullptr, kChunk, kRows};
constexpr PanelKernels kPairs = {2 * kStepBytes, kStepBytes, arrange<true>, nullptr, copy, round, multiply<true>, add, nullptr, kChunk, kRows};

}  // namespace

extern const PanelSet kAmxPanels = {{&kRounded, &kRounded, &kRounded}, &kRounded, &kPairs, nullptr, 256};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
