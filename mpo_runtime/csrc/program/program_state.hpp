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
  struct Token {
    std::size_t row, position;
  };
  std::vector<Span> spans;            // of the cache's rows, as they are when the call begins
  std::vector<Token> tokens;          // where each of them goes in the cache
  std::size_t few = 0;                // leading tokens that are generated text, not parts of a prompt
  std::vector<float> angles;          // cosines, then sines, each [tokens, frequencies]
  std::size_t angles_of = 0;          // which frequencies they are of
  std::vector<float> partial;         // of attention: mixed values, peaks and sums
  std::vector<Product> products;
  Workspace work;
};

}  // namespace mpo
