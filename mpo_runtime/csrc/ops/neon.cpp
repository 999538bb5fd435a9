// The operations with NEON.
#include "ops/ops.hpp"

#if MPO_ARM

#include <arm_neon.h>

MPO_BEGIN_TARGET(MPO_NEON)

#include "ops/attention_body.hpp"
#include "vectors/neon.hpp"

namespace mpo {

extern const Ops kNeonOps = make_ops<NeonFloats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_ARM
