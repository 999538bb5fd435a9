// The parts of mpo_runtime._native, which module.cpp puts together. Every shape, type and size is checked here or by what is
// called, before native code touches memory; what does not fit is a ValueError, an array of another element type or with
// strides a TypeError.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mpo {

namespace nb = nanobind;

// A contiguous array of numpy with so many dimensions.
template <class T, std::size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void bind_dequantize(nb::module_& module);
void bind_fit(nb::module_& module);
void bind_kernels(nb::module_& module);
void bind_layers(nb::module_& module);
void bind_programs(nb::module_& module);

}  // namespace mpo
