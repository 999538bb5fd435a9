#include "kernels/activations.hpp"

#include <cstring>

#include "check.hpp"

namespace mpo {
void Activations::allocate(std::size_t batch, std::size_t columns) {
  const Layout& layout = level_->integers->layout;
  const bool pairs = layout.pairs;
  const std::size_t unit = pairs ? 2 * kChunk : kChunk, padded = (columns + unit - 1) / unit * unit;
  view_ = {};
  view_.batch = batch;
  view_.columns = columns;
  view_.padded = padded;
  auto* codes = codes_.reserve<std::int8_t>(4 * batch * padded);
  for (int p = 0; p < 4; ++p) view_.codes[p] = codes + static_cast<std::size_t>(p) * batch * padded;

  const std::size_t blocks = batch * padded / kScaleBlock;
  auto* next = floats_.reserve<float>((pairs ? 10 : 4) * blocks);
  view_.scales = next;
  view_.sums = next + blocks;
  view_.half_sums = next + 2 * blocks;
  for (std::size_t p = 0; pairs && p < 3; ++p) {
    view_.pair_scales[p] = next + (4 + 2 * p) * blocks;
    view_.pair_sums[p] = view_.pair_scales[p] + blocks;
  }
}

void Activations::prepare(const float* x, std::size_t batch, std::size_t columns, unsigned planes) {
  expect(columns % 16 == 0, "activations: expected columns to be a multiple of 16, found ", columns);
  level_ = &active_level();
  allocate(batch, columns);
  const IntegerKernels& kernels = *level_->integers;
  for (std::size_t r = 0; r < batch; ++r) kernels.arrange(row(x, r), kernels.layout, planes, view_.padded / kChunk);
  if (view_.pair_sums[0]) arrange_pairs(planes);
}

// The view is what the kernels read; only this class, which owns the memory, writes to it.
ActivationRow Activations::row(const float* x, std::size_t row) const {
  const std::size_t padded = view_.padded, blocks = padded / kScaleBlock;
  ActivationRow result{};
  result.x = x + row * view_.columns;
  result.columns = view_.columns;
  for (int p = 0; p < 4; ++p) result.codes[p] = const_cast<std::int8_t*>(view_.codes[p]) + row * padded;
  result.scales = const_cast<float*>(view_.scales) + row * blocks;
  result.sums = const_cast<float*>(view_.sums) + row * blocks;
  result.half_sums = const_cast<float*>(view_.half_sums) + row * blocks * 2;
  return result;
}

void Activations::arrange_pairs(unsigned planes) {
  constexpr std::size_t kPairBlocks = 2 * kChunk / kScaleBlock;
  for (int p = 0; p < 3; ++p) {
    if (!(planes >> p & 1)) continue;
    auto* scales = const_cast<float*>(view_.pair_scales[p]);
    auto* sums = const_cast<float*>(view_.pair_sums[p]);
    for (std::size_t start = 0; start < view_.batch * view_.padded / kScaleBlock; start += kPairBlocks)
      for (std::size_t lane = 0; lane < kPairBlocks; ++lane) {
        const auto block = start + static_cast<std::size_t>(paired_block(kPlaneBits[p], static_cast<int>(lane)));
        scales[start + lane] = view_.scales[block];
        sums[start + lane] = view_.sums[block];
      }
  }
}

}  // namespace mpo
