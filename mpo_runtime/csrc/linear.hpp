// Linear layers over the mapped file: y = sum of terms (x) + bias, terms being float or integer matrices or operators of
// cores (SPEC.md, sections 3 to 6).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "activations.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace mpo {

// Bytes of a tensor in the mapped file, and what keeps it mapped.
struct Bytes {
  const std::uint8_t* data = nullptr;
  std::size_t size = 0;
  std::shared_ptr<void> owner;
};

// A stored matrix of either kind.
class Matrix {
 public:
  // Throw std::invalid_argument, naming `where`, unless the bytes hold exactly the matrix.
  static Matrix dense(const std::string& where, const std::string& type, std::size_t rows, std::size_t columns,
                      Bytes data);
  // `zero` and `high` may be empty. `planes` lists the low plane first.
  static Matrix integer(const std::string& where, int bits, std::size_t rows, std::size_t columns, std::size_t group,
                        const std::vector<Bytes>& planes, const Bytes& scale, const Bytes& zero);

  bool is_integer() const { return integer_; }
  unsigned planes() const { return integer_ ? planes_of(quantized_.bits) : 0; }
  std::size_t rows() const { return integer_ ? quantized_.rows : dense_.rows; }
  std::size_t columns() const { return integer_ ? quantized_.columns : dense_.columns; }
  std::size_t row_bytes() const;
  // Rows of y must be cut at multiples of this where columns() of a core are the rows of the layer.
  std::size_t column_step() const { return integer_ ? quantized_.group : 1; }
  // The same matrix without its last rows: a prefix of the same bytes. Throws unless rows <= rows().
  Matrix first_rows(std::size_t rows) const;

  // See matvec.hpp; `x` is null in exact mode, then `input` [batch, columns] is read.
  void multiply(const Activations* x, const float* input, std::size_t batch, std::size_t begin, std::size_t end,
                float* y, std::size_t stride, bool accumulate) const;
  // y += W x for rows [begin, end) and many tokens, in float32: each block of weights is widened once for all of them.
  void add_batch(const float* x, std::size_t tokens, std::size_t begin, std::size_t end, float* y,
                 std::size_t stride) const;
  void add_transposed(const float* s, std::size_t batch, std::size_t begin, std::size_t end, float* y,
                      std::size_t stride) const;
  // The elements [begin, begin + count) of row r as float32.
  void part(std::size_t r, std::size_t begin, std::size_t count, float* out) const;
  void row(std::size_t r, float* out) const { part(r, 0, columns(), out); }

 private:
  bool integer_ = false;
  QuantizedMatrix quantized_{};
  DenseMatrix dense_{};
  std::vector<std::shared_ptr<void>> owners_;
};

// A core G[l, o, i, r], stored as the rows (r, l) of a matrix with columns (o, i); `left` and `right` may be a prefix of
// the stored bonds.
struct Core {
  Matrix matrix;
  std::size_t left, right, out, in, stored_left;

  std::size_t row(std::size_t r, std::size_t l) const { return r * stored_left + l; }
};

// An Mpo term. The sweep goes from the first core to the last, or back where `reverse`; from `densify_from` tokens on (0:
// never) the matrix is built instead. The caller knows what is cheaper.
class Operator {
 public:
  Operator(std::vector<Core> cores, bool reverse, std::size_t densify_from);

  std::size_t rows() const { return rows_; }
  std::size_t columns() const { return columns_; }
  // The shape (O, 1) x (1, I): W = first^T second with first [chi, O] and second [chi, I], which joins the base's chunks.
  bool is_low_rank() const { return low_rank_; }
  const Matrix& first() const { return first_; }
  const Matrix& second() const { return second_; }

  // y [tokens, rows] += W x; `state` is memory to work in.
  void add(const float* x, std::size_t tokens, float* y, std::vector<float>& state, Pool& pool) const;
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

struct Linear {
  // Throws std::invalid_argument unless every term and the bias have the layer's size.
  Linear(std::string name, std::size_t rows, std::size_t columns, std::vector<Matrix> matrices,
         std::vector<Operator> operators, std::vector<float> bias);

  // Row r of the weight, as float32 [columns]; the bias is no part of it.
  void row(std::size_t r, float* out) const;

  std::string name;
  std::size_t rows, columns;
  std::vector<Matrix> matrices;
  std::vector<Operator> operators;
  std::vector<float> bias;
  std::size_t row_bytes = 0, row_step = 1;
  unsigned planes = 0;  // widths that int8 copies of x are needed for, outside exact mode
};

// One of the layers that take the same input.
struct Product {
  const Linear* layer;
  float* y;  // [tokens, layer->rows]
};

// What apply() works in; reused from call to call, by one call at a time.
class Workspace {
 public:
  Activations& codes(std::size_t tile);

  struct Job {
    std::size_t product, begin, end;
  };
  std::vector<Job> jobs;
  std::vector<float> middle;  // the low-rank terms' inner vectors
  std::vector<float> state;

 private:
  std::vector<std::unique_ptr<Activations>> codes_;
};

// Computes all the products with x [tokens, columns], with int8 copies of x unless `exact`.
void apply(const std::vector<Product>& products, const float* x, std::size_t tokens, bool exact, Workspace& work,
           Pool& pool);

}  // namespace mpo
