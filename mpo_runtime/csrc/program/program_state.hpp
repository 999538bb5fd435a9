// The memory of one call of a program; kept for the next call.
#pragma once

#include <cstddef>
#include <vector>

#include "memory.hpp"
#include "program/program.hpp"

namespace mpo {

struct Program::State {
  std::vector<Memory> slots;
  std::vector<float*> places;         // of each register
  std::vector<std::size_t> lengths;   // of the cache's rows when the call began
  std::vector<float> angles;          // cosines, then sines, each [tokens, frequencies]
  std::size_t angles_of = 0;          // which frequencies they are of
  std::vector<float> partial;         // of attention: mixed values, peaks and sums
  std::vector<Product> products;
  Workspace work;
};

}  // namespace mpo
