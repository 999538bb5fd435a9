// Products of weights as they lie in the file with a few rows of activations. No threads here: each call computes the
// rows (or columns) [begin, end) of the result on the calling thread, so that a pool can hand out chunks.
//
// All functions throw std::invalid_argument where sizes do not fit together, before they touch memory.
#pragma once

#include <cstddef>

#include "activations.hpp"
#include "matrix.hpp"

namespace mpo {

// y[t * stride + r] = (accumulate: +=) sum_c w[r, c] x[t, c] for r in [begin, end), with the int8 copy of x.
void multiply(const QuantizedMatrix& w, const Activations& x, std::size_t begin, std::size_t end, float* y,
              std::size_t stride, bool accumulate);

// The same with x [batch, columns] in float32, and float32 arithmetic throughout.
void multiply_exact(const QuantizedMatrix& w, const float* x, std::size_t batch, std::size_t begin, std::size_t end,
                    float* y, std::size_t stride, bool accumulate);

// The same for float weights.
void multiply_dense(const DenseMatrix& w, const float* x, std::size_t batch, std::size_t begin, std::size_t end,
                    float* y, std::size_t stride, bool accumulate);

// y[t * stride + c] += sum_r s[t * s_stride + r] w[r, c] for columns c in [begin, end); begin and end are multiples of
// the group. float32 arithmetic.
void add_transposed(const QuantizedMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                    std::size_t begin, std::size_t end, float* y, std::size_t stride);

void add_transposed_dense(const DenseMatrix& w, const float* s, std::size_t batch, std::size_t s_stride,
                          std::size_t begin, std::size_t end, float* y, std::size_t stride);

}  // namespace mpo
