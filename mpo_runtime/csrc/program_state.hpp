// The memory of one call of a program; kept for the next call.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#include "program.hpp"

namespace mpo {

// Floats that start at a cache line; growing loses what they held.
class Floats {
 public:
  Floats() = default;
  Floats(Floats&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Floats& operator=(Floats&&) = delete;
  ~Floats() { ::operator delete[](data_, std::align_val_t{64}); }

  void grow(std::size_t count) {
    if (count <= size_) return;
    ::operator delete[](data_, std::align_val_t{64});
    data_ = nullptr;
    size_ = 0;
    data_ = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64}));
    size_ = count;
  }
  float* data() { return data_; }

 private:
  float* data_ = nullptr;
  std::size_t size_ = 0;
};

struct Program::State {
  std::vector<Floats> slots;
  std::vector<float*> places;         // of each register
  std::vector<std::size_t> lengths;   // of the cache's rows when the call began
  std::vector<float> angles;          // cosines, then sines, each [tokens, frequencies]
  std::size_t angles_of = 0;          // which frequencies they are of
  std::vector<float> partial;         // of attention: mixed values, peaks and sums
  std::vector<Product> products;
  Workspace work;
};

}  // namespace mpo
