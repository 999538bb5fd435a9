#include "program/panels.hpp"

namespace mpo {

void PanelInput::prepare(const PanelKernels& kernels, Rows<const float> x, std::size_t tokens, std::size_t columns, Pool& pool) {
  kernels_ = &kernels;
  tokens_ = tokens;
  columns_ = columns;
  groups_ = memory_.reserve<std::uint8_t>(panel_count(tokens) * panel_steps(columns) * kernels.x_bytes);
  const std::size_t wide = kernels.chunk, chunks = (columns + wide - 1) / wide;
  pool.run(panel_count(tokens) * chunks, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) {
      const std::size_t begin = i / chunks * kPanelRows, column = i % chunks * wide, slab = begin / kSlabTokens;
      const std::size_t width = std::min(wide, columns - column), group = begin % kSlabTokens / kPanelRows;
      const std::size_t at = static_cast<std::size_t>(chunk(slab, column) - groups_) + group * panel_steps(width) * kernels.x_bytes;
      kernels.arrange({x.row(begin) + column, x.stride}, std::min(kPanelRows, tokens - begin), width, groups_ + at);
    }
  });
}

const std::uint8_t* PanelInput::chunk(std::size_t slab, std::size_t column) const {
  const std::size_t before = slab * (kSlabTokens / kPanelRows) * panel_steps(columns_);
  const std::size_t groups = panel_count(slab_tokens(tokens_, slab));
  return groups_ + (before + groups * (column / kPanelStep)) * kernels_->x_bytes;
}

PanelSums::PanelSums(std::size_t rows, std::size_t tokens) : rows_(rows), tokens_(tokens) {
  const std::size_t panels = panel_count(rows), sums = panels * panel_count(tokens) * kPanelSums;
  sums_ = scratch_floats(sums + panels * panel_steps(kPanelChunk) * kMostStepBytes / sizeof(float));
  panels_ = reinterpret_cast<std::uint8_t*>(sums_ + sums);
}

}  // namespace mpo
