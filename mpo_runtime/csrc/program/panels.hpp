// Many rows of x through panels (kernels/panels.hpp): x as groups, and the sums of some rows of a layer for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/panels.hpp"
#include "memory.hpp"
#include "program/pool.hpp"

namespace mpo {

constexpr std::size_t kSlabTokens = 512;  // tokens whose sums and whose chunk of columns stay in the second-level cache

// The slabs of so many rows of x, and the rows of one of them.
constexpr std::size_t slab_count(std::size_t tokens) { return (tokens + kSlabTokens - 1) / kSlabTokens; }
constexpr std::size_t slab_tokens(std::size_t tokens, std::size_t slab) {
  return std::min(kSlabTokens, tokens - slab * kSlabTokens);
}

// Rows of x [tokens, columns] as groups, slab by slab, chunk by chunk. Reusable; neither copyable nor movable.
class PanelInput {
 public:
  PanelInput() = default;
  PanelInput(const PanelInput&) = delete;
  PanelInput& operator=(const PanelInput&) = delete;

  void prepare(const PanelKernels& kernels, Rows<const float> x, std::size_t tokens, std::size_t columns, Pool& pool);

  const PanelKernels& kernels() const { return *kernels_; }
  std::size_t columns() const { return columns_; }
  // The groups of a slab in the chunk that begins with a column.
  const std::uint8_t* chunk(std::size_t slab, std::size_t column) const;

 private:
  const PanelKernels* kernels_ = nullptr;
  std::size_t tokens_ = 0, columns_ = 0;
  std::uint8_t* groups_ = nullptr;
  Memory memory_;
};

// The sums of `rows` rows of a layer for one slab of x, `tokens` rows, in memory of the calling thread (scratch_floats()).
class PanelSums {
 public:
  PanelSums(std::size_t rows, std::size_t tokens);

  // Adds the product of rows with x. fill(row, column, to) gives a panel of the rows from `row` on, counted from the first
  // one of these sums.
  template <class Fill>
  void add(const PanelInput& x, std::size_t slab, PanelCodes codes, Fill fill) {
    const PanelKernels& kernels = x.kernels();
    const std::size_t chunk = kernels.chunk;
    for (std::size_t column = 0; column < x.columns(); column += chunk) {
      const std::size_t columns = std::min(chunk, x.columns() - column), steps = panel_steps(columns);
      for (std::size_t begin = 0; begin < rows_; begin += kernels.rows) {
        const std::size_t end = std::min(begin + kernels.rows, rows_);
        for (std::size_t row = begin; row < end; row += kPanelRows) {
          std::uint8_t* to = panels_ + (row - begin) / kPanelRows * steps * kernels.w_bytes;
          fill(row, column, PanelRows{std::min(kPanelRows, rows_ - row), columns, to, chunk});
        }
        float* sums = sums_ + begin / kPanelRows * panel_count(tokens_) * kPanelSums;
        kernels.multiply({panels_, x.chunk(slab, column), panel_count(end - begin), tokens_, steps, codes, sums, !add_, false});
      }
      add_ = kernels.add;
    }
  }
  // y [count, rows] (+)= the sums, if there are any.
  void put(const Task& task) const {
    if (add_) add_(sums_, panel_count(tokens_), task);
  }

 private:
  std::size_t rows_, tokens_;
  void (*add_)(const float*, std::size_t, const Task&) = nullptr;  // of those whose sums they are
  float* sums_;
  std::uint8_t* panels_;
};

// y [tokens, rows of the task] (+)= the product of a few rows of x with a matrix, bit for bit that of each row alone.
template <class Fill>
void multiply_lanes(const PanelInput& x, std::size_t row_elements, PanelCodes codes, const Task& task, Fill fill) {
  constexpr std::size_t kStrip = 2 * kPanelRows;
  const PanelKernels& kernels = x.kernels();
  const std::size_t groups = panel_count(task.count), sums = 2 * kPanelLanes * groups * kPanelSums;
  float* at = scratch_floats(sums + 2 * panel_steps(kPanelChunk) * kMostStepBytes / sizeof(float));
  auto* panels = reinterpret_cast<std::uint8_t*>(at + sums);
  if (x.columns() < kPanelChunk) std::memset(at, 0, sums * sizeof(float));  // lanes without columns
  for (std::size_t begin = task.begin; begin < task.end; begin += kStrip) {
    Task part = task;
    part.begin = begin;
    part.end = std::min(begin + kStrip, task.end);
    for (std::size_t column = 0; column < x.columns(); column += kPanelChunk) {
      const std::size_t columns = std::min(kPanelChunk, x.columns() - column), steps = panel_steps(columns);
      for (std::size_t row = begin; row < part.end; row += kPanelRows)
        fill(row, column, PanelRows{std::min(kPanelRows, part.end - row), columns,
                                    panels + (row - begin) / kPanelRows * steps * kernels.w_bytes, kStrip * row_elements});
      kernels.multiply({panels, x.chunk(0, column), panel_count(part.end - begin), task.count, steps, codes, at, column == 0, true});
    }
    kernels.add_lanes(at, groups, codes, part);
  }
}

}  // namespace mpo
