// Layers over the mapped file.
#include <memory>

#include <nanobind/stl/shared_ptr.h>

#include "bind/bind.hpp"
#include "program/linear.hpp"

namespace mpo {
namespace {

using RawBytes = Array<const std::uint8_t, 1>;
using Floats = Array<const float, 1>;

// The array is held, and with it the mapped file, until the last layer that reads it goes.
Bytes held(const RawBytes& array) { return {array.data(), array.size(), std::make_shared<RawBytes>(array)}; }

Matrix dense(const std::string& where, const std::string& type, std::size_t rows, std::size_t columns,
             const RawBytes& data) {
  return Matrix::dense(where, type, rows, columns, held(data));
}

Matrix integer(const std::string& where, int bits, std::size_t rows, std::size_t columns, std::size_t group,
               const std::vector<RawBytes>& planes, const RawBytes& scale, const std::optional<RawBytes>& zero) {
  std::vector<Bytes> bytes;
  for (const RawBytes& plane : planes) bytes.push_back(held(plane));
  return Matrix::integer(where, bits, rows, columns, group, bytes, held(scale), zero ? held(*zero) : Bytes{});
}

void make_core(Core* place, const Matrix& matrix, std::size_t left, std::size_t right, std::size_t out, std::size_t in,
               std::size_t stored_left) {
  new (place) Core{matrix, left, right, out, in, stored_left};
}

void make_transform(Transform* place, std::size_t count, std::size_t block, const Floats& matrices) {
  new (place) Transform(count, block, std::vector<float>(matrices.data(), matrices.data() + matrices.size()));
}

void make_linear(Linear* place, const std::string& name, std::size_t rows, std::size_t columns,
                 const std::vector<Matrix>& matrices, const std::vector<Operator>& operators,
                 const std::optional<Floats>& bias, std::size_t hadamard, std::shared_ptr<const Transform> transform) {
  std::vector<float> values;
  if (bias) values.assign(bias->data(), bias->data() + bias->size());
  new (place) Linear(name, rows, columns, matrices, operators, std::move(values), hadamard, std::move(transform));
}

}  // namespace

void bind_layers(nb::module_& module) {
  nb::class_<Matrix>(module, "Matrix")
      .def_static("dense", &dense, nb::arg("where"), nb::arg("type"), nb::arg("rows"), nb::arg("columns"),
                  nb::arg("data").noconvert())
      .def_static("integer", &integer, nb::arg("where"), nb::arg("bits"), nb::arg("rows"), nb::arg("columns"),
                  nb::arg("group"), nb::arg("planes").noconvert(), nb::arg("scale").noconvert(),
                  nb::arg("zero").noconvert().none());
  nb::class_<Core>(module, "Core")
      .def("__init__", &make_core, nb::arg("matrix"), nb::arg("left"), nb::arg("right"), nb::arg("out"), nb::arg("in_"),
           nb::arg("stored_left"));
  nb::class_<Operator>(module, "Operator")
      .def(nb::init<std::vector<Core>, bool, std::size_t>(), nb::arg("cores"), nb::arg("reverse"),
           nb::arg("densify_from") = 0);
  nb::class_<Transform>(module, "Transform")
      .def("__init__", &make_transform, nb::arg("count"), nb::arg("block"), nb::arg("matrices").noconvert());
  nb::class_<Linear>(module, "Linear")
      .def("__init__", &make_linear, nb::arg("name"), nb::arg("rows"), nb::arg("columns"), nb::arg("matrices"),
           nb::arg("operators"), nb::arg("bias").noconvert().none(), nb::arg("hadamard") = 0,
           nb::arg("transform").none() = nb::none())
      .def_ro("name", &Linear::name)
      .def_ro("rows", &Linear::rows)
      .def_ro("columns", &Linear::columns);
}

}  // namespace mpo
