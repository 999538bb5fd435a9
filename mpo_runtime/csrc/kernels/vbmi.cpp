// AVX-512 with VBMI, which moves bits between bytes: fewer steps from planes of high bits to codes. The rest is AVX-512's.
#include "kernels/kernels.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_VBMI)

#include "kernels/avx512_pairs.hpp"

namespace mpo {
namespace {

template <bool Ahead>
void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
  if (PairedChunks<true, Ahead>::takes(w)) PairedChunks<true, Ahead>::multiply(w, x, task);
  else kAvx512Integers.multiply(w, x, task);
}

}  // namespace

extern const IntegerKernels kVbmiIntegers = {kAvx512Layout, arrange_avx2, multiply<false>};
extern const IntegerKernels kAmxIntegers = {kAvx512Layout, arrange_avx2, multiply<true>};

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
