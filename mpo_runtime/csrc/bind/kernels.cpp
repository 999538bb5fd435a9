// Raw bindings of the kernels, for tests and benchmarks: arrays in, shapes checked, no threads.
#include "bind/bind.hpp"
#include "check.hpp"
#include "kernels/products.hpp"

namespace mpo {
namespace {

// Planes come as flat bytes, so that a test can place them at any address.
using Bytes = Array<const std::uint8_t, 1>;
using Input = Array<const float, 2>;
using Result = Array<float, 2>;

void expect_fit(bool fits, const char* what) { expect(fits, "kernels: ", what, " does not fit the shape"); }

QuantizedMatrix matrix(int bits, std::size_t rows, std::size_t columns, std::size_t group, const Bytes& low,
                       const std::optional<Bytes>& high, const Bytes& scale, const std::optional<Bytes>& zero) {
  const Width& width = width_of("kernels", bits);
  expect(group > 0 && columns % group == 0, "kernels: expected columns to be a multiple of the group");
  const std::size_t groups = rows * (columns / group);
  expect_fit(low.size() == rows * columns / 8 * static_cast<std::size_t>(width.low), "low plane");
  if (high) expect_fit(high->size() == rows * columns / 8 * static_cast<std::size_t>(width.high), "high plane");
  expect_fit(scale.size() == 2 * groups, "scale");
  if (zero) expect_fit(zero->size() == 2 * groups, "zero");
  return {bits,
          rows,
          columns,
          group,
          low.data(),
          high ? high->data() : nullptr,
          reinterpret_cast<const std::uint16_t*>(scale.data()),
          zero ? reinterpret_cast<const std::uint16_t*>(zero->data()) : nullptr};
}

DenseMatrix dense(const std::string& type, std::size_t rows, std::size_t columns, const Bytes& data) {
  const std::optional<Type> element = type_named(type);
  expect(element && *element != Type::int8, "kernels: expected a type of f32, f16 or bf16, found '", type, "'");
  expect_fit(data.size() == rows * columns * element_size(*element), "data");
  return {*element, rows, columns, data.data()};
}

Rows<const float> rows_of(const Input& x) { return {x.data(), x.shape(1)}; }

// All rows of x, for rows (or columns) [begin, end) of a matrix; `columns` and `results` are the lengths of the rows of x
// and y.
Task task_of(const Input& x, const Result& y, std::size_t columns, std::size_t results, std::size_t begin,
             std::size_t end, bool accumulate) {
  expect_fit(x.shape(1) == columns, "x");
  expect_fit(y.shape(0) == x.shape(0) && y.shape(1) == results, "y");
  return {0, x.shape(0), begin, end, {y.data(), results}, accumulate};
}

void multiply_codes(const QuantizedMatrix& w, const Activations& x, const Result& y, std::size_t begin, std::size_t end,
                    bool accumulate) {
  expect_fit(y.shape(0) == x.batch() && y.shape(1) == w.rows, "y");
  const Task task{0, x.batch(), begin, end, {y.data(), w.rows}, accumulate};
  const nb::gil_scoped_release release;
  multiply(w, x, task);
}

// The three products of rows: W is a matrix of either kind, `product` multiplies it.
template <class W, void (*product)(const W&, Rows<const float>, const Task&)>
void multiply_rows(const W& w, const Input& x, const Result& y, std::size_t begin, std::size_t end, bool accumulate) {
  const Task task = task_of(x, y, w.columns, w.rows, begin, end, accumulate);
  const nb::gil_scoped_release release;
  product(w, rows_of(x), task);
}

// The transposed products take s [batch, rows] and add to y [batch, columns].
template <class W, void (*product)(const W&, Rows<const float>, const Task&)>
void multiply_transposed(const W& w, const Input& s, const Result& y, std::size_t begin, std::size_t end) {
  const Task task = task_of(s, y, w.rows, w.columns, begin, end, true);
  const nb::gil_scoped_release release;
  product(w, rows_of(s), task);
}

}  // namespace

void bind_kernels(nb::module_& module) {
  nb::class_<QuantizedMatrix>(module, "QuantizedMatrix")
      .def_ro("rows", &QuantizedMatrix::rows)
      .def_ro("columns", &QuantizedMatrix::columns);
  nb::class_<DenseMatrix>(module, "DenseMatrix").def_ro("rows", &DenseMatrix::rows);
  nb::class_<Activations>(module, "Activations");

  // The results point into the arrays, which therefore live as long as they do.
  module.def("quantized_matrix", &matrix, nb::arg("bits"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"),
             nb::arg("low").noconvert(), nb::arg("high").noconvert().none(), nb::arg("scale").noconvert(),
             nb::arg("zero").noconvert().none(), nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>(),
             nb::keep_alive<0, 7>(), nb::keep_alive<0, 8>());
  module.def("dense_matrix", &dense, nb::arg("type"), nb::arg("rows"), nb::arg("columns"), nb::arg("data").noconvert(),
             nb::keep_alive<0, 4>());
  module.def(
      "quantize_activations", [](const Input& x) { return new Activations(x.data(), x.shape(0), x.shape(1)); },
      nb::arg("x").noconvert(), nb::rv_policy::take_ownership);

  module.def("multiply", &multiply_codes, nb::arg("w"), nb::arg("x"), nb::arg("y").noconvert(), nb::arg("begin"),
             nb::arg("end"), nb::arg("accumulate") = false);
  module.def("multiply_exact", &multiply_rows<QuantizedMatrix, multiply_exact>, nb::arg("w"), nb::arg("x").noconvert(),
             nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"), nb::arg("accumulate") = false);
  module.def("multiply_dense", &multiply_rows<DenseMatrix, multiply_dense>, nb::arg("w"), nb::arg("x").noconvert(),
             nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"), nb::arg("accumulate") = false);
  module.def("add_transposed", &multiply_transposed<QuantizedMatrix, add_transposed>, nb::arg("w"),
             nb::arg("s").noconvert(), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"));
  module.def("add_transposed_dense", &multiply_transposed<DenseMatrix, add_transposed_dense>, nb::arg("w"),
             nb::arg("s").noconvert(), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"));
}

}  // namespace mpo
