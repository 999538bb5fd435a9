// Called by the NB_MODULE of bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace mpo {

void bind_kernels(nanobind::module_& module);

}  // namespace mpo
