#include "kernels/products.hpp"

#include "check.hpp"
#include "level.hpp"

namespace mpo {
namespace {

void check_matrix(const char* what, const QuantizedMatrix& w) {
  const Width& width = width_of(what, w.bits);
  expect_group(what, w.group);
  expect(w.columns % w.group == 0, what, ": expected columns to be a multiple of the group, found ", w.columns);
  expect(w.low && w.scale && (width.high != 0) == (w.high != nullptr), what, ": expected ",
         width.high ? "two planes" : "one plane", " and scales for ", w.bits, " bits");
}

void check_matrix(const char* what, const DenseMatrix& w) {
  expect_float_type(what, w.type);
  expect(w.data, what, ": expected data");
}

void check_range(const char* what, const Task& task, std::size_t limit) {
  expect(task.begin <= task.end && task.end <= limit, what, ": expected a range inside ", limit, ", found ", task.end);
}

}  // namespace

void multiply(const QuantizedMatrix& w, const Activations& x, const Task& task) {
  check_matrix("multiply", w);
  check_range("multiply", task, w.rows);
  expect(x.columns() == w.columns, "multiply: expected activations of ", w.columns, " columns, found ", x.columns());
  expect(task.first + task.count <= x.batch(), "multiply: expected at most ", x.batch(), " rows, found ",
         task.first + task.count);
  x.level().integers->multiply(w, x.view(), task);
}

void multiply_exact(const QuantizedMatrix& w, Rows<const float> x, const Task& task) {
  check_matrix("multiply_exact", w);
  check_range("multiply_exact", task, w.rows);
  active_level().floats->multiply_exact(w, x, task);
}

void multiply_dense(const DenseMatrix& w, Rows<const float> x, const Task& task) {
  check_matrix("multiply_dense", w);
  check_range("multiply_dense", task, w.rows);
  active_level().floats->multiply_dense(w, x, task);
}

void add_transposed(const QuantizedMatrix& w, Rows<const float> s, const Task& task) {
  check_matrix("add_transposed", w);
  check_range("add_transposed", task, w.columns);
  expect(task.begin % w.group == 0, "add_transposed: expected begin to be a multiple of the group, found ", task.begin);
  expect(task.end % w.group == 0, "add_transposed: expected end to be a multiple of the group, found ", task.end);
  active_level().floats->add_transposed(w, s, task);
}

void add_transposed_dense(const DenseMatrix& w, Rows<const float> s, const Task& task) {
  check_matrix("add_transposed_dense", w);
  check_range("add_transposed_dense", task, w.columns);
  active_level().floats->add_transposed_dense(w, s, task);
}

}  // namespace mpo
