// A stored matrix: checked against its bytes once, then multiplied by the kernels.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "linear.hpp"
#include "matvec.hpp"
#include "ops.hpp"
#include "scratch.hpp"
#include "unpack.hpp"

namespace mpo {
namespace {

constexpr std::size_t kBlockRows = 16, kBlockColumns = 1024;  // of weights as float32: 64 KiB, turned once for all tokens

void expect(bool good, const std::string& where, const std::string& message) {
  if (!good) throw std::invalid_argument(where + ": " + message);
}

// Sizes whose product fits many times into an address, so that nothing computed from them wraps around.
void expect_sizes(const std::string& where, std::size_t rows, std::size_t columns) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max() / 64;
  expect(rows > 0 && columns > 0, where, "expected at least one row and column");
  expect(rows <= kMost / columns, where, "has too many rows and columns");
}

void expect_bytes(const std::string& where, const std::string& what, const Bytes& bytes, std::size_t expected) {
  expect(bytes.size == expected, where,
         what + " has " + std::to_string(bytes.size) + " bytes, expected " + std::to_string(expected));
}

}  // namespace

Matrix Matrix::dense(const std::string& where, const std::string& type, std::size_t rows, std::size_t columns,
                     Bytes data) {
  expect(type == "f32" || type == "f16" || type == "bf16", where, "expected f32, f16 or bf16, found '" + type + "'");
  Matrix made;
  made.dense_ = {type == "f32" ? Float::f32 : type == "f16" ? Float::f16 : Float::bf16, rows, columns, data.data};
  expect_sizes(where, rows, columns);
  expect_bytes(where, "the matrix", data, rows * columns * element_size(made.dense_.type));
  made.owners_.push_back(std::move(data.owner));
  return made;
}

Matrix Matrix::integer(const std::string& where, int bits, std::size_t rows, std::size_t columns, std::size_t group,
                       const std::vector<Bytes>& planes, const Bytes& scale, const Bytes& zero) {
  expect(bits == 8 || bits == 6 || bits == 5 || bits == 4 || bits == 3 || bits == 2, where,
         "bits is " + std::to_string(bits) + ", expected 8, 6, 5, 4, 3 or 2");
  expect(group == 16 || group == 32 || group == 64 || group == 128 || group == 256, where,
         "group is " + std::to_string(group) + ", expected 16, 32, 64, 128 or 256");
  expect_sizes(where, rows, columns);
  expect(columns % group == 0, where,
         "group " + std::to_string(group) + " does not divide " + std::to_string(columns) + " columns");
  const std::size_t widths[2] = {static_cast<std::size_t>(low_bits(bits)), static_cast<std::size_t>(high_bits(bits))};
  const std::size_t count = widths[1] ? 2 : 1;
  expect(planes.size() == count, where,
         std::to_string(bits) + " bits are " + std::to_string(count) + " plane(s), got " + std::to_string(planes.size()));
  for (std::size_t i = 0; i < count; ++i)
    expect_bytes(where, "plane " + std::to_string(i), planes[i], rows * (columns * widths[i] / 8));
  expect_bytes(where, "scale", scale, rows * (columns / group) * 2);
  if (zero.data) expect_bytes(where, "zero", zero, rows * (columns / group) * 2);
  Matrix made;
  made.integer_ = true;
  made.quantized_ = {bits,
                     rows,
                     columns,
                     group,
                     planes[0].data,
                     count > 1 ? planes[1].data : nullptr,
                     reinterpret_cast<const std::uint16_t*>(scale.data),
                     reinterpret_cast<const std::uint16_t*>(zero.data)};
  for (const Bytes& plane : planes) made.owners_.push_back(plane.owner);
  made.owners_.push_back(scale.owner);
  made.owners_.push_back(zero.owner);
  return made;
}

std::size_t Matrix::row_bytes() const {
  if (!integer_) return dense_.columns * element_size(dense_.type);
  const std::size_t groups = quantized_.columns / quantized_.group;
  return quantized_.columns * static_cast<std::size_t>(quantized_.bits) / 8 + groups * (quantized_.zero ? 4 : 2);
}

Matrix Matrix::first_rows(std::size_t rows) const {
  expect(rows > 0 && rows <= this->rows(), "first_rows", "expected 1 to " + std::to_string(this->rows()));
  Matrix cut = *this;
  (integer_ ? cut.quantized_.rows : cut.dense_.rows) = rows;
  return cut;
}

void Matrix::multiply(const Activations* x, const float* input, std::size_t batch, std::size_t begin, std::size_t end,
                      float* y, std::size_t stride, bool accumulate) const {
  if (!integer_) multiply_dense(dense_, input, batch, begin, end, y, stride, accumulate);
  else if (x) mpo::multiply(quantized_, *x, begin, end, y, stride, accumulate);
  else multiply_exact(quantized_, input, batch, begin, end, y, stride, accumulate);
}

void Matrix::add_transposed(const float* s, std::size_t batch, std::size_t begin, std::size_t end, float* y,
                            std::size_t stride) const {
  if (integer_) mpo::add_transposed(quantized_, s, batch, rows(), begin, end, y, stride);
  else add_transposed_dense(dense_, s, batch, rows(), begin, end, y, stride);
}

void Matrix::part(std::size_t r, std::size_t begin, std::size_t count, float* out) const {
  if (!integer_) {
    const Float type = dense_.type;
    const KvType stored = type == Float::f32 ? KvType::f32 : type == Float::f16 ? KvType::f16 : KvType::bf16;
    const auto* from = static_cast<const std::uint8_t*>(dense_.data) + (r * dense_.columns + begin) * element_size(type);
    return active_ops().widen(stored, from, 1.0f, count, out);
  }
  const std::size_t group = quantized_.group, first = begin / group, last = (begin + count + group - 1) / group;
  if (begin % group == 0 && count % group == 0) return dequantize_groups(quantized_, r, first, last - first, out);
  std::vector<float> whole((last - first) * group);
  dequantize_groups(quantized_, r, first, last - first, whole.data());
  std::memcpy(out, whole.data() + (begin - first * group), count * sizeof(float));
}

void Matrix::add_batch(const float* x, std::size_t tokens, std::size_t begin, std::size_t end, float* y,
                       std::size_t stride) const {
  const auto add_product = active_ops().add_product;
  float* turned = scratch_floats(kBlockRows * (2 * kBlockColumns));
  float* rows = turned + kBlockRows * kBlockColumns;
  for (std::size_t r = begin; r < end; r += kBlockRows) {
    const std::size_t height = std::min(kBlockRows, end - r);
    for (std::size_t c = 0; c < columns(); c += kBlockColumns) {
      const std::size_t wide = std::min(kBlockColumns, columns() - c);
      for (std::size_t i = 0; i < height; ++i) part(r + i, c, wide, rows + i * kBlockColumns);
      for (std::size_t j = 0; j < wide; ++j)
        for (std::size_t i = 0; i < height; ++i) turned[j * height + i] = rows[i * kBlockColumns + j];
      add_product(tokens, height, wide, x + c, columns(), turned, height, y + r, stride);
    }
  }
}

}  // namespace mpo
