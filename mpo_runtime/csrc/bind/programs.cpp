// Programs and the KV cache.
#include <cstring>
#include <memory>

#include <nanobind/stl/shared_ptr.h>

#include "bind/bind.hpp"
#include "check.hpp"
#include "program/program.hpp"

namespace mpo {
namespace {

using Floats = Array<const float, 1>;
using Ids = Array<const std::int64_t, 2>;
using Batch = Array<const float, 3>;

std::vector<float> copied(const Floats& array) { return {array.data(), array.data() + array.size()}; }

void run(const Program& program, const std::optional<Ids>& ids, const std::vector<Batch>& inputs, Cache* cache,
         const Array<float, 3>& out) {
  Program::Call call{out.shape(0), out.shape(1), nullptr, {}, cache, {out.data(), out.shape(2)}};
  const auto expect_tokens = [&](const auto& array, const char* what) {
    expect(array.shape(0) == call.rows && array.shape(1) == call.count, "program: ", what,
           " and out differ in rows or tokens");
  };
  if (ids) {
    expect_tokens(*ids, "ids");
    call.ids = ids->data();
  }
  for (const Batch& input : inputs) {
    expect_tokens(input, "an input");
    call.inputs.push_back({input.data(), input.shape(2)});
  }
  const nb::gil_scoped_release release;
  program.run(call);
}

void bind_cache(nb::module_& module) {
  using Tables = std::vector<std::vector<std::size_t>>;
  using Numbers = std::vector<std::size_t>;
  nb::class_<Pages>(module, "Pages")
      .def(nb::init<std::size_t, std::size_t, std::size_t, const std::string&>(), nb::arg("blocks"), nb::arg("heads"),
           nb::arg("size"), nb::arg("type"))
      .def_prop_ro("count", &Pages::count)
      .def_prop_ro("page_bytes", &Pages::page_bytes)
      .def("grow", &Pages::grow, nb::arg("count"))
      .def("copy", &Pages::copy, nb::arg("source"), nb::arg("target"))
      .def("read", [](Pages& pages, std::size_t page) { return nb::bytes(pages.page(page), pages.page_bytes()); },
           nb::arg("page"))
      .def("write", [](Pages& pages, std::size_t page, const nb::bytes& content) {
             expect(content.size() == pages.page_bytes(), "cache: a page has ", pages.page_bytes(), " bytes, found ",
                    content.size());
             std::memcpy(pages.page(page), content.data(), content.size());
           }, nb::arg("page"), nb::arg("content"));
  nb::class_<Cache>(module, "Cache")
      .def("__init__", [](Cache* cache, std::shared_ptr<Pages> pages, const Tables& tables, const Numbers& lengths,
                          const Numbers& counts, const std::vector<bool>& few) {
             new (cache) Cache(std::move(pages), {tables, lengths, counts, few});
           }, nb::arg("pages"), nb::arg("tables"), nb::arg("lengths"), nb::arg("counts"), nb::arg("few"))
      .def(nb::init<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, const std::string&>(),
           nb::arg("blocks"), nb::arg("rows"), nb::arg("heads"), nb::arg("capacity"), nb::arg("size"), nb::arg("type"))
      .def_prop_ro("capacity", &Cache::capacity)
      .def_prop_ro("lengths", [](const Cache& cache) { return cache.lengths(); })
      .def_prop_ro("nbytes", &Cache::bytes)
      .def("advance", &Cache::advance, nb::arg("counts"))
      .def("rewind", &Cache::rewind, nb::arg("length"));
}

}  // namespace

void bind_programs(nb::module_& module) {
  bind_cache(module);
  nb::class_<Program>(module, "Program")
      .def(nb::init<bool>(), nb::arg("exact"))
      .def("input", &Program::input, nb::arg("width"))
      .def("embed", &Program::embed, nb::arg("table"), nb::arg("multiplier"))
      .def("rms_norm", [](Program& program, std::size_t x, const Floats& weight, float eps) {
             return program.rms_norm(x, copied(weight), eps);
           }, nb::arg("x"), nb::arg("weight").noconvert(), nb::arg("eps"))
      .def("layer_norm", [](Program& program, std::size_t x, const Floats& weight, const Floats& bias, float eps) {
             return program.layer_norm(x, copied(weight), copied(bias), eps);
           }, nb::arg("x"), nb::arg("weight").noconvert(), nb::arg("bias").noconvert(), nb::arg("eps"))
      .def("add_positions", [](Program& program, std::size_t x, const Floats& table) {
             return program.add_positions(x, copied(table));
           }, nb::arg("x"), nb::arg("table").noconvert())
      .def("linear", &Program::linear, nb::arg("x"), nb::arg("layer"))
      .def("rope_and_append",
           [](Program& program, std::size_t q, std::size_t k, std::size_t v, const Floats& frequencies,
              std::size_t block) { return program.rope_and_append(q, k, v, copied(frequencies), block); },
           nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("frequencies").noconvert(), nb::arg("block"))
      .def("attention", &Program::attention, nb::arg("q"), nb::arg("head_size"), nb::arg("block"), nb::arg("scale"),
           nb::arg("window"))
      .def("gelu", &Program::gelu, nb::arg("x"))
      .def("swiglu", &Program::swiglu, nb::arg("gate"), nb::arg("up"))
      .def("add_scaled", &Program::add_scaled, nb::arg("x"), nb::arg("y"), nb::arg("scale"))
      .def("divide", &Program::divide, nb::arg("x"), nb::arg("divisor"))
      .def("finish", &Program::finish, nb::arg("result"))
      .def("width", &Program::width, nb::arg("x"))
      .def("run", &run, nb::arg("ids").noconvert().none(), nb::arg("inputs").noconvert(), nb::arg("cache").none(),
           nb::arg("out").noconvert());
}

}  // namespace mpo
