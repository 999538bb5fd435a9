#include "program/matrix.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "check.hpp"
#include "level.hpp"
#include "memory.hpp"

namespace mpo {
namespace {

constexpr std::size_t kBlockRows = 16, kBlockColumns = 1024;  // of weights as float32: 64 KiB, turned once for all tokens

// Sizes whose product fits many times into an address, so that nothing computed from them wraps around.
void expect_sizes(const std::string& where, std::size_t rows, std::size_t columns) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max() / 64;
  expect(rows > 0 && columns > 0, where, ": expected at least one row and column");
  expect(rows <= kMost / columns, where, ": has too many rows and columns");
}

void expect_bytes(const std::string& where, const std::string& what, const Bytes& bytes, std::size_t expected) {
  expect(bytes.size == expected, where, ": ", what, " has ", bytes.size, " bytes, expected ", expected);
}

}  // namespace

Matrix Matrix::dense(const std::string& where, const std::string& type, std::size_t rows, std::size_t columns,
                     Bytes data) {
  const std::optional<Type> element = type_named(type);
  expect(element && *element != Type::int8, where, ": expected f32, f16 or bf16, found '", type, "'");
  expect_sizes(where, rows, columns);
  expect_bytes(where, "the matrix", data, rows * columns * element_size(*element));
  Matrix made;
  made.dense_ = {*element, rows, columns, data.data};
  made.owners_.push_back(std::move(data.owner));
  return made;
}

Matrix Matrix::integer(const std::string& where, int bits, std::size_t rows, std::size_t columns, std::size_t group,
                       const std::vector<Bytes>& planes, const Bytes& scale, const Bytes& zero) {
  const Width& width = width_of(where.c_str(), bits);
  expect_group(where.c_str(), group);
  expect_sizes(where, rows, columns);
  expect(columns % group == 0, where, ": group ", group, " does not divide ", columns, " columns");
  const std::size_t bits_of[2] = {static_cast<std::size_t>(width.low), static_cast<std::size_t>(width.high)};
  const std::size_t count = width.high ? 2 : 1;
  expect(planes.size() == count, where, ": ", bits, " bits are ", count, " plane(s), got ", planes.size());
  for (std::size_t i = 0; i < count; ++i)
    expect_bytes(where, "plane " + std::to_string(i), planes[i], rows * (columns * bits_of[i] / 8));
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
  expect(rows > 0 && rows <= this->rows(), "first_rows: expected 1 to ", this->rows(), ", found ", rows);
  Matrix cut = *this;
  (integer_ ? cut.quantized_.rows : cut.dense_.rows) = rows;
  return cut;
}

void Matrix::multiply(const Activations* codes, Rows<const float> x, const Task& task) const {
  if (!integer_) multiply_dense(dense_, x, task);
  else if (codes) mpo::multiply(quantized_, *codes, task);
  else multiply_exact(quantized_, x, task);
}

void Matrix::add_transposed(Rows<const float> s, const Task& task) const {
  if (integer_) mpo::add_transposed(quantized_, s, task);
  else add_transposed_dense(dense_, s, task);
}

void Matrix::part(std::size_t r, std::size_t begin, std::size_t count, float* out) const {
  const Level& level = active_level();
  if (!integer_) {
    const std::size_t at = (r * dense_.columns + begin) * element_size(dense_.type);
    return level.ops->widen(dense_.type, static_cast<const std::uint8_t*>(dense_.data) + at, 1.0f, count, out);
  }
  const std::size_t group = quantized_.group, first = begin / group, last = (begin + count + group - 1) / group;
  const std::size_t at = r * (quantized_.columns / group) + first;
  if (begin % group == 0 && count % group == 0) return level.dequantize(quantized_, at, last - first, out);
  std::vector<float> whole((last - first) * group);
  level.dequantize(quantized_, at, last - first, whole.data());
  std::memcpy(out, whole.data() + (begin - first * group), count * sizeof(float));
}

void Matrix::panel(const PanelKernels& kernels, std::size_t row, std::size_t column, const PanelRows& to) const {
  if (integer_) kernels.unpack(quantized_, row, column, to);
  else kernels.copy(dense_, row, column, to);
}

void Matrix::add_batch(Rows<const float> x, const Task& task) const {
  const Ops& ops = *active_level().ops;
  float* turned = scratch_floats(kBlockRows * (2 * kBlockColumns));
  float* rows = turned + kBlockRows * kBlockColumns;
  for (std::size_t r = task.begin; r < task.end; r += kBlockRows) {
    const std::size_t height = std::min(kBlockRows, task.end - r);
    for (std::size_t c = 0; c < columns(); c += kBlockColumns) {
      const std::size_t wide = std::min(kBlockColumns, columns() - c);
      for (std::size_t i = 0; i < height; ++i) part(r + i, c, wide, rows + i * kBlockColumns);
      for (std::size_t j = 0; j < wide; ++j)
        for (std::size_t i = 0; i < height; ++i) turned[j * height + i] = rows[i * kBlockColumns + j];
      ops.add_product({task.count, height, wide, {x.row(task.first) + c, x.stride}, {turned, height},
                       {task.y.row(task.first) + r, task.y.stride}});
    }
  }
}

}  // namespace mpo
