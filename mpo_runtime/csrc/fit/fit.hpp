// Rounding a matrix to integers: the search of a group's scale and zero, error-compensated rounding, and descent on codes and
// scales, for kFitRows rows at once. exporter/mpo_exporter/quantize has the same in torch, which the tests compare with.
//
// Values are transposed: [columns, kFitRows], so that one vector holds one column of several rows. Codes are floats.
#pragma once

// Including what only the sources of the instruction sets use: they need it before their target is set (see target.hpp).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "half.hpp"
#include "target.hpp"
#include "weights.hpp"

namespace mpo {

constexpr std::size_t kFitRows = 64;
// Columns between two updates of the whole gradient, and between two of a block's.
constexpr std::size_t kFitBlock = 128, kFitInner = 32;

// The codes 0 ... 2^bits - 1 of a group, and how its scale is searched: the group's range times each of `factors`, then
// `turns` times the scale (and zero) of least squares for the codes, and the codes for these.
struct Levels {
  int bits;
  bool zeros;  // a zero is stored for each group; else all have implicit_zero(bits)
  const float* factors;
  std::size_t factor_count;
  int turns;
};

// The least sum of weight * (w - scale * (q - zero))^2 over a group of columns.
struct SearchTask {
  Levels levels;
  const float* values;  // [count, kFitRows]
  const float* weight;  // [count]
  std::size_t count;
  float* scale;  // [kFitRows], multiples of half precision, as is `zero`
  float* zero;
  float* error;
};

// Products with large matrices that were rounded to bf16, where the CPU multiplies these.
struct RoundedMatrices {
  const std::uint16_t* hessian;   // [columns, columns]
  const std::uint16_t* feedback;  // [columns, columns], turned: entry (j, i) is that of column i for the later column j
  // c [rows, kFitRows] += a [rows, count] b [count, kFitRows], b rounded too; rows of a are `stride` apart, and count is even.
  void (*add_product)(const std::uint16_t* a, std::size_t stride, const float* b, std::size_t rows, std::size_t count, float* c);
};

// Rounds columns in processing order against the Hessian H = R R^T; see Hessian in calibrate/hessian.py.
struct RoundTask {
  Levels levels;
  std::size_t columns, group;
  const float* hessian;   // H [columns, columns]
  const float* feedback;  // [columns, columns], R with every column divided by its diagonal entry
  const float* weight;    // [columns], these entries squared
  const float* ones;      // [columns], the sum of each row of H inside its group
  int passes;             // of descent at most
  float tolerance;        // descent ends when a pass lowers the error by less than this share
  float* wanted;          // [columns, kFitRows]: the values; afterwards what rounding leaves of them
  float* codes;           // [columns, kFitRows]
  float* scale;           // [columns / group, kFitRows]
  float* zero;
  float* work;  // round_work(columns, group) floats
  const RoundedMatrices* rounded;  // for the products between blocks of columns; null: in float32
};

constexpr std::size_t round_work(std::size_t columns, std::size_t group) {
  const std::size_t block = group > kFitBlock ? group : kFitBlock;
  return (columns + 3 * block + kFitInner + 8) * kFitRows;
}

// A matrix of integers in training: scale * (q - zero), q the whole numbers 0 ... top nearest to latent numbers. Its groups
// of `group` columns, a multiple of 16 up to kLargestCell, lie one after the other.
struct Cells {
  const float* latent;  // [groups, group]
  const float* scale;   // [groups]
  const float* zero;    // [groups]
  std::size_t group;
  float top;
};
constexpr std::size_t kLargestCell = 256;

// The gradients of cells, from that of the matrix. That of a latent number outside of the range is 0.
struct CellGradients {
  float* latent;  // [groups, group]
  float* scale;   // [groups]
  float* zero;    // [groups]
};

struct Fits {
  void (*search)(const SearchTask& task);
  // The nearest codes of values [count, kFitRows] on one grid for each row.
  void (*encode)(const Levels& levels, const float* values, std::size_t count, const float* scale, const float* zero,
                 float* codes);
  void (*round)(const RoundTask& task);
  // The groups [first, last) of a matrix in training, of float32 or bf16: its values, and from its gradient those of its parts.
  void (*write_cells)(const Cells& cells, std::size_t first, std::size_t last, Type type, void* matrix);
  void (*write_gradients)(const Cells& cells, std::size_t first, std::size_t last, Type type, const void* gradient,
                          const CellGradients& out);
};

extern const Fits kGenericFits;
#if MPO_X86
extern const Fits kAvx2Fits, kAvx512Fits;
#endif
#if MPO_ARM
extern const Fits kNeonFits;
#endif

}  // namespace mpo
