// Raw bindings of the kernels, for tests and benchmarks: arrays in, shapes checked, no threads.
#include "bind_kernels.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "matvec.hpp"

namespace nb = nanobind;

namespace mpo {
namespace {

// Planes come as flat bytes, so that a test can place them at any address.
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("kernels: ") + what + " does not fit the shape");
}

QuantizedMatrix matrix(int bits, std::size_t rows, std::size_t columns, std::size_t group, const Bytes& low,
                       const std::optional<Bytes>& high, const Bytes& scale, const std::optional<Bytes>& zero) {
  if (!group || columns % group) throw std::invalid_argument("kernels: expected columns to be a multiple of the group");
  const std::size_t groups = rows * (columns / group);
  expect(low.size() == rows * columns / 8 * static_cast<std::size_t>(low_bits(bits)), "low plane");
  if (high) expect(high->size() == rows * columns / 8 * static_cast<std::size_t>(high_bits(bits)), "high plane");
  expect(scale.size() == 2 * groups, "scale");
  if (zero) expect(zero->size() == 2 * groups, "zero");
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
  if (type != "f32" && type != "f16" && type != "bf16")
    throw std::invalid_argument("kernels: expected a type of f32, f16 or bf16, found '" + type + "'");
  const DenseMatrix w{type == "f32" ? Float::f32 : type == "f16" ? Float::f16 : Float::bf16, rows, columns, data.data()};
  expect(data.size() == rows * columns * element_size(w.type), "data");
  return w;
}

void expect_product(std::size_t rows, std::size_t columns, const Rows& x, const Result& y) {
  expect(x.shape(1) == columns, "x");
  expect(y.shape(0) == x.shape(0) && y.shape(1) == rows, "y");
}

// The transposed product takes s [batch, rows] and adds to y [batch, columns].
void expect_transposed(std::size_t rows, std::size_t columns, const Rows& s, const Result& y) {
  expect(s.shape(1) == rows, "s");
  expect(y.shape(0) == s.shape(0) && y.shape(1) == columns, "y");
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
      "quantize_activations",
      [](const Rows& x) { return new Activations(x.data(), x.shape(0), x.shape(1)); }, nb::arg("x").noconvert(),
      nb::rv_policy::take_ownership, nb::keep_alive<0, 1>());

  module.def(
      "multiply",
      [](const QuantizedMatrix& w, const Activations& x, const Result& y, std::size_t begin, std::size_t end,
         bool accumulate) {
        expect(y.shape(0) == x.batch() && y.shape(1) == w.rows, "y");
        nb::gil_scoped_release release;
        multiply(w, x, begin, end, y.data(), w.rows, accumulate);
      },
      nb::arg("w"), nb::arg("x"), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"),
      nb::arg("accumulate") = false);
  module.def(
      "multiply_exact",
      [](const QuantizedMatrix& w, const Rows& x, const Result& y, std::size_t begin, std::size_t end,
         bool accumulate) {
        expect_product(w.rows, w.columns, x, y);
        nb::gil_scoped_release release;
        multiply_exact(w, x.data(), x.shape(0), begin, end, y.data(), w.rows, accumulate);
      },
      nb::arg("w"), nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"),
      nb::arg("accumulate") = false);
  module.def(
      "multiply_dense",
      [](const DenseMatrix& w, const Rows& x, const Result& y, std::size_t begin, std::size_t end, bool accumulate) {
        expect_product(w.rows, w.columns, x, y);
        nb::gil_scoped_release release;
        multiply_dense(w, x.data(), x.shape(0), begin, end, y.data(), w.rows, accumulate);
      },
      nb::arg("w"), nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"),
      nb::arg("accumulate") = false);
  module.def(
      "add_transposed",
      [](const QuantizedMatrix& w, const Rows& s, const Result& y, std::size_t begin, std::size_t end) {
        expect_transposed(w.rows, w.columns, s, y);
        nb::gil_scoped_release release;
        add_transposed(w, s.data(), s.shape(0), w.rows, begin, end, y.data(), w.columns);
      },
      nb::arg("w"), nb::arg("s").noconvert(), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"));
  module.def(
      "add_transposed_dense",
      [](const DenseMatrix& w, const Rows& s, const Result& y, std::size_t begin, std::size_t end) {
        expect_transposed(w.rows, w.columns, s, y);
        nb::gil_scoped_release release;
        add_transposed_dense(w, s.data(), s.shape(0), w.rows, begin, end, y.data(), w.columns);
      },
      nb::arg("w"), nb::arg("s").noconvert(), nb::arg("y").noconvert(), nb::arg("begin"), nb::arg("end"));

  module.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  module.def("set_isa", &set_isa, nb::arg("name"));
  module.def("supported_isas", &supported_isas);
}

}  // namespace mpo
