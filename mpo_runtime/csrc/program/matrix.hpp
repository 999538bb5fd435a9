// A stored matrix of either kind: checked against its bytes once, then multiplied by the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/panels.hpp"
#include "kernels/products.hpp"

namespace mpo {

// Bytes of a tensor in the mapped file, and what keeps it mapped.
struct Bytes {
  const std::uint8_t* data = nullptr;
  std::size_t size = 0;
  std::shared_ptr<void> owner;
};

class Matrix {
 public:
  // Both throw std::invalid_argument, naming `where`, unless the bytes hold exactly the matrix.
  static Matrix dense(const std::string& where, const std::string& type, std::size_t rows, std::size_t columns,
                      Bytes data);
  // `zero` may be empty. `planes` lists the low plane first.
  static Matrix integer(const std::string& where, int bits, std::size_t rows, std::size_t columns, std::size_t group,
                        const std::vector<Bytes>& planes, const Bytes& scale, const Bytes& zero);

  bool is_integer() const { return integer_; }
  unsigned planes() const { return integer_ ? planes_of(quantized_.bits) : 0; }
  std::size_t rows() const { return integer_ ? quantized_.rows : dense_.rows; }
  std::size_t columns() const { return integer_ ? quantized_.columns : dense_.columns; }
  std::size_t row_bytes() const;
  // begin and end of add_transposed() are multiples of this.
  std::size_t column_step() const { return integer_ ? quantized_.group : 1; }
  // The same matrix without its last rows: a prefix of the same bytes. Throws unless rows is 1 to rows().
  Matrix first_rows(std::size_t rows) const;

  // See products.hpp. `codes` is x as int8 for an integer matrix, or null: then x is multiplied in float32.
  void multiply(const Activations* codes, Rows<const float> x, const Task& task) const;
  void add_transposed(Rows<const float> s, const Task& task) const;
  // Adds W x like multiply(), in float32, for many rows of x: each block of weights is widened once for all of them.
  void add_batch(Rows<const float> x, const Task& task) const;
  // The panels that its rows go through, or null: as they are stored, and computed from it.
  const PanelKernels* panels(const PanelSet& set) const { return integer_ ? set.integers[panel_order(quantized_.bits)] : computed_panels(set); }
  const PanelKernels* computed_panels(const PanelSet& set) const {
    return integer_ ? set.computed : dense_.type == Type::bf16 ? set.bf16 : set.floats;
  }
  PanelCodes panel_codes() const { return {quantized_.bits, quantized_.group == 16, quantized_.zero != nullptr}; }
  // A panel of its rows from `row` on.
  void panel(const PanelKernels& kernels, std::size_t row, std::size_t column, const PanelRows& to) const;
  // The elements [begin, begin + count) of row r as float32.
  void part(std::size_t r, std::size_t begin, std::size_t count, float* out) const;
  void row(std::size_t r, float* out) const { part(r, 0, columns(), out); }

 private:
  bool integer_ = false;
  QuantizedMatrix quantized_{};
  DenseMatrix dense_{};
  std::vector<std::shared_ptr<void>> owners_;
};

}  // namespace mpo
