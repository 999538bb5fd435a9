#include "fit/rounding.hpp"

#include "fit/product.hpp"
#include "level.hpp"
#include "memory.hpp"
#include "program/pool.hpp"

namespace mpo {
namespace {

// Numbers of a matrix in training that a thread takes at a time.
constexpr std::size_t kCellsAtOnce = 1 << 14;

Levels levels_of(const FitGrid& grid, const Search& search) {
  return {grid.bits, grid.zeros, search.factors.data(), search.factors.size(), search.turns};
}

// The rows [first, first + kFitRows) transposed, columns in an order or as they are; rows past the end are zeros.
void gather(const FloatMatrix& w, const std::int64_t* order, std::size_t first, float* out) {
  for (std::size_t r = 0; r < kFitRows; ++r) {
    const float* row = w.data + (first + r) * w.columns;
    const bool inside = first + r < w.rows;
    for (std::size_t j = 0; j < w.columns; ++j)
      out[j * kFitRows + r] = inside ? row[order ? static_cast<std::size_t>(order[j]) : j] : 0.0f;
  }
}

// Calls f(first row) for every block of kFitRows rows, on all threads.
template <class Function>
void each_block(std::size_t rows, Function function) {
  pool().run((rows + kFitRows - 1) / kFitRows, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t block = begin; block < end; ++block) function(block * kFitRows);
  });
}

// Writes codes, scales and zeros of a block whose columns are in an order, or as they are.
void scatter(const FloatMatrix& w, const FitGrid& grid, const std::int64_t* order, std::size_t first, const float* codes,
             const float* scale, const float* zero, const StoredIntegers& out) {
  const std::size_t groups = w.columns / grid.group;
  const auto column_of = [&](std::size_t j) { return order ? static_cast<std::size_t>(order[j]) : j; };
  for (std::size_t r = 0; r < kFitRows && first + r < w.rows; ++r) {
    std::uint8_t* const row = out.codes + (first + r) * w.columns;
    for (std::size_t j = 0; j < w.columns; ++j) row[column_of(j)] = static_cast<std::uint8_t>(codes[j * kFitRows + r]);
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t to = (first + r) * groups + column_of(g * grid.group) / grid.group;
      out.scale[to] = float_to_half(scale[g * kFitRows + r]);
      out.zero[to] = float_to_half(zero[g * kFitRows + r]);
    }
  }
}

// H and the turned feedback in bf16, in memory that the calling thread keeps.
RoundedMatrices rounded(const PairKernels& kernels, const Compensation& given, std::size_t columns) {
  static thread_local Memory memory;
  auto* const hessian = memory.reserve<std::uint16_t>(2 * columns * columns);
  auto* const feedback = hessian + columns * columns;
  constexpr std::size_t kRowsAtOnce = 16;
  pool().run((columns + kRowsAtOnce - 1) / kRowsAtOnce, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t part = begin; part < end; ++part) {
      const std::size_t first = part * kRowsAtOnce, last = std::min(first + kRowsAtOnce, columns);
      kernels.round(given.hessian + first * columns, (last - first) * columns, hessian + first * columns);
      float turned[kRowsAtOnce][kFitBlock];
      for (std::size_t at = 0; at < last; at += kFitBlock) {
        const std::size_t some = std::min(kFitBlock, columns - at);
        for (std::size_t i = 0; i < some; ++i)
          for (std::size_t j = first; j < last; ++j) turned[j - first][i] = given.feedback[(at + i) * columns + j];
        for (std::size_t j = first; j < last; ++j) kernels.round(turned[j - first], some, feedback + j * columns + at);
      }
    }
  });
  return {hessian, feedback, kernels.add_product};
}

}  // namespace

void round_to_nearest(const FloatMatrix& w, const float* weight, const FitGrid& grid, const Search& search,
                      const StoredIntegers& out) {
  const Levels levels = levels_of(grid, search);
  const Fits& fits = *active_level().fits;
  const std::size_t groups = w.columns / grid.group;
  each_block(w.rows, [&](std::size_t first) {
    float* const values = scratch_floats((2 * w.columns + 2 * groups + 1) * kFitRows);
    float* const codes = values + w.columns * kFitRows;
    float* const scale = codes + w.columns * kFitRows;
    float* const zero = scale + groups * kFitRows;
    float* const error = zero + groups * kFitRows;
    gather(w, nullptr, first, values);
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t at = g * grid.group;
      fits.search({levels, values + at * kFitRows, weight + at, grid.group, scale + g * kFitRows, zero + g * kFitRows, error});
      fits.encode(levels, values + at * kFitRows, grid.group, scale + g * kFitRows, zero + g * kFitRows,
                  codes + at * kFitRows);
    }
    scatter(w, grid, nullptr, first, codes, scale, zero, out);
  });
}

