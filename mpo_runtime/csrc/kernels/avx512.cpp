// AVX-512 (F, BW, DQ, VL, VNNI).
#include "kernels/kernels.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX512)

#include "kernels/avx512_integers.hpp"
#include "kernels/avx512_pairs.hpp"
#include "kernels/integer_body.hpp"
#include "kernels/transposed_body.hpp"

namespace mpo {
namespace {

void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
  if (PairedChunks<false>::takes(w)) return PairedChunks<false>::multiply(w, x, task);
  // Groups of 16.
  with_planes(w.bits, [&](auto planes) { IntegerBody<Avx512>::rows<planes.low, planes.high, 16>(w, x, task); });
}

}  // namespace

extern const IntegerKernels kAvx512Integers = {kAvx512Layout, arrange_avx2, multiply};
extern const FloatKernels kAvx512Floats = make_float_kernels<Avx2Floats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
