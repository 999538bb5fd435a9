// What each instruction set provides to matvec.cpp. Internal: include matvec.hpp instead.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "matrix.hpp"

// The sources of a level are empty where the compiler cannot mark single functions for that level.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MPO_X86_KERNELS 1
#else
#define MPO_X86_KERNELS 0
#endif
#if (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
#define MPO_ARM_KERNELS 1
#else
#define MPO_ARM_KERNELS 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MPO_INLINE __attribute__((always_inline)) inline
#else
#define MPO_INLINE inline
#endif

namespace mpo {

constexpr std::size_t kChunk = 256;      // columns that a kernel takes in one step; a tail is padded with zeros to this
constexpr std::size_t kScaleBlock = 32;  // columns of x that share a scale

// Bits of a plane by its index in the tables below.
constexpr int kPlaneBits[4] = {8, 4, 2, 1};
constexpr int plane_index(int bits) { return bits == 8 ? 0 : bits == 4 ? 1 : bits == 2 ? 2 : 3; }
// The planes of a matrix of so many bits as a set of bits by plane_index.
inline unsigned planes_of(int bits) {
  return 1u << plane_index(low_bits(bits)) | (high_bits(bits) ? 1u << plane_index(high_bits(bits)) : 0u);
}
constexpr unsigned kAllPlanes = 15;
// Which codes of each block of 32 a dot product takes: all, or (groups of 16) the first (0) or second (1) half.
constexpr int kWhole = -1;

// Scales that a kernel takes for a chunk: one for each half block in groups of 16, else one for each block.
constexpr std::size_t scales_per_chunk(std::size_t group) { return group == 16 ? 16 : 8; }

// How a level wants the int8 activations. A vector of `width` bytes of a p-bit plane holds 8 / p codes a byte; shifting
// it by k * p leaves the codes of the columns byte * (8 / p) + k, so the activations of these stand together.
struct Layout {
  std::size_t width[4];  // bytes of a vector of each plane, by plane_index
  bool split_ones;       // a 1-bit vector (32 bytes) is used twice side by side: k = 0, 4, 1, 5, 2, 6, 3, 7
  bool tiles;            // also as AMX tiles, see amx_tiles()
  bool pairs;            // a single row is multiplied two chunks at a time, see paired_block()
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
  const float* pair_scales[3];  // Layout::pairs, for a single row: scales and sums in the order of paired_block(), by
  const float* pair_sums[3];    // plane_index of the low plane; else null
  // AMX, for batch >= kTileBatch: blocks of 32 columns, [batch / 16, padded / 32, 8, 16, 4], and the scale of each
  // block [batch / 16, padded / 32, 16] and sums as above but with 16 rows of x innermost.
  const std::int8_t* tiles;
  const float* tile_scales;
};

// Where a row of x [columns] goes: the members of an ActivationView that belong to it.
struct ActivationRow {
  const float* x;
  std::size_t columns;
  std::int8_t* codes[4];
  float *scales, *sums, *half_sums;
};

constexpr std::size_t kTileBatch = 8;  // fewer rows of x than this do not fill an AMX tile well

using Arrange = void (*)(const ActivationRow&, const Layout&, unsigned planes, std::size_t chunks);
using Multiply = void (*)(const QuantizedMatrix&, const ActivationView&, std::size_t first, std::size_t count,
                          std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate);
using MultiplyExact = void (*)(const QuantizedMatrix&, const float* x, std::size_t batch, std::size_t begin,
                               std::size_t end, float* y, std::size_t stride, bool accumulate);
using MultiplyDense = void (*)(const DenseMatrix&, const float* x, std::size_t batch, std::size_t begin,
                               std::size_t end, float* y, std::size_t stride, bool accumulate);
using AddTransposed = void (*)(const QuantizedMatrix&, const float* s, std::size_t batch, std::size_t s_stride,
                               std::size_t begin, std::size_t end, float* y, std::size_t stride);
using AddTransposedDense = void (*)(const DenseMatrix&, const float* s, std::size_t batch, std::size_t s_stride,
                                    std::size_t begin, std::size_t end, float* y, std::size_t stride);

struct Kernels {
  Layout layout;
  Arrange arrange;    // a row of x, padded to so many chunks
  Multiply multiply;  // rows [first, first + count) of x
  MultiplyExact multiply_exact;
  MultiplyDense multiply_dense;
  AddTransposed add_transposed;
  AddTransposedDense add_transposed_dense;
};

extern const Kernels kGenericKernels;
#if MPO_X86_KERNELS
extern const Kernels kAvx2Kernels, kAvx512Kernels;
// What the levels above AVX-512 do differently.
void multiply_vbmi(const QuantizedMatrix&, const ActivationView&, std::size_t first, std::size_t count,
                   std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate);
void multiply_amx(const QuantizedMatrix&, const ActivationView&, std::size_t first, std::size_t count,
                  std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate);
#endif
#if MPO_ARM_KERNELS
extern const Kernels kNeonKernels;
#endif

const Kernels& kernels_of(Isa isa);

}  // namespace mpo
