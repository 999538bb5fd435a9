// Rounding whole matrices [rows, columns] to integers, with all threads of the pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fit/fit.hpp"

namespace mpo {

struct FloatMatrix {
  std::size_t rows, columns;
  const float* data;  // [rows, columns]
};

// How a matrix is stored: the codes' range, and columns that share a scale.
struct FitGrid {
  int bits;
  std::size_t group;
  bool zeros;
};

// The search of a scale: see Levels.
struct Search {
  std::vector<float> factors;
  int turns;
};

struct StoredIntegers {
  std::uint8_t* codes;   // [rows, columns]
  std::uint16_t* scale;  // f16 [rows, columns / group]
  std::uint16_t* zero;   // likewise
};

struct Compensation {
  const std::int64_t* order;  // [columns], the columns in processing order, groups together
  const float* hessian;       // [columns, columns] and so on: see RoundTask
  const float* feedback;
  const float* weight;
  int passes;
  float tolerance;
  bool fast;  // products between blocks of columns in bf16, where the CPU has units for them
};

// Every value to its nearest code, for the least error weighted by `weight` [columns].
void round_to_nearest(const FloatMatrix& w, const float* weight, const FitGrid& grid, const Search& search,
                      const StoredIntegers& out);

// Error-compensated rounding and descent.
void round_compensated(const FloatMatrix& w, const FitGrid& grid, const Search& search, const Compensation& given,
                       const StoredIntegers& out);

// For each grid and row, the sum of weight * (w - w^)^2 that rounding to nearest leaves: [grids, rows].
void rounding_errors(const FloatMatrix& w, const float* weight, const std::vector<FitGrid>& grids, const Search& search,
                     float* out);

// w - w^ [rows, columns] of rounding to nearest.
void rounding_residual(const FloatMatrix& w, const float* weight, const FitGrid& grid, const Search& search, float* out);

// A matrix of integers in training [groups, group], float32 or bf16, and the gradients of its parts; with all threads too.
void write_cells(const Cells& cells, std::size_t groups, Type type, void* matrix);
void write_cell_gradients(const Cells& cells, std::size_t groups, Type type, const void* gradient, const CellGradients& out);

}  // namespace mpo
