// Instruction sets. A level is one record: how to recognise a CPU that runs it, and the functions compiled for it. Which
// levels there are, and which functions each of them uses, is the table in level.cpp.
#pragma once

#include <string>
#include <vector>

#include "fit/fit.hpp"
#include "kernels/kernels.hpp"
#include "kernels/panels.hpp"
#include "ops/ops.hpp"

namespace mpo {

struct Level {
  const char* name;
  bool (*detect)();  // whether this CPU and its operating system run it
  const IntegerKernels* integers;
  const FloatKernels* floats;
  const Ops* ops;
  const Fits* fits;
  Dequantize dequantize;
  // For many rows of x that may be rounded, and for those that may not; or null.
  const PanelSet *panels, *float_panels;
};

// The names of the levels that this CPU runs, best first; the last one is always `generic`.
std::vector<std::string> supported_levels();

// The level in use: the best supported one, unless the environment variable MPO_ISA or set_level() chose another.
// Throws std::invalid_argument where MPO_ISA names a level that is unknown or that this CPU cannot run.
const Level& active_level();

// The supported level of that name. Throws std::invalid_argument, naming `where`, where there is none.
const Level& level_named(const char* where, const std::string& name);

// Chooses a level by name, or the best one with "auto"; false (and no change) where this CPU cannot run it.
bool set_level(const std::string& name);

}  // namespace mpo
