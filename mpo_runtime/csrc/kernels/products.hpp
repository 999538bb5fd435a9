// Products of weights as they lie in the file with a few rows of activations. No threads here: each call computes what its
// Task says on the calling thread, so that a pool can hand out parts.
//
// All functions throw std::invalid_argument where sizes do not fit together, before they touch memory.
#pragma once

#include "kernels/activations.hpp"
#include "kernels/kernels.hpp"

namespace mpo {

// y[t, r] = (accumulate: +=) sum over c of w[r, c] x[t, c], with the int8 copy of x.
void multiply(const QuantizedMatrix& w, const Activations& x, const Task& task);

// The same with x in float32, and float32 arithmetic throughout.
void multiply_exact(const QuantizedMatrix& w, Rows<const float> x, const Task& task);

// The same for float weights.
void multiply_dense(const DenseMatrix& w, Rows<const float> x, const Task& task);

// y[t, c] += sum over r of s[t, r] w[r, c]; begin and end are multiples of the group. float32 arithmetic.
void add_transposed(const QuantizedMatrix& w, Rows<const float> s, const Task& task);
void add_transposed_dense(const DenseMatrix& w, Rows<const float> s, const Task& task);

}  // namespace mpo
