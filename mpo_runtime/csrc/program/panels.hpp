// Prompts through bf16 matrix units (kernels/panels.hpp): x as panels, and the sums of some rows of a layer for it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/panels.hpp"
#include "memory.hpp"
#include "program/pool.hpp"

namespace mpo {

constexpr std::size_t kSlabTokens = 512;  // tokens whose sums and whose chunk of columns stay in the second-level cache

// Rows of x [tokens, columns] as panels, slab by slab, chunk by chunk. Reusable; neither copyable nor movable.
class PanelInput {
 public:
  PanelInput() = default;
  PanelInput(const PanelInput&) = delete;
  PanelInput& operator=(const PanelInput&) = delete;

  // With `exact`, products with bf16 weights are exact to float32's precision: x is kept as a sum of two bf16 numbers.
  void prepare(const PanelKernels& kernels, Rows<const float> x, std::size_t tokens, std::size_t columns, bool exact,
               Pool& pool);

  std::size_t columns() const { return columns_; }
  std::size_t slabs() const { return (tokens_ + kSlabTokens - 1) / kSlabTokens; }
  std::size_t tokens(std::size_t slab) const { return std::min(kSlabTokens, tokens_ - slab * kSlabTokens); }
  std::size_t groups(std::size_t slab) const { return panel_count(tokens(slab)); }
  // The chunk that begins with a column; `low` is null unless x is exact.
  struct Chunk {
    std::size_t columns;
    const std::uint16_t *high, *low;
  };
  Chunk chunk(std::size_t slab, std::size_t column) const;

 private:
  std::size_t offset(std::size_t slab, std::size_t column) const;

  std::size_t tokens_ = 0, columns_ = 0;
  bool exact_ = false;
  std::uint16_t *high_ = nullptr, *low_ = nullptr;
  Memory memory_;
};

// The sums of `rows` rows of a layer for one slab of x, in memory of the calling thread (scratch_floats()).
class PanelSums {
 public:
  PanelSums(const PanelKernels& kernels, std::size_t rows, std::size_t groups);

  // Adds the product of rows with x. fill(row, column, to) gives a panel of the rows from `row` on, counted from the first
  // one of these sums. `exact` says that the rows hold bf16 numbers, so that it is worth keeping x exact.
  template <class Fill>
  void add(const PanelInput& x, std::size_t slab, bool exact, Fill fill) {
    for (std::size_t column = 0; column < x.columns(); column += kPanelChunk) {
      const PanelInput::Chunk part = x.chunk(slab, column);
      const std::size_t steps = panel_steps(part.columns);
      for (std::size_t row = 0; row < rows_; row += kPanelRows) {
        std::uint16_t* to = panels_ + row / kPanelRows * steps * kStepValues;
        fill(row, column, PanelRows{std::min(kPanelRows, rows_ - row), part.columns, to});
      }
      multiply(part.high, steps);
      if (exact && part.low) multiply(part.low, steps);
    }
  }
  // y [count, rows] += the sums.
  void put(const Task& task) const { kernels_.add(sums_, groups_, task); }

 private:
  void multiply(const std::uint16_t* x, std::size_t steps);

  const PanelKernels& kernels_;
  std::size_t rows_, groups_;
  bool fresh_ = true;
  float* sums_;
  std::uint16_t* panels_;
};

}  // namespace mpo