void round_compensated(const FloatMatrix& w, const FitGrid& grid, const Search& search, const Compensation& given,
                       const StoredIntegers& out) {
  const Levels levels = levels_of(grid, search);
  const Fits& fits = *active_level().fits;
  const std::size_t columns = w.columns, groups = columns / grid.group;
  std::vector<float> ones(columns);
  for (std::size_t j = 0; j < columns; ++j) {
    const float* const row = given.hessian + j * columns + j / grid.group * grid.group;
    double sum = 0;
    for (std::size_t k = 0; k < grid.group; ++k) sum += static_cast<double>(row[k]);
    ones[j] = static_cast<float>(sum);
  }
  const PairKernels* const kernels = given.fast ? pair_kernels() : nullptr;
  const RoundedMatrices matrices = kernels ? rounded(*kernels, given, columns) : RoundedMatrices{};
  each_block(w.rows, [&](std::size_t first) {
    float* const wanted = scratch_floats((2 * columns + 2 * groups) * kFitRows + round_work(columns, grid.group));
    float* const codes = wanted + columns * kFitRows;
    float* const scale = codes + columns * kFitRows;
    float* const zero = scale + groups * kFitRows;
    float* const work = zero + groups * kFitRows;
    gather(w, given.order, first, wanted);
    fits.round({levels, columns, grid.group, given.hessian, given.feedback, given.weight, ones.data(), given.passes,
                given.tolerance, wanted, codes, scale, zero, work, kernels ? &matrices : nullptr});
    scatter(w, grid, given.order, first, codes, scale, zero, out);
  });
}

void rounding_errors(const FloatMatrix& w, const float* weight, const std::vector<FitGrid>& grids, const Search& search,
                     float* out) {
  const Fits& fits = *active_level().fits;
  each_block(w.rows, [&](std::size_t first) {
    float* const values = scratch_floats((w.columns + 4) * kFitRows);
    float* const scale = values + w.columns * kFitRows;
    float *const zero = scale + kFitRows, *const error = zero + kFitRows, *const sums = error + kFitRows;
    gather(w, nullptr, first, values);
    for (std::size_t number = 0; number < grids.size(); ++number) {
      const FitGrid& grid = grids[number];
      const Levels levels = levels_of(grid, search);
      std::fill(sums, sums + kFitRows, 0.0f);
      for (std::size_t at = 0; at < w.columns; at += grid.group) {
        fits.search({levels, values + at * kFitRows, weight + at, grid.group, scale, zero, error});
        for (std::size_t r = 0; r < kFitRows; ++r) sums[r] += error[r];
      }
      for (std::size_t r = 0; r < kFitRows && first + r < w.rows; ++r) out[number * w.rows + first + r] = sums[r];
    }
  });
}

void rounding_residual(const FloatMatrix& w, const float* weight, const FitGrid& grid, const Search& search, float* out) {
  const Levels levels = levels_of(grid, search);
  const Fits& fits = *active_level().fits;
  each_block(w.rows, [&](std::size_t first) {
    float* const values = scratch_floats((w.columns + grid.group + 3) * kFitRows);
    float* const codes = values + w.columns * kFitRows;
    float* const scale = codes + grid.group * kFitRows;
    float *const zero = scale + kFitRows, *const error = zero + kFitRows;
    gather(w, nullptr, first, values);
    for (std::size_t at = 0; at < w.columns; at += grid.group) {
      fits.search({levels, values + at * kFitRows, weight + at, grid.group, scale, zero, error});
      fits.encode(levels, values + at * kFitRows, grid.group, scale, zero, codes);
      for (std::size_t r = 0; r < kFitRows && first + r < w.rows; ++r)
        for (std::size_t j = 0; j < grid.group; ++j) {
          const std::size_t here = j * kFitRows + r;
          out[(first + r) * w.columns + at + j] = values[at * kFitRows + here] - scale[r] * (codes[here] - zero[r]);
        }
    }
  });
}

void write_cells(const Cells& cells, std::size_t groups, Type type, void* matrix) {
  pool().run(groups, kCellsAtOnce / cells.group, [&](std::size_t begin, std::size_t end) {
    active_level().fits->write_cells(cells, begin, end, type, matrix);
  });
}

void write_cell_gradients(const Cells& cells, std::size_t groups, Type type, const void* gradient, const CellGradients& out) {
  pool().run(groups, kCellsAtOnce / cells.group, [&](std::size_t begin, std::size_t end) {
    active_level().fits->write_gradients(cells, begin, end, type, gradient, out);
  });
}

}  // namespace mpo
