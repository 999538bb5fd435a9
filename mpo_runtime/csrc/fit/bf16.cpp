// Products of bf16 pairs with AVX-512 BF16.
#include "fit/fit.hpp"
#include "fit/product.hpp"

#if MPO_X86 && !defined(MPO_EMULATED_INTRINSICS)

#include <cstring>

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_BF16)

namespace mpo {
namespace {

constexpr std::size_t kLanes = 16, kVectors = kTileRight / kLanes;

MPO_INLINE __m512i pairs_of(__m512 first, __m512 second) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Rows lie side by side in memory: vectors of 8 or 16 of them.
void arrange_rows(const StridedMatrix& from, std::size_t first, std::size_t width, std::size_t begin, std::size_t end,
                  std::uint32_t* out) {
  for (std::size_t k = begin; k < end; k += 2, out += width)
    for (std::size_t r = 0; r < width; r += kLanes) {
      const std::size_t here = first + r, lanes = width - r < kLanes ? width - r : kLanes;
      const std::size_t left = here < from.rows ? from.rows - here : 0, some = left < lanes ? left : lanes;
      const auto inside = static_cast<__mmask16>((1u << some) - 1);
      const float* const at = from.data + here + k * from.step;
      const __m512 low = _mm512_maskz_loadu_ps(inside, at);
      const __m512 high = k + 1 < end ? _mm512_maskz_loadu_ps(inside, at + from.step) : _mm512_setzero_ps();
      _mm512_mask_storeu_epi32(out + r, static_cast<__mmask16>((1u << lanes) - 1), pairs_of(low, high));
    }
}

// Columns lie side by side: 32 at a time are rounded, and their 16 pairs written one below the other.
void arrange_columns(const StridedMatrix& from, std::size_t first, std::size_t width, std::size_t begin, std::size_t end,
                     std::uint32_t* out) {
  constexpr std::size_t kColumns = 2 * kLanes;
  for (std::size_t k = begin; k < end; k += kColumns) {
    const std::size_t some = end - k < kColumns ? end - k : kColumns, pairs = (some + 1) / 2;
    const auto inside = static_cast<std::uint32_t>((std::uint64_t{1} << some) - 1);
    const auto low = static_cast<__mmask16>(inside), high = static_cast<__mmask16>(inside >> kLanes);
    for (std::size_t r = 0; r < width; ++r) {
      alignas(64) std::uint32_t rounded[kLanes] = {};
      if (first + r < from.rows) {
        const float* const at = from.data + (first + r) * from.row + k;
        const __m512 near = _mm512_maskz_loadu_ps(low, at), far = _mm512_maskz_loadu_ps(high, at + kLanes);
        _mm512_store_si512(rounded, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(far, near)));
      }
      std::uint32_t* const to = out + (k - begin) / 2 * width + r;
      for (std::size_t p = 0; p < pairs; ++p) to[p * width] = rounded[p];
    }
  }
}

void arrange(const StridedMatrix& from, std::size_t first, std::size_t width, std::size_t begin, std::size_t end,
             std::uint32_t* out) {
  if (from.step == 1)
    arrange_columns(from, first, width, begin, end, out);
  else
    arrange_rows(from, first, width, begin, end, out);
}

void tile(const std::uint32_t* left, const std::uint32_t* right, std::size_t count, float* c, std::size_t stride,
          std::size_t rows, std::size_t columns, bool add) {
  __m512 sums[kTileLeft][kVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (std::size_t k = 0; k < count; ++k, left += kTileLeft, right += kTileRight) {
    __m512bh pairs[kVectors];
    for (std::size_t u = 0; u < kVectors; ++u)
      pairs[u] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + u * kLanes));
    for (std::size_t m = 0; m < kTileLeft; ++m) {
      const auto one = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(left[m])));
      for (std::size_t u = 0; u < kVectors; ++u) sums[m][u] = _mm512_dpbf16_ps(sums[m][u], one, pairs[u]);
    }
  }
  for (std::size_t m = 0; m < rows; ++m)
    for (std::size_t u = 0; u < kVectors && u * kLanes < columns; ++u) {
      const std::size_t some = columns - u * kLanes;
      const auto inside = static_cast<__mmask16>(some < kLanes ? (1u << some) - 1 : 0xffffu);
      float* const at = c + m * stride + u * kLanes;
      const __m512 before = add ? _mm512_maskz_loadu_ps(inside, at) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(at, inside, _mm512_add_ps(before, sums[m][u]));
    }
}

void round(const float* from, std::size_t count, std::uint16_t* out) {
  for (std::size_t at = 0; at < count; at += kLanes) {
    const std::size_t some = count - at;
    const auto inside = static_cast<__mmask16>(some < kLanes ? (1u << some) - 1 : 0xffffu);
    _mm256_mask_storeu_epi16(out + at, inside,
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, from + at))));
  }
}

constexpr std::size_t kFitVectors = kFitRows / kLanes, kFitTile = 6;

// c [M, kFitRows] += pairs of a [M, 2 * count] and of b [count, kFitRows]
template <std::size_t M>
MPO_INLINE void fit_tile(const std::uint16_t* a, std::size_t stride, const std::uint32_t* b, std::size_t count, float* c) {
  __m512 sums[M][kFitVectors];
  for (std::size_t m = 0; m < M; ++m)
    for (std::size_t u = 0; u < kFitVectors; ++u) sums[m][u] = _mm512_loadu_ps(c + m * kFitRows + u * kLanes);
  for (std::size_t k = 0; k < count; ++k) {
    __m512bh pairs[kFitVectors];
    for (std::size_t u = 0; u < kFitVectors; ++u)
      pairs[u] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k * kFitRows + u * kLanes));
    for (std::size_t m = 0; m < M; ++m) {
      std::uint32_t pair;
      std::memcpy(&pair, a + m * stride + 2 * k, sizeof pair);
      const auto one = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
      for (std::size_t u = 0; u < kFitVectors; ++u) sums[m][u] = _mm512_dpbf16_ps(sums[m][u], one, pairs[u]);
    }
  }
  for (std::size_t m = 0; m < M; ++m)
    for (std::size_t u = 0; u < kFitVectors; ++u) _mm512_storeu_ps(c + m * kFitRows + u * kLanes, sums[m][u]);
}

void add_fit_product(const std::uint16_t* a, std::size_t stride, const float* b, std::size_t rows, std::size_t count,
                     float* c) {
  alignas(64) std::uint32_t pairs[kFitBlock / 2 * kFitRows];  // stays in the first cache
  for (std::size_t start = 0; start < count; start += kFitBlock) {
    const std::size_t some = std::min(kFitBlock, count - start) / 2;
    for (std::size_t k = 0; k < some; ++k)
      for (std::size_t lane = 0; lane < kFitRows; lane += kLanes) {
        const float* const at = b + (start + 2 * k) * kFitRows + lane;
        _mm512_store_si512(pairs + k * kFitRows + lane, pairs_of(_mm512_loadu_ps(at), _mm512_loadu_ps(at + kFitRows)));
      }
    std::size_t m = 0;
    for (; m + kFitTile <= rows; m += kFitTile)
      fit_tile<kFitTile>(a + m * stride + start, stride, pairs, some, c + m * kFitRows);
    for (; m < rows; ++m) fit_tile<1>(a + m * stride + start, stride, pairs, some, c + m * kFitRows);
  }
}

}  // namespace

extern const PairKernels kBf16Pairs = {arrange, tile, round, add_fit_product};

}  // namespace mpo

MPO_END_TARGET

#endif
