// Products for many rows of x through bf16 matrix units. Weights are turned into panels of 16 rows, a chunk of columns at a
// time, x into panels of 16 rows of x; sums of 16 rows of weights times 16 rows of x are float32. Codes times scales are
// rounded to bf16 on the way, which costs less accuracy than int8 activations do; what is stored as bf16 stays as it is.
#pragma once

#include "kernels/kernels.hpp"

namespace mpo {

constexpr std::size_t kPanelRows = 16;
constexpr std::size_t kPanelStep = 32;   // columns of a step, for which a panel holds kPanelRows * kPanelStep values
constexpr std::size_t kPanelChunk = 512;  // columns that are unpacked at a time: two panels stay in the first-level cache
constexpr std::size_t kStepValues = kPanelRows * kPanelStep;

constexpr std::size_t panel_steps(std::size_t columns) { return (columns + kPanelStep - 1) / kPanelStep; }
constexpr std::size_t panel_count(std::size_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Up to 16 rows; what is missing of 16 rows and of the last step of 32 columns becomes zero.
struct PanelRows {
  std::size_t count, columns;
  std::uint16_t* out;  // [steps, 16, 32]
};

// sums[p, g] (+)= w[p] x[g]^T over `steps` steps.
struct PanelProduct {
  const std::uint16_t* w;  // [panels, steps, 16 rows, 32 columns]
  const std::uint16_t* x;  // [groups, steps, 16 pairs of columns, 16 rows, 2]
  std::size_t panels, groups, steps;
  float* sums;  // [panels, groups, 16 rows of w, 16 rows of x]
  bool fresh;   // overwrites the sums
};

struct PanelKernels {
  // Rows of x as the second operand: rounded to bf16 (high), and where `low` is given what rounding left, also as bf16.
  void (*arrange)(Rows<const float> x, std::size_t count, std::size_t columns, std::uint16_t* high, std::uint16_t* low);
  // Rows [row, row + count) and `columns` columns from `column` on, a multiple of 256, of a matrix.
  void (*unpack)(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to);
  void (*copy)(const DenseMatrix& w, std::size_t row, std::size_t column, const PanelRows& to);  // bf16
  void (*round)(Rows<const float> rows, const PanelRows& to);
  void (*multiply)(const PanelProduct& product);
  // y[t, r] += sums, for the rows of the task.
  void (*add)(const float* sums, std::size_t groups, const Task& task);
};

#if MPO_X86
extern const PanelKernels kAmxPanels;
#endif

}  // namespace mpo
