// The products that every CPU runs: plain loops that compilers turn into vectors of their baseline.
#include "kernels/kernels.hpp"

#include "kernels/activations_body.hpp"
#include "kernels/dequantize_body.hpp"
#include "kernels/float_body.hpp"
#include "kernels/transposed_body.hpp"
#include "vectors/generic.hpp"

namespace mpo {
namespace {

constexpr std::size_t kTile = 4;  // rows of x for which a row of w is unpacked once

// One row of w with `count` (at most kTile) rows of x, whose codes are in the order of the columns.
template <int Low, int High>
void multiply_row(const QuantizedMatrix& w, const ActivationView& x, const Task& task, std::size_t first,
                  std::size_t count, std::size_t r) {
  constexpr std::size_t kHalf = 16;  // the smallest group
  constexpr int kMiddle = 1 << (Low + High - 1);
  float sums[kTile] = {};
  std::uint8_t codes[kChunk];
  for (std::size_t c = 0; c < w.columns; c += kChunk) {
    const std::size_t at = r * w.columns + c, columns = w.columns - c < kChunk ? w.columns - c : kChunk;
    spread<Low, High>(w.low + at / 8 * Low, High ? w.high + at / 8 * High : nullptr, columns, codes);
    for (std::size_t i = 0; i < columns; i += kHalf) {
      const std::size_t group = (at + i) / w.group;
      const float scale = GenericFloats::half(w.scale + group);
      const float zero = (w.zero ? GenericFloats::half(w.zero + group) : implicit_zero(Low + High)) - kMiddle;
      for (std::size_t t = 0; t < count; ++t) {
        const std::int8_t* from = x.codes[0] + (first + t) * x.padded + c + i;
        std::int32_t dot = 0, sum = 0;
        for (std::size_t j = 0; j < kHalf; ++j) {
          dot += static_cast<std::int16_t>(codes[i + j] - kMiddle) * static_cast<std::int16_t>(from[j]);
          sum += from[j];
        }
        const float factor = scale * x.scales[(first + t) * x.padded / kScaleBlock + (c + i) / kScaleBlock];
        sums[t] += factor * (static_cast<float>(dot) - zero * static_cast<float>(sum));
      }
    }
  }
  for (std::size_t t = 0; t < count; ++t) task.put(first + t, r, sums[t]);
}

void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
  with_planes(w.bits, [&](auto planes) {
    const std::size_t stop = task.first + task.count;
    for (std::size_t r = task.begin; r < task.end; ++r)
      for (std::size_t t = task.first; t < stop; t += kTile)
        multiply_row<planes.low, planes.high>(w, x, task, t, stop - t < kTile ? stop - t : kTile, r);
  });
}

}  // namespace

extern const IntegerKernels kGenericIntegers = {
    {{16, 16, 16, 16}, false, false},
    ActivationsBody<PlainRows>::arrange,
    multiply,
};

extern const FloatKernels kGenericFloats = make_float_kernels<GenericFloats>();

void dequantize_generic(const QuantizedMatrix& w, std::size_t first, std::size_t count, float* out) {
  DequantizeBody::dequantize(w, first, count, out);
}

}  // namespace mpo
