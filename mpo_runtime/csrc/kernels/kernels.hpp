// The products with weights that each instruction set provides, and what they work on. The tables of all levels are
// declared here; level.cpp chooses among them. Callers include products.hpp, which checks sizes first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "target.hpp"
#include "weights.hpp"

namespace mpo {

constexpr std::size_t kChunk = 256;      // columns that a kernel takes in one step; a tail is padded with zeros to this
constexpr std::size_t kScaleBlock = 32;  // columns of x that share a scale

// Bits of a plane by its index in the tables below.
constexpr int kPlaneBits[4] = {8, 4, 2, 1};
constexpr int plane_index(int bits) { return bits == 8 ? 0 : bits == 4 ? 1 : bits == 2 ? 2 : 3; }
constexpr unsigned kAllPlanes = 15;  // sets of planes are bits by plane_index
// The planes of a matrix of so many bits. Throws std::invalid_argument for an unknown width.
inline unsigned planes_of(int bits) {
  const Width& width = width_of("planes", bits);
  return 1u << plane_index(width.low) | (width.high ? 1u << plane_index(width.high) : 0u);
}
// Which codes of each block of 32 a dot product takes: all, or (groups of 16) the first (0) or second (1) half.
constexpr int kWhole = -1;

// Scales that a kernel takes for a chunk: one for each half block in groups of 16, else one for each block.
constexpr std::size_t scales_per_chunk(std::size_t group) { return group == 16 ? 16 : 8; }

// How a level wants the int8 activations. A vector of `width` bytes of a p-bit plane holds 8 / p codes a byte; shifting
// it by k * p leaves the codes of the columns byte * (8 / p) + k, so the activations of these stand together.
struct Layout {
  std::size_t width[4];  // bytes of a vector of each plane, by plane_index
  bool split_ones;       // a 1-bit vector (32 bytes) is used twice side by side: k = 0, 4, 1, 5, 2, 6, 3, 7
  bool pairs;            // rows are multiplied two chunks at a time, see paired_block()
};

// The block of two chunks (16 blocks) whose sum of products stands in `lane`, where the low plane has `low` bits.
constexpr int paired_block(int low, int lane) {
  const int part = lane / 4, place = lane % 4;
  return low == 8   ? part / 2 * 8 + 2 * place + part % 2
         : low == 4 ? part + 4 * place
                    : place / 2 * 8 + 2 * part + place % 2;
}

// Quantised activations as the kernels read them; all rows are padded with zeros to `padded` columns.
struct ActivationView {
  std::size_t batch, columns, padded;  // padded to whole chunks, or whole pairs of them
  const std::int8_t* codes[4];  // by plane_index: [batch, padded] in the order of Layout
  const float* scales;          // [batch, padded / 32]
  const float* sums;            // of scale * code over a block, [batch, padded / 32]
  const float* half_sums;       // and over half a block, [batch, padded / 16]
  const float* pair_scales[3];  // Layout::pairs: scales and sums in the order of paired_block(), [batch, padded / 32], by
  const float* pair_sums[3];    // plane_index of the low plane; else null
};

// Where a row of x [columns] goes: the members of an ActivationView that belong to it.
struct ActivationRow {
  const float* x;
  std::size_t columns;
  std::int8_t* codes[4];
  float *scales, *sums, *half_sums;
};

// The part of a product that one call computes: y[t, r], where r runs over the rows of w, or over its columns where the
// product is transposed.
struct Task {
  std::size_t first, count;  // the rows t of x and y
  std::size_t begin, end;    // r in [begin, end)
  Rows<float> y;
  bool accumulate;           // add to y instead of overwriting it; a transposed product always adds

  MPO_INLINE void put(std::size_t t, std::size_t r, float value) const {
    float* place = y.row(t) + r;
    *place = accumulate ? *place + value : value;
  }
};

using Arrange = void (*)(const ActivationRow&, const Layout&, unsigned planes, std::size_t chunks);
using Multiply = void (*)(const QuantizedMatrix&, const ActivationView&, const Task&);
using MultiplyFloat = void (*)(const QuantizedMatrix&, Rows<const float> x, const Task&);
using MultiplyDense = void (*)(const DenseMatrix&, Rows<const float> x, const Task&);
// The groups [first, first + count) of w, counted over all rows, as float32 [count * group].
using Dequantize = void (*)(const QuantizedMatrix&, std::size_t first, std::size_t count, float* out);

// Integer weights times int8 activations.
struct IntegerKernels {
  Layout layout;
  Arrange arrange;  // a row of x to int8, padded to so many chunks
  Multiply multiply;
};

// Products in float32 arithmetic.
struct FloatKernels {
  MultiplyFloat multiply_exact;  // integer weights
  MultiplyDense multiply_dense;
  MultiplyFloat add_transposed;  // y[t, c] += sum over r of x[t, r] w[r, c]
  MultiplyDense add_transposed_dense;
};

extern const IntegerKernels kGenericIntegers;
extern const FloatKernels kGenericFloats;
void dequantize_generic(const QuantizedMatrix&, std::size_t first, std::size_t count, float* out);
#if MPO_X86
extern const IntegerKernels kAvx2Integers, kAvx512Integers, kVbmiIntegers, kAmxIntegers;
extern const FloatKernels kAvx2Floats, kAvx512Floats;
void arrange_avx2(const ActivationRow&, const Layout&, unsigned planes, std::size_t chunks);
void dequantize_avx2(const QuantizedMatrix&, std::size_t first, std::size_t count, float* out);
#endif
#if MPO_ARM
extern const IntegerKernels kNeonIntegers;
extern const FloatKernels kNeonFloats;
#endif

}  // namespace mpo
