// Products for many rows of x. Weights are turned into panels of 16 rows, a chunk of columns at a time, and each panel is
// multiplied with all rows of x, which stand in groups of 16. A record of functions says what panels hold:
// - bf16 for matrix units (amx_panels.cpp). Codes times scales are rounded to bf16 on the way, which costs less accuracy than
//   int8 activations do; what is stored as bf16 stays as it is, and x may be kept as a sum of two bf16 numbers.
// - int8 (integer_panels.hpp). x is rounded as for a single row of x, see activations.hpp; the sums are those up to rounding.
//   Columns stand in the order in which codes lie in packed bytes, so that unpacking takes few steps.
// - float32 (float_panels.hpp), which is exact to its precision.
//
// Where sums are kept apart in lanes, they are added up in the order of the product with a single row of x, and results are
// equal to its results in every bit.
#pragma once

#include "kernels/kernels.hpp"

namespace mpo {

constexpr std::size_t kPanelRows = 16;
constexpr std::size_t kPanelStep = 32;    // columns of a step
constexpr std::size_t kPanelChunk = 512;  // columns that are unpacked at a time: panels stay in the second-level cache
constexpr std::size_t kPanelSums = kPanelRows * kPanelRows;  // of a panel and a group
constexpr std::size_t kPanelLanes = kPanelChunk / kPanelStep;
constexpr std::size_t kMostStepBytes = 2048;                 // of a panel

constexpr std::size_t panel_steps(std::size_t columns) { return (columns + kPanelStep - 1) / kPanelStep; }
constexpr std::size_t panel_count(std::size_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Up to 16 rows of weights; what is missing of 16 rows and of the last step of 32 columns adds nothing to a product.
struct PanelRows {
  std::size_t count, columns;
  std::uint8_t* out;  // steps * PanelKernels::w_bytes
  std::size_t ahead;  // elements from here to what will be unpacked soon
};

// The codes of integer panels: their bits, whether each half step has a scale (groups of 16), whether zeros are stored.
struct PanelCodes {
  int bits = 8;
  bool halves = false, zeros = false;
};

// sums (+)= w x^T over `steps` steps, for `rows` rows of x in panel_count(rows) groups.
struct PanelProduct {
  const std::uint8_t* w;  // [panels, steps * w_bytes]
  const std::uint8_t* x;  // [groups, steps * x_bytes]
  std::size_t panels, rows, steps;
  PanelCodes codes;
  float* sums;  // [panels, groups, kPanelSums] in the order that add() reads; lanes: [panels, kPanelLanes, groups, kPanelSums]
  bool fresh;   // overwrites the sums
  bool lanes;   // the sums of each step of a chunk are kept apart; for kernels with add_lanes()
};

struct PanelKernels {
  std::size_t x_bytes, w_bytes;  // of a step of a group and of a panel
  // Up to 16 rows of x.
  void (*arrange)(Rows<const float> x, std::size_t count, std::size_t columns, std::uint8_t* out);
  // Rows [row, row + count) and `columns` columns from `column` on, a multiple of 256, of a matrix.
  void (*unpack)(const QuantizedMatrix& w, std::size_t row, std::size_t column, const PanelRows& to);  // or null
  void (*copy)(const DenseMatrix& w, std::size_t row, std::size_t column, const PanelRows& to);        // or null
  void (*round)(Rows<const float> rows, const PanelRows& to);                                          // or null
  void (*multiply)(const PanelProduct& product);
  // y[t, r] (+)= sums, for the rows of the task.
  void (*add)(const float* sums, std::size_t groups, const Task& task);
  // The same of lanes, or null.
  void (*add_lanes)(const float* sums, std::size_t groups, PanelCodes codes, const Task& task);
  std::size_t chunk = kPanelChunk, rows = 128;  // columns and rows that are unpacked and multiplied at a time
};

// The order of the columns in integer panels: as they are, or as codes of 4 or of 2 bits lie in 32-bit words.
enum PanelOrder { natural, nibbles, pairs_of_bits, panel_orders };
constexpr PanelOrder panel_order(int bits) { return bits == 4 ? nibbles : bits == 2 ? pairs_of_bits : natural; }

// The panels that each kind of weights goes through, or null: integers, rows that are computed from integers, bf16, other
// floats. All of a set have sums of the same form, so that products of several kinds add up.
struct PanelSet {
  const PanelKernels *integers[panel_orders], *computed, *bf16, *floats;
  std::size_t job = 128;  // rows whose panels and sums stay in the second-level cache beside a chunk of x
};

#if MPO_X86
extern const PanelSet kAmxPanels, kVnniPanels, kAvx512FloatPanels, kAvx2Panels, kAvx2FloatPanels;
#endif

}  // namespace mpo
