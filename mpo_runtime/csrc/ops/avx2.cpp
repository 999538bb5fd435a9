// The operations with AVX2, FMA and F16C.
#include "ops/ops.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX2)

#include "ops/attention_body.hpp"
#include "vectors/avx2.hpp"

namespace mpo {

extern const Ops kAvx2Ops = make_ops<Avx2Floats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
