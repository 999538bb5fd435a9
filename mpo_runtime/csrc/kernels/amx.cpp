// AMX-INT8, for 8 rows of x or more: 16 rows of w times 16 rows of x in one tile. The rest is VBMI's.
#include "kernels/kernels.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AMX)

#include "kernels/avx512_integers.hpp"

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

// 16 rows of x as ActivationView has them.
struct TileInput {
  const std::int8_t* codes;
  const float *scales, *sums;
};

// Rows [r, r + height) of w times the 16 rows of x of a tile, of which the task has [first, first + count).
template <int Low, int High>
void multiply_tile(const QuantizedMatrix& w, const TileInput& x, const Task& task, std::size_t first,
                   std::size_t count, std::size_t r, std::size_t height) {
  alignas(64) std::uint8_t codes[kTileRows][kChunk] = {};
  alignas(64) std::int32_t dots[kTileRows][kTileRows];
  struct {
    __m512 of[kTileRows];  // a row of w each; lanes are rows of x
  } sums;
  for (__m512& sum : sums.of) sum = _mm512_setzero_ps();
  for (std::size_t c = 0; c < w.columns; c += kChunk) {
    const std::size_t columns = w.columns - c < kChunk ? w.columns - c : kChunk;
    for (std::size_t i = 0; i < height; ++i) {
      const std::size_t at = (r + i) * w.columns + c;
      spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, columns, codes[i]);
    }
    for (std::size_t b = 0; b < columns; b += kScaleBlock) {  // groups of 32 and more: no block is cut
      const std::size_t block = (c + b) / kScaleBlock;
      _tile_zero(0);
      _tile_loadd(1, &codes[0][b], kChunk);
      _tile_loadd(2, x.codes + block * kTileRows * kScaleBlock, 64);
      _tile_dpbusd(0, 1, 2);
      _tile_stored(0, dots, 64);
      const __m512 scale_x = _mm512_loadu_ps(x.scales + block * kTileRows);
      const __m512 sum_x = _mm512_loadu_ps(x.sums + block * kTileRows);
      for (std::size_t i = 0; i < height; ++i) {
        const std::size_t group = ((r + i) * w.columns + c + b) / w.group;
        const float scale = Avx2Floats::half(w.scale + group);
        const float zero = w.zero ? Avx2Floats::half(w.zero + group) : implicit_zero(Low + High);
        const __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(dots[i])), scale_x);
        const __m512 shifted = _mm512_fmadd_ps(_mm512_set1_ps(-zero), sum_x, dot);
        sums.of[i] = _mm512_fmadd_ps(_mm512_set1_ps(scale), shifted, sums.of[i]);
      }
    }
  }
  for (std::size_t i = 0; i < height; ++i) {
    float values[kTileRows];
    _mm512_storeu_ps(values, sums.of[i]);
    for (std::size_t t = 0; t < count; ++t) task.put(first + t, r + i, values[t]);
  }
}

// All rows of w times the 16 rows of x from `first` on.
template <int Low, int High>
void multiply_tiles(const QuantizedMatrix& w, const TileInput& x, const Task& task, std::size_t first) {
  const std::size_t left = task.count - first, count = left < kTileRows ? left : kTileRows;
  for (std::size_t r = task.begin; r < task.end; r += kTileRows) {
    const std::size_t height = task.end - r < kTileRows ? task.end - r : kTileRows;
    multiply_tile<Low, High>(w, x, task, first, count, r, height);
  }
}

void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
  Task rest = task;
  if (x.tiles && task.first == 0 && w.group >= kScaleBlock) {
    const std::size_t blocks = x.padded / kScaleBlock;
    const Tiles configured;
    for (; rest.first + kTileBatch <= task.count; rest.first += kTileRows) {
      const std::size_t at = rest.first * blocks;
      const TileInput tile{x.tiles + at * kScaleBlock, x.tile_scales + at, x.tile_sums + at};
      with_planes(w.bits, [&](auto planes) { multiply_tiles<planes.low, planes.high>(w, tile, task, rest.first); });
    }
  }
  if (rest.first >= task.first + task.count) return;
  rest.count = task.first + task.count - rest.first;
  kVbmiIntegers.multiply(w, x, rest);
}

constexpr Layout with_tiles(Layout layout) {
  layout.tiles = true;
  return layout;
}

}  // namespace

extern const IntegerKernels kAmxIntegers = {with_tiles(kAvx512Layout), arrange_avx2, multiply};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
