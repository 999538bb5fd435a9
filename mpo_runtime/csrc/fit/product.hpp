// Products of float32 matrices that are rounded to bf16, with sums in float32: what calibration text is run with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "target.hpp"

namespace mpo {

// A matrix whose element (r, k) is data[r * row + k * step]; one of the two strides is 1.
struct StridedMatrix {
  const float* data;
  std::size_t rows, row, step;
};

// Rows of the left matrix that a tile takes, and rows of the right one.
constexpr std::size_t kTileLeft = 8, kTileRight = 48;

// Kernels of an instruction set that multiplies bf16. Pairs are two neighbouring elements of a row, rounded.
struct PairKernels {
  // Rows [first, first + width) of columns [begin, end), pairs side by side: out [(end - begin + 1) / 2, width]; zeros beyond
  // the last row and column. `width` is kTileLeft or kTileRight.
  void (*arrange)(const StridedMatrix& from, std::size_t first, std::size_t width, std::size_t begin, std::size_t end,
                  std::uint32_t* out);
  // sums [kTileLeft, kTileRight] of products of pairs [count, kTileLeft] and [count, kTileRight], added to c where `add`.
  // Only `rows` and `columns` of c, whose rows are `stride` apart, are touched.
  void (*tile)(const std::uint32_t* left, const std::uint32_t* right, std::size_t count, float* c, std::size_t stride,
               std::size_t rows, std::size_t columns, bool add);
  // Rounds `count` floats to bf16.
  void (*round)(const float* from, std::size_t count, std::uint16_t* out);
  // As RoundedMatrices::add_product.
  void (*add_product)(const std::uint16_t* a, std::size_t stride, const float* b, std::size_t rows, std::size_t count, float* c);
};

// The kernels for this CPU, null where its vectors have none or MPO_ISA names a level below AVX-512.
const PairKernels* pair_kernels();

#if MPO_X86 && !defined(MPO_EMULATED_INTRINSICS)
extern const PairKernels kBf16Pairs;
#endif

// c [left.rows, right.rows] = (or +=, where `add`) left right^T over `count` columns, with all threads of the pool. With
// `upper`, entries below the diagonal may be left out.
void add_products(const StridedMatrix& left, const StridedMatrix& right, std::size_t count, float* c, bool add, bool upper);

}  // namespace mpo
