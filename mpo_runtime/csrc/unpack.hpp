// Integer matrices back to float32.
#pragma once

#include <cstddef>

#include "matrix.hpp"

namespace mpo {

// The groups [first, first + count) of row r of w, as float32 [count * group].
void dequantize_groups(const QuantizedMatrix& w, std::size_t r, std::size_t first, std::size_t count, float* out);

}  // namespace mpo
