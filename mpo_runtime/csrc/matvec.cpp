#include "matvec.hpp"

#include <stdexcept>
#include <string>

namespace mpo {
namespace {

[[noreturn]] void fail(const char* what, const std::string& expected, std::size_t found) {
  throw std::invalid_argument(std::string(what) + ": expected " + expected + ", found " + std::to_string(found));
}

void check_matrix(const char* what, const QuantizedMatrix& w) {
  if (w.bits < 2 || w.bits > 8 || w.bits == 7)
    fail(what, "bits to be 8, 6, 5, 4, 3 or 2", static_cast<std::size_t>(w.bits));
  if (w.group != 16 && w.group != 32 && w.group != 64 && w.group != 128 && w.group != 256)
    fail(what, "a group of 16, 32, 64, 128 or 256", w.group);
  if (w.columns % w.group) fail(what, "columns to be a multiple of the group", w.columns);
  if (!w.low || !w.scale || (high_bits(w.bits) != 0) != (w.high != nullptr))
    throw std::invalid_argument(std::string(what) + ": expected " + (high_bits(w.bits) ? "two planes" : "one plane") +
                                " and scales for " + std::to_string(w.bits) + " bits");
}

void check_range(const char* what, std::size_t begin, std::size_t end, std::size_t limit) {
  if (begin > end || end > limit) fail(what, "a range inside " + std::to_string(limit), end);
}

void check_group_range(const char* what, std::size_t begin, std::size_t end, const QuantizedMatrix& w) {
  check_range(what, begin, end, w.columns);
  if (begin % w.group) fail(what, "begin to be a multiple of the group", begin);
  if (end % w.group) fail(what, "end to be a multiple of the group", end);
}

void check_dense(const char* what, const DenseMatrix& w) {
  if (!w.data) throw std::invalid_argument(std::string(what) + ": expected data");
}

#if MPO_X86_KERNELS
Kernels above_avx512(Multiply multiply, bool tiles) {
  Kernels kernels = kAvx512Kernels;
  kernels.multiply = multiply;
  kernels.layout.tiles = tiles;
  return kernels;
}
#endif

}  // namespace

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
#if MPO_X86_KERNELS
    case Isa::amx: {
      static const Kernels amx = above_avx512(multiply_amx, true);
      return amx;
    }
    case Isa::vbmi: {
      static const Kernels vbmi = above_avx512(multiply_vbmi, false);
      return vbmi;
    }
    case Isa::avx512: return kAvx512Kernels;
    case Isa::avx2: return kAvx2Kernels;
#endif
#if MPO_ARM_KERNELS
    case Isa::neon: return kNeonKernels;
#endif
    default: return kGenericKernels;
  }
}

void multiply(const QuantizedMatrix& w, const Activations& x, std::size_t begin, std::size_t end, float* y,
              std::size_t stride, bool accumulate) {
  check_matrix("multiply", w);
  check_range("multiply", begin, end, w.rows);
  if (x.columns() != w.columns)
    fail("multiply", "activations of " + std::to_string(w.columns) + " columns", x.columns());
  kernels_of(x.isa()).multiply(w, x.view(), 0, x.batch(), begin, end, y, stride, accumulate);
}

void multiply_exact(const QuantizedMatrix& w, const float* x, std::size_t batch, std::size_t begin, std::size_t end,
                    float* y, std::size_t stride, bool accumulate) {
  check_matrix("multiply_exact", w);
  check_range("multiply_exact", begin, end, w.rows);
  kernels_of(active_isa()).multiply_exact(w, x, batch, begin, end, y, stride, accumulate);
}

void multiply_dense(const DenseMatrix& w, const float* x, std::size_t batch, std::size_t begin, std::size_t end,
                    float* y, std::size_t stride, bool accumulate) {
  check_dense("multiply_dense", w);
  check_range("multiply_dense", begin, end, w.rows);
  kernels_of(active_isa()).multiply_dense(w, x, batch, begin, end, y, stride, accumulate);
}

void add_transposed(const QuantizedMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                    std::size_t begin, std::size_t end, float* y, std::size_t stride) {
  check_matrix("add_transposed", w);
  check_group_range("add_transposed", begin, end, w);
  kernels_of(active_isa()).add_transposed(w, s, batch, s_stride, begin, end, y, stride);
}

void add_transposed_dense(const DenseMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                          std::size_t begin, std::size_t end, float* y, std::size_t stride) {
  check_dense("add_transposed_dense", w);
  check_range("add_transposed_dense", begin, end, w.columns);
  kernels_of(active_isa()).add_transposed_dense(w, s, batch, s_stride, begin, end, y, stride);
}

}  // namespace mpo
