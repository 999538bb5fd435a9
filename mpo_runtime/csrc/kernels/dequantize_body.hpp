// Integer matrices back to float32, for embeddings, cores and the reference backend. Included after the target is set (see
// target.hpp).
#pragma once

#include "kernels/kernels.hpp"
#include "vectors/spread.hpp"

namespace mpo {
namespace {

struct DequantizeBody {
  // Elements unpacked at a time: long loops for the compiler, codes that stay in the first-level cache.
  static constexpr std::size_t kTile = 2048;

  static MPO_INLINE void convert(const std::uint8_t* MPO_RESTRICT codes, std::size_t group, float scale, float zero,
                                 float* MPO_RESTRICT out) {
    for (std::size_t j = 0; j < group; ++j) out[j] = scale * (static_cast<float>(static_cast<int>(codes[j])) - zero);
  }

  template <int Low, int High>
  static void planes(const QuantizedMatrix& w, std::size_t first, std::size_t count, float* out) {
    alignas(32) std::uint8_t codes[kTile];
    const std::size_t tile_groups = kTile / w.group;
    for (std::size_t done = 0; done < count; done += tile_groups) {
      const std::size_t groups = count - done < tile_groups ? count - done : tile_groups;
      const std::size_t at = (first + done) * (w.group / 8);  // bytes of one bit
      spread<Low, High>(w.low + at * Low, High ? w.high + at * High : nullptr, groups * w.group, codes);
      for (std::size_t i = 0; i < groups; ++i) {
        const std::size_t group = first + done + i;
        const float scale = half_to_float(w.scale[group]);
        const float zero = w.zero ? half_to_float(w.zero[group]) : implicit_zero(Low + High);
        convert(codes + i * w.group, w.group, scale, zero, out + (done + i) * w.group);
      }
    }
  }

  static void dequantize(const QuantizedMatrix& w, std::size_t first, std::size_t count, float* out) {
    with_planes(w.bits, [&](auto of) { planes<of.low, of.high>(w, first, count, out); });
  }
};

}  // namespace
}  // namespace mpo
