// AMX-INT8, for 8 rows of x or more: 16 rows of w times 16 rows of x in one tile. All else is VBMI's.
#include "kernels.hpp"

#if MPO_X86_KERNELS

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "intrinsics.hpp"

// Only what follows may use the level: inline functions of the headers above are shared with baseline code.
#if !defined(MPO_EMULATED_INTRINSICS)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#endif
#endif

#include "avx2_floats.hpp"
#include "spread.hpp"

namespace mpo {
namespace {

constexpr std::size_t kTileRows = 16;

// Tile 0: sums, 16 rows of w by 16 rows of x. Tile 1: 16 rows of w, 32 codes each. Tile 2: 32 columns of 16 rows of x.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 32, 64};
  std::uint8_t rows[16] = {16, 16, 8};
};

class Tiles {
 public:
  Tiles() {
    __asm__ volatile("" : : "r"(&shapes_) : "memory");  // gcc 12 drops the stores to shapes_ without it
    _tile_loadconfig(&shapes_);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileShapes shapes_;
};

// The sums of 16 rows of w, 16 rows of x each.
struct Sums {
  __m512 of[kTileRows];
};

// Rows [r, r + count) of w times the 16 rows of x of `tiles`; y is [16, stride] and takes the first `present` of them.
template <int Low, int High>
void multiply_tile(const QuantizedMatrix& w, const std::int8_t* tiles, const float* scales, const float* block_sums,
                   std::size_t r, std::size_t count, std::size_t present, float* y, std::size_t stride,
                   bool accumulate) {
  alignas(64) std::uint8_t codes[kTileRows][kChunk] = {};
  alignas(64) std::int32_t dots[kTileRows][kTileRows];
  Sums sums;
  for (__m512& sum : sums.of) sum = _mm512_setzero_ps();
  for (std::size_t c = 0; c < w.columns; c += kChunk) {
    const std::size_t columns = w.columns - c < kChunk ? w.columns - c : kChunk;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t at = (r + i) * w.columns + c;
      spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, columns, codes[i]);
    }
    for (std::size_t b = 0; b < columns; b += kScaleBlock) {  // groups of 32 and more: no block is cut
      const std::size_t block = (c + b) / kScaleBlock;
      _tile_zero(0);
      _tile_loadd(1, &codes[0][b], kChunk);
      _tile_loadd(2, tiles + block * kTileRows * kScaleBlock, 64);
      _tile_dpbusd(0, 1, 2);
      _tile_stored(0, dots, 64);
      const __m512 scale_x = _mm512_loadu_ps(scales + block * kTileRows);
      const __m512 sum_x = _mm512_loadu_ps(block_sums + block * kTileRows);
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t group = ((r + i) * w.columns + c + b) / w.group;
        const float scale = Avx2Floats::half(w.scale + group);
        const float zero = w.zero ? Avx2Floats::half(w.zero + group) : implicit_zero(Low + High);
        const __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(dots[i])), scale_x);
        const __m512 shifted = _mm512_fmadd_ps(_mm512_set1_ps(-zero), sum_x, dot);
        sums.of[i] = _mm512_fmadd_ps(_mm512_set1_ps(scale), shifted, sums.of[i]);
      }
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    float values[kTileRows];
    _mm512_storeu_ps(values, sums.of[i]);
    for (std::size_t t = 0; t < present; ++t) {
      float* place = y + t * stride + r + i;
      *place = accumulate ? *place + values[t] : values[t];
    }
  }
}

using TileKernel = decltype(&multiply_tile<8, 0>);

TileKernel kernel_of(int bits) {
  switch (bits) {
    case 8: return multiply_tile<8, 0>;
    case 6: return multiply_tile<4, 2>;
    case 5: return multiply_tile<4, 1>;
    case 4: return multiply_tile<4, 0>;
    case 3: return multiply_tile<2, 1>;
    default: return multiply_tile<2, 0>;
  }
}

}  // namespace

void multiply_amx(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
                  std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
  std::size_t done = first;
  if (x.tiles && first == 0 && w.group >= kScaleBlock) {
    const std::size_t blocks = x.padded / kScaleBlock, all = (x.batch + kTileRows - 1) / kTileRows * blocks;
    const float* sums = x.tile_scales + all * kTileRows;
    const TileKernel kernel = kernel_of(w.bits);
    const Tiles configured;
    for (; done + kTileBatch <= count; done += kTileRows) {
      const std::size_t tile = done / kTileRows * blocks * kTileRows, left = count - done;
      for (std::size_t r = begin; r < end; r += kTileRows)
        kernel(w, x.tiles + tile * kScaleBlock, x.tile_scales + tile, sums + tile, r,
               end - r < kTileRows ? end - r : kTileRows, left < kTileRows ? left : kTileRows, y + done * stride, stride,
               accumulate);
    }
  }
  if (done < first + count)
    multiply_vbmi(w, x, done, first + count - done, begin, end, y, stride, accumulate);
}

}  // namespace mpo

#if !defined(MPO_EMULATED_INTRINSICS) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MPO_X86_KERNELS
