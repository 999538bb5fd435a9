// A stored transform of a layer's input: small matrices on the diagonal of T (SPEC.md, LinearSpec).
#pragma once

#include <cstddef>
#include <vector>

namespace mpo {

class Transform {
 public:
  // `matrices` [count, block, block]; a count of 1 is the matrix of every block. Throws std::invalid_argument for other sizes.
  Transform(std::size_t count, std::size_t block, const std::vector<float>& matrices);

  bool fits(std::size_t columns) const;
  std::size_t block() const { return block_; }

  // y = T x for the blocks [begin, end) of x, whose blocks lie one after the other, token after token; y is not x. What a
  // block becomes does not depend on the others, in any bit.
  void apply(const float* x, std::size_t begin, std::size_t end, float* y) const;
  // y = w T for a row w [columns] of a matrix.
  void apply_back(const float* w, std::size_t columns, float* y) const;

 private:
  void multiply(const std::vector<float>& factors, const float* x, std::size_t begin, std::size_t end, float* y) const;

  std::size_t count_, block_;
  std::vector<float> turned_, plain_;  // each block's transposed matrix, by which its row is multiplied, and the matrix
};

}  // namespace mpo
