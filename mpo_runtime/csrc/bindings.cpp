// mpo_runtime._native: layers over the mapped file, the KV cache and programs. Every shape, type and size is checked
// here or in the constructors, before native code touches memory; what does not fit is a ValueError (or a TypeError for
// another element type, or an array with strides).

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bandwidth.hpp"
#include "bind_kernels.hpp"
#include "bind_unpack.hpp"
#include "program.hpp"

namespace nb = nanobind;

namespace mpo {
namespace {

using RawBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// The array is held, and with it the mapped file, until the last layer that reads it goes.
Bytes held(const RawBytes& array) { return {array.data(), array.size(), std::make_shared<RawBytes>(array)}; }

std::vector<float> copied(const Vector& array) { return {array.data(), array.data() + array.size()}; }

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

void expect(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument("program: " + message);
}

void run(const Program& program, const std::optional<Ids>& ids, const std::vector<Rows>& inputs, Cache* cache,
         const Result& out) {
  expect(program.finished(), "is not finished");
  Program::Call call{out.shape(0), out.shape(1), nullptr, {}, cache, out.data()};
  expect(out.shape(2) == program.width(program.result()), "out has the wrong width");
  if (ids) {
    expect(ids->shape(0) == call.rows && ids->shape(1) == call.count, "ids and out differ in rows or tokens");
    call.ids = ids->data();
  }
  expect(inputs.size() == program.inputs(), "expected " + std::to_string(program.inputs()) + " inputs, found " +
                                                std::to_string(inputs.size()));
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    expect(inputs[i].shape(0) == call.rows && inputs[i].shape(1) == call.count, "an input and out differ in rows or tokens");
    expect(inputs[i].shape(2) == program.input_width(i), "an input has the wrong width");
    call.inputs.push_back(inputs[i].data());
  }
  const nb::gil_scoped_release release;
  program.run(call);
}

void bind_layers(nb::module_& module) {
  nb::class_<Matrix>(module, "Matrix")
      .def_static("dense", &dense, nb::arg("where"), nb::arg("type"), nb::arg("rows"), nb::arg("columns"),
                  nb::arg("data").noconvert())
      .def_static("integer", &integer, nb::arg("where"), nb::arg("bits"), nb::arg("rows"), nb::arg("columns"),
                  nb::arg("group"), nb::arg("planes").noconvert(), nb::arg("scale").noconvert(),
                  nb::arg("zero").noconvert().none());
  nb::class_<Core>(module, "Core")
      .def("__init__",
           [](Core* place, const Matrix& matrix, std::size_t left, std::size_t right, std::size_t out, std::size_t in,
              std::size_t stored_left) { new (place) Core{matrix, left, right, out, in, stored_left}; },
           nb::arg("matrix"), nb::arg("left"), nb::arg("right"), nb::arg("out"), nb::arg("in_"), nb::arg("stored_left"));
  nb::class_<Operator>(module, "Operator")
      .def(nb::init<std::vector<Core>, bool, std::size_t>(), nb::arg("cores"), nb::arg("reverse"),
           nb::arg("densify_from") = 0);
  nb::class_<Linear>(module, "Linear")
      .def("__init__",
           [](Linear* place, const std::string& name, std::size_t rows, std::size_t columns,
              const std::vector<Matrix>& matrices, const std::vector<Operator>& operators,
              const std::optional<Vector>& bias) {
             new (place) Linear(name, rows, columns, matrices, operators, bias ? copied(*bias) : std::vector<float>{});
           },
           nb::arg("name"), nb::arg("rows"), nb::arg("columns"), nb::arg("matrices"), nb::arg("operators"),
           nb::arg("bias").noconvert().none())
      .def_ro("name", &Linear::name)
      .def_ro("rows", &Linear::rows)
      .def_ro("columns", &Linear::columns);
}

void bind_cache(nb::module_& module) {
  nb::class_<Cache>(module, "Cache")
      .def(nb::init<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, const std::string&>(),
           nb::arg("blocks"), nb::arg("rows"), nb::arg("heads"), nb::arg("capacity"), nb::arg("size"), nb::arg("type"))
      .def_prop_ro("capacity", &Cache::capacity)
      .def_prop_ro("lengths", [](const Cache& cache) { return cache.lengths(); })
      .def_prop_ro("nbytes", &Cache::bytes)
      .def("advance", &Cache::advance, nb::arg("counts"))
      .def("rewind", &Cache::rewind, nb::arg("length"));
}

void bind_programs(nb::module_& module) {
  nb::class_<Program>(module, "Program")
      .def(nb::init<bool>(), nb::arg("exact"))
      .def("input", &Program::input, nb::arg("width"))
      .def("embed", &Program::embed, nb::arg("table"), nb::arg("multiplier"))
      .def("rms_norm", [](Program& program, std::size_t x, const Vector& weight, float eps) {
             return program.rms_norm(x, copied(weight), eps);
           }, nb::arg("x"), nb::arg("weight").noconvert(), nb::arg("eps"))
      .def("linear", &Program::linear, nb::arg("x"), nb::arg("layer"))
      .def("rope_and_append",
           [](Program& program, std::size_t q, std::size_t k, std::size_t v, const Vector& frequencies,
              std::size_t block) { return program.rope_and_append(q, k, v, copied(frequencies), block); },
           nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("frequencies").noconvert(), nb::arg("block"))
      .def("attention", &Program::attention, nb::arg("q"), nb::arg("head_size"), nb::arg("block"), nb::arg("scale"))
      .def("swiglu", &Program::swiglu, nb::arg("gate"), nb::arg("up"))
      .def("add_scaled", &Program::add_scaled, nb::arg("x"), nb::arg("y"), nb::arg("scale"))
      .def("divide", &Program::divide, nb::arg("x"), nb::arg("divisor"))
      .def("finish", &Program::finish, nb::arg("result"))
      .def("width", &Program::width, nb::arg("x"))
      .def("run", &run, nb::arg("ids").noconvert().none(), nb::arg("inputs").noconvert(), nb::arg("cache").none(),
           nb::arg("out").noconvert());
}

}  // namespace
}  // namespace mpo

NB_MODULE(_native, module) {
  module.doc() = "Native kernels of mpo_runtime on numpy memory.";
  mpo::bind_unpack(module);
  mpo::bind_kernels(module);
  mpo::bind_layers(module);
  mpo::bind_cache(module);
  mpo::bind_programs(module);
  module.def("threads", [] { return mpo::pool().threads(); });
  module.def("set_threads", [](int threads) {
    const nb::gil_scoped_release release;
    mpo::pool().resize(threads);
  }, nb::arg("threads"));
  module.def("read_bandwidth", [](const nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& data) {
    const nb::gil_scoped_release release;
    return mpo::read_bandwidth(data.data(), data.size());
  }, nb::arg("data").noconvert());
  module.def("default_threads", &mpo::default_threads);
}
