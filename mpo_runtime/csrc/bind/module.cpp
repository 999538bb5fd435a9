// mpo_runtime._native
#include "bind/bind.hpp"
#include "level.hpp"
#include "program/bandwidth.hpp"
#include "program/pool.hpp"

namespace mpo {
namespace {

void set_threads(int threads) {
  const nb::gil_scoped_release release;
  pool().resize(threads);
}

double bandwidth(const Array<const std::uint64_t, 1>& data, bool evicted) {
  const nb::gil_scoped_release release;
  if (evicted) evict(data.data(), data.size());
  return read_bandwidth(data.data(), data.size());
}

}  // namespace
}  // namespace mpo

NB_MODULE(_native, module) {
  namespace nb = nanobind;
  module.doc() = "Native kernels of mpo_runtime on numpy memory.";
  mpo::bind_dequantize(module);
  mpo::bind_fit(module);
  mpo::bind_kernels(module);
  mpo::bind_layers(module);
  mpo::bind_programs(module);
  module.def("active_isa", [] { return std::string(mpo::active_level().name); });
  module.def("set_isa", &mpo::set_level, nb::arg("name"));
  module.def("supported_isas", &mpo::supported_levels);
  module.def("threads", [] { return mpo::pool().threads(); });
  module.def("set_threads", &mpo::set_threads, nb::arg("threads"));
  module.def("set_alone", &mpo::Pool::set_alone, nb::arg("wanted"));
  module.def("default_threads", &mpo::default_threads);
  module.def("read_bandwidth", &mpo::bandwidth, nb::arg("data").noconvert(), nb::arg("evict") = false);
}
