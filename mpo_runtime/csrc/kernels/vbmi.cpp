// AVX-512 with VBMI, which moves bits between bytes: fewer steps from planes of high bits to codes. The rest is AVX-512's.
#include "kernels/kernels.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_VBMI)

#include "kernels/avx512_pairs.hpp"

namespace mpo {
namespace {

void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
  if (PairedChunks<true>::takes(w)) PairedChunks<true>::multiply(w, x, task);
  else kAvx512Integers.multiply(w, x, task);
}

}  // namespace

extern const IntegerKernels kVbmiIntegers = {kAvx512Layout, arrange_avx2, multiply};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
