// An Mpo term (SPEC.md, section 6): a matrix as a product of cores.
#pragma once

#include <cstddef>
#include <vector>

#include "program/matrix.hpp"
#include "program/pool.hpp"

namespace mpo {

// A core G[l, o, i, r], stored as the rows (r, l) of a matrix with columns (o, i); `left` and `right` may be a prefix of
// the stored bonds.
struct Core {
  Matrix matrix;
  std::size_t left, right, out, in, stored_left;

  std::size_t row(std::size_t r, std::size_t l) const { return r * stored_left + l; }
};

// An Mpo term. The sweep goes from the first core to the last, or from the last to the first where `reverse`; for
// `densify_from` tokens and more (0: never) the matrix is built instead. layers/contraction.py computes what is cheapest.
class Operator {
 public:
  Operator(std::vector<Core> cores, bool reverse, std::size_t densify_from);

  std::size_t rows() const { return rows_; }
  std::size_t columns() const { return columns_; }
  // The shape (O, 1) x (1, I): W = first^T second with first [chi, O] and second [chi, I].
  bool is_low_rank() const { return low_rank_; }
  const Matrix& first() const { return first_; }
  const Matrix& second() const { return second_; }

  // y [tokens, rows] += W x; `state` is memory to work in.
  void add(const float* x, std::size_t tokens, float* y, std::vector<float>& state, Pool& pool) const;
  // The panels that its rows go through where the matrix is built for so many tokens, or null.
  const PanelKernels* panels(const PanelSet& set, std::size_t tokens) const;
  // out [count, columns] = the rows of W from r on.
  void rows(std::size_t r, std::size_t count, float* out) const;
  // out [columns] += row r of W
  void add_row(std::size_t r, float* out) const;
  std::size_t row_bytes() const { return low_rank_ ? first_.row_bytes() * first_.rows() / rows_ : 0; }

 private:
  class RowBuilder;
  void add_dense(const float* x, std::size_t tokens, float* y, Pool& pool) const;
  void step(const Core& core, std::size_t count, std::size_t rest, const float* from, float* to, float* spare,
            Pool& pool) const;
  void step_back(const Core& core, std::size_t count, std::size_t done, const float* from, float* to, float* spare,
                 Pool& pool) const;

  std::vector<Core> cores_;
  bool reverse_, low_rank_ = false;
  std::size_t densify_from_, rows_ = 1, columns_ = 1, largest_state_ = 0;
  Matrix first_, second_;
};

}  // namespace mpo
