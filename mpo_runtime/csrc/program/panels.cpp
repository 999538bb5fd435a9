#include "program/panels.hpp"

namespace mpo {

void PanelInput::prepare(const PanelKernels& kernels, Rows<const float> x, std::size_t tokens, std::size_t columns,
                         bool exact, Pool& pool) {
  tokens_ = tokens;
  columns_ = columns;
  exact_ = exact;
  const std::size_t size = panel_count(tokens) * panel_steps(columns) * kStepValues;
  high_ = memory_.reserve<std::uint16_t>((exact ? 2 : 1) * size);
  low_ = exact ? high_ + size : nullptr;
  const std::size_t chunks = (columns + kPanelChunk - 1) / kPanelChunk;
  pool.run(panel_count(tokens) * chunks, 1, [&](std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) {
      const std::size_t begin = i / chunks * kPanelRows, column = i % chunks * kPanelChunk;
      const std::size_t wide = std::min(kPanelChunk, columns - column), slab = begin / kSlabTokens;
      const std::size_t at = offset(slab, column) + begin % kSlabTokens / kPanelRows * panel_steps(wide) * kStepValues;
      kernels.arrange({x.row(begin) + column, x.stride}, std::min(kPanelRows, tokens - begin), wide, high_ + at,
                      exact ? low_ + at : nullptr);
    }
  });
}

std::size_t PanelInput::offset(std::size_t slab, std::size_t column) const {
  const std::size_t before = slab * (kSlabTokens / kPanelRows) * panel_steps(columns_);
  return (before + groups(slab) * (column / kPanelStep)) * kStepValues;
}

PanelInput::Chunk PanelInput::chunk(std::size_t slab, std::size_t column) const {
  const std::size_t at = offset(slab, column);
  return {std::min(kPanelChunk, columns_ - column), high_ + at, low_ ? low_ + at : nullptr};
}

PanelSums::PanelSums(const PanelKernels& kernels, std::size_t rows, std::size_t groups)
    : kernels_(kernels), rows_(rows), groups_(groups) {
  const std::size_t panels = panel_count(rows), sums = panels * groups * kPanelRows * kPanelRows;
  sums_ = scratch_floats(sums + panels * kPanelRows * kPanelChunk / 2);
  panels_ = reinterpret_cast<std::uint16_t*>(sums_ + sums);
}

void PanelSums::multiply(const std::uint16_t* x, std::size_t steps) {
  kernels_.multiply({panels_, x, panel_count(rows_), groups_, steps, sums_, fresh_});
  fresh_ = false;
}

}  // namespace mpo
