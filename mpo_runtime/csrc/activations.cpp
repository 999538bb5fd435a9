#include "activations.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace mpo {
namespace {

constexpr std::align_val_t kCacheLine{64};
constexpr int kPlaneBits[4] = {8, 4, 2, 1};
constexpr std::size_t kTileRows = 16;  // rows of x in an AMX tile

// One block of 32 columns to int8 with scale max|x| / 127. Written so that compilers vectorise it at any baseline:
// the maximum over the bit patterns of |x|, which order like the values, and rounding to nearest even by adding 1.5 * 2^23,
// after which the low bits of the sum are the integer.
float quantize_block(const float* x, std::int8_t* codes) {
  std::int32_t bits[kScaleBlock];
  std::memcpy(bits, x, sizeof bits);
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < kScaleBlock; ++i) largest = std::max(largest, bits[i] & 0x7fffffff);
  float maximum;
  std::memcpy(&maximum, &largest, sizeof maximum);
  constexpr float kSmallest = 1e-30f;  // below this 127 / maximum could overflow
  const bool empty = maximum < kSmallest;
  const float scale = empty ? 0.0f : maximum / 127.0f, inverse = empty ? 0.0f : 127.0f / maximum;
  for (std::size_t i = 0; i < kScaleBlock; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;
    std::int32_t pattern;
    std::memcpy(&pattern, &shifted, sizeof pattern);
    codes[i] = static_cast<std::int8_t>(pattern);
  }
  return scale;
}

// Bytes of even and of odd place apart.
void deinterleave(const std::int8_t* in, std::size_t bytes, std::int8_t* even, std::int8_t* odd) {
  for (std::size_t i = 0; i < bytes / 2; ++i) {
    even[i] = in[2 * i];
    odd[i] = in[2 * i + 1];
  }
}

// 256 codes in the order of a p-bit plane's vectors (see Layout).
void arrange_chunk(const std::int8_t* natural, int bits, std::size_t width, bool split_ones, std::int8_t* out) {
  if (bits == 8) {
    std::memcpy(out, natural, kChunk);
    return;
  }
  const std::size_t vector = width * 8 / static_cast<std::size_t>(bits);  // codes in a vector
  const std::size_t step = vector / width;
  for (std::size_t start = 0; start < kChunk; start += vector) {
    const std::int8_t* in = natural + start;
    std::int8_t* to = out + start;
    std::int8_t halves[kChunk], quarters[kChunk];
    if (step == 2) {
      deinterleave(in, vector, to, to + width);
      continue;
    }
    deinterleave(in, vector, halves, halves + vector / 2);
    if (step == 4) {  // of the even ones the even are k = 0, the odd k = 2
      deinterleave(halves, vector / 2, to, to + 2 * width);
      deinterleave(halves + vector / 2, vector / 2, to + width, to + 3 * width);
      continue;
    }
    deinterleave(halves, vector / 2, quarters, quarters + vector / 4);
    deinterleave(halves + vector / 2, vector / 2, quarters + vector / 2, quarters + 3 * vector / 4);
    constexpr std::size_t kFirst[4] = {0, 2, 1, 3};  // k modulo 4 of each quarter
    for (std::size_t q = 0; q < 4; ++q) {
      const std::size_t k = kFirst[q];
      const std::size_t low = split_ones ? 2 * k : k, high = split_ones ? 2 * k + 1 : k + 4;
      deinterleave(quarters + q * (vector / 4), vector / 4, to + low * width, to + high * width);
    }
  }
}

}  // namespace

Buffer::~Buffer() {
  if (data_) ::operator delete(data_, kCacheLine);
}

void* Buffer::reserve(std::size_t bytes) {
  if (bytes > size_) {
    if (data_) ::operator delete(data_, kCacheLine);
    data_ = nullptr;
    size_ = 0;
    data_ = ::operator new(bytes, kCacheLine);
    size_ = bytes;
  }
  return data_;
}

void Activations::allocate(std::size_t batch, std::size_t columns, bool tiles, bool pairs) {
  const std::size_t unit = pairs ? 2 * kChunk : kChunk, padded = (columns + unit - 1) / unit * unit;
  view_ = {};
  view_.batch = batch;
  view_.columns = columns;
  view_.padded = padded;
  auto* codes = static_cast<std::int8_t*>(codes_.reserve(4 * batch * padded));
  for (int p = 0; p < 4; ++p) view_.codes[p] = codes + static_cast<std::size_t>(p) * batch * padded;

  const std::size_t blocks = batch * padded / kScaleBlock;
  auto* next = static_cast<float*>(floats_.reserve((pairs ? 10 : 4) * blocks * sizeof(float)));
  view_.scales = next;
  view_.sums = next + blocks;
  view_.half_sums = next + 2 * blocks;
  for (std::size_t p = 0; pairs && p < 3; ++p) {
    view_.pair_scales[p] = next + (4 + 2 * p) * blocks;
    view_.pair_sums[p] = view_.pair_scales[p] + blocks;
  }
  if (!tiles) return;
  const std::size_t tile_blocks = (batch + kTileRows - 1) / kTileRows * (padded / kScaleBlock);
  view_.tiles = static_cast<std::int8_t*>(tiles_.reserve(tile_blocks * kTileRows * (kScaleBlock + 2 * sizeof(float))));
  view_.tile_scales = reinterpret_cast<const float*>(view_.tiles + tile_blocks * kTileRows * kScaleBlock);
}

