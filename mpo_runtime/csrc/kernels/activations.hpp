// int8 activations, prepared once for all the matrices that multiply the same x.
#pragma once

#include <cstddef>

#include "kernels/kernels.hpp"
#include "level.hpp"
#include "memory.hpp"

namespace mpo {

// `batch` rows of x [batch, columns] as int8 with one scale per 32 columns, in the orders that the kernels of the level
// active at prepare() need for every plane width. Reusable: prepare() again for the next x. Neither copyable nor movable,
// since the kernels hold pointers into it; share it by reference among threads.
class Activations {
 public:
  Activations() = default;
  Activations(const float* x, std::size_t batch, std::size_t columns) { prepare(x, batch, columns, kAllPlanes); }
  Activations(const Activations&) = delete;
  Activations& operator=(const Activations&) = delete;

  // Arranges x for planes of the widths in `planes` only, a set of bits by plane_index. Throws std::invalid_argument
  // unless columns is a multiple of 16.
  void prepare(const float* x, std::size_t batch, std::size_t columns, unsigned planes);

  std::size_t batch() const { return view_.batch; }
  std::size_t columns() const { return view_.columns; }
  const Level& level() const { return *level_; }
  const ActivationView& view() const { return view_; }

 private:
  void allocate(std::size_t batch, std::size_t columns);
  ActivationRow row(const float* x, std::size_t row) const;
  void arrange_pairs(unsigned planes);

  const Level* level_ = nullptr;
  ActivationView view_{};
  Memory codes_, floats_;
};

}  // namespace mpo
