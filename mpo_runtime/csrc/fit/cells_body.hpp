// Matrices of integers in training, written once over the vectors X of an instruction set. Included after the target is set
// (see target.hpp). exporter/mpo_exporter/heal/rounding.py has the same in torch, which the tests compare with.
#pragma once

#include "fit/fit.hpp"
#include "vectors/elements.hpp"

namespace mpo {
namespace {

template <class X>
struct CellsBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;

  // The nearest integers; what is not a number stays so.
  static MPO_INLINE F codes(F latent, F top) { return X::round(X::larger(X::smaller(latent, top), X::zero())); }

  static void write(const Cells& cells, std::size_t first, std::size_t last, Type type, void* matrix) {
    const F top = X::broadcast(cells.top);
    float rounded[kLargestCell];
    for (std::size_t n = first; n < last; ++n) {
      const std::size_t start = n * cells.group;
      float* const to = type == Type::f32 ? static_cast<float*>(matrix) + start : rounded;
      const F scale = X::broadcast(cells.scale[n]), zero = X::broadcast(cells.zero[n]);
      for (std::size_t j = 0; j < cells.group; j += kLanes)
        X::store(to + j, X::multiply(X::subtract(codes(X::load(cells.latent + start + j), top), zero), scale));
      if (type == Type::bf16)
        for (std::size_t j = 0; j < cells.group; ++j) static_cast<std::uint16_t*>(matrix)[start + j] = float_to_bf16(to[j]);
    }
  }

  template <Type Element>
  static MPO_INLINE void gradients(const Cells& cells, std::size_t first, std::size_t last, const std::uint8_t* gradient,
                                   const CellGradients& out) {
    const F top = X::broadcast(cells.top), above = X::broadcast(cells.top + 0.5f), below = X::broadcast(-0.5f);
    for (std::size_t n = first; n < last; ++n) {
      const F scale = X::broadcast(cells.scale[n]);
      F total = X::zero(), by_code = X::zero();
      for (std::size_t j = n * cells.group; j < (n + 1) * cells.group; j += kLanes) {
        const F latent = X::load(cells.latent + j), felt = load_as<X, Element>(gradient + j * element_size(Element));
        total = X::add(total, felt);
        by_code = X::fma(codes(latent, top), felt, by_code);
        const F passed = X::select_below(latent, above, X::multiply(felt, scale), X::zero());
        X::store(out.latent + j, X::select_below(below, latent, passed, X::zero()));
      }
      const float sum = X::total(total);
      out.scale[n] = X::total(by_code) - cells.zero[n] * sum;
      out.zero[n] = -cells.scale[n] * sum;
    }
  }

  static void write_gradients(const Cells& cells, std::size_t first, std::size_t last, Type type, const void* gradient,
                              const CellGradients& out) {
    const auto* const bytes = static_cast<const std::uint8_t*>(gradient);
    if (type == Type::f32) gradients<Type::f32>(cells, first, last, bytes, out);
    else gradients<Type::bf16>(cells, first, last, bytes, out);
  }
};

}  // namespace
}  // namespace mpo