void Activations::prepare(const float* x, std::size_t batch, std::size_t columns, unsigned planes) {
  if (columns % 16)
    throw std::invalid_argument("activations: expected columns to be a multiple of 16, found " + std::to_string(columns));
  input_ = x;
  isa_ = active_isa();
  const Layout& layout = kernels_of(isa_).layout;
  allocate(batch, columns, layout.tiles && batch >= kTileBatch, layout.pairs && batch == 1);
  for (std::size_t row = 0; row < batch; ++row) arrange_row(row, layout, planes);
  if (view_.tiles) arrange_tiles();
  if (view_.pair_sums[0]) arrange_pairs(planes);
}

void Activations::arrange_row(std::size_t row, const Layout& layout, unsigned planes) {
  const std::size_t padded = view_.padded, blocks = padded / kScaleBlock;
  const auto codes = [&](int p) { return const_cast<std::int8_t*>(view_.codes[p]) + row * padded; };
  std::int8_t* natural = codes(0);
  float* scales = const_cast<float*>(view_.scales) + row * blocks;
  const std::size_t whole = view_.columns / kScaleBlock;
  const float* x = input_ + row * view_.columns;
  for (std::size_t b = 0; b < whole; ++b) scales[b] = quantize_block(x + b * kScaleBlock, natural + b * kScaleBlock);
  for (std::size_t b = whole; b < blocks; ++b) {
    float rest[kScaleBlock] = {};
    if (b == whole) std::memcpy(rest, x + b * kScaleBlock, (view_.columns - b * kScaleBlock) * sizeof(float));
    scales[b] = quantize_block(rest, natural + b * kScaleBlock);
  }
  for (int p = 1; p < 4; ++p)
    for (std::size_t c = 0; planes >> p & 1 && c < padded; c += kChunk)
      arrange_chunk(natural + c, kPlaneBits[p], layout.width[p], layout.split_ones, codes(p) + c);

  auto* sums = const_cast<float*>(view_.sums) + row * blocks;
  auto* halves = const_cast<float*>(view_.half_sums) + row * blocks * 2;
  for (std::size_t b = 0; b < blocks; ++b) {
    int sum[2] = {};
    for (std::size_t i = 0; i < kScaleBlock; ++i) sum[i / 16] += natural[b * kScaleBlock + i];
    halves[2 * b] = scales[b] * static_cast<float>(sum[0]);
    halves[2 * b + 1] = scales[b] * static_cast<float>(sum[1]);
    sums[b] = scales[b] * static_cast<float>(sum[0] + sum[1]);
  }
}

void Activations::arrange_pairs(unsigned planes) {
  constexpr std::size_t kPairBlocks = 2 * kChunk / kScaleBlock;
  for (int p = 0; p < 3; ++p) {
    if (!(planes >> p & 1)) continue;
    auto* scales = const_cast<float*>(view_.pair_scales[p]);
    auto* sums = const_cast<float*>(view_.pair_sums[p]);
    for (std::size_t start = 0; start < view_.padded / kScaleBlock; start += kPairBlocks)
      for (std::size_t lane = 0; lane < kPairBlocks; ++lane) {
        const auto block = start + static_cast<std::size_t>(paired_block(kPlaneBits[p], static_cast<int>(lane)));
        scales[start + lane] = view_.scales[block];
        sums[start + lane] = view_.sums[block];
      }
  }
}

// Blocks of 32 columns as AMX wants its second operand: [8 quads of columns, 16 rows of x, 4 columns].
void Activations::arrange_tiles() {
  const std::size_t blocks = view_.padded / kScaleBlock, groups = (view_.batch + kTileRows - 1) / kTileRows;
  auto* codes = const_cast<std::int8_t*>(view_.tiles);
  auto* scales = const_cast<float*>(view_.tile_scales);
  auto* sums = scales + groups * blocks * kTileRows;
  for (std::size_t i = 0; i < groups * blocks; ++i) {
    const std::size_t block = i % blocks;
    for (std::size_t t = 0; t < kTileRows; ++t) {
      const std::size_t row = i / blocks * kTileRows + t;
      std::int8_t* to = codes + i * kTileRows * kScaleBlock + t * 4;
      const bool present = row < view_.batch;
      scales[i * kTileRows + t] = present ? view_.scales[row * blocks + block] : 0.0f;
      sums[i * kTileRows + t] = present ? view_.sums[row * blocks + block] : 0.0f;
      for (std::size_t quad = 0; quad < kScaleBlock / 4; ++quad) {
        std::int8_t* place = to + quad * kTileRows * 4;
        if (present) std::memcpy(place, view_.codes[0] + row * view_.padded + block * kScaleBlock + quad * 4, 4);
        else std::memset(place, 0, 4);
      }
    }
  }
}

}  // namespace mpo
