// int8 activations, prepared once for all the matrices that multiply the same x.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "kernels.hpp"

namespace mpo {

// Memory that starts at a cache line and only grows; its content is lost when it does.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  void* reserve(std::size_t bytes);

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// `batch` rows of x [batch, columns] as int8 with one scale per 32 columns, in the orders that the kernels of the level
// active at prepare() need for every plane width. Reusable: prepare() again for the next x. Columns are a multiple of
// 16. Neither copyable nor movable, since the kernels hold pointers into it; share it by reference among threads.
class Activations {
 public:
  Activations() = default;
  Activations(const float* x, std::size_t batch, std::size_t columns) { prepare(x, batch, columns); }
  Activations(const Activations&) = delete;
  Activations& operator=(const Activations&) = delete;

  // Arranged for planes of the widths in `planes` only, a set of bits by plane_index. Throws std::invalid_argument where
  // columns is not a multiple of 16.
  void prepare(const float* x, std::size_t batch, std::size_t columns, unsigned planes = kAllPlanes);

  const float* input() const { return input_; }  // x as given to prepare(), for the exact kernels
  std::size_t batch() const { return view_.batch; }
  std::size_t columns() const { return view_.columns; }
  Isa isa() const { return isa_; }
  const ActivationView& view() const { return view_; }

 private:
  void allocate(std::size_t batch, std::size_t columns, bool tiles, bool pairs);
  ActivationRow row(std::size_t row);
  void arrange_tiles();
  void arrange_pairs(unsigned planes);

  const float* input_ = nullptr;
  Isa isa_ = Isa::generic;
  ActivationView view_{};
  Buffer codes_, floats_, tiles_;
};

}  // namespace mpo
