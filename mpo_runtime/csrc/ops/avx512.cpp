// The operations with AVX-512.
#include "ops/ops.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX512)

#include "ops/attention_body.hpp"
#include "vectors/avx512.hpp"

namespace mpo {

extern const Ops kAvx512Ops = make_ops<Avx512Floats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
