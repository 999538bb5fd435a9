// Rounding to integers with NEON.
#include "fit/fit.hpp"

#if MPO_ARM

#include <arm_neon.h>

MPO_BEGIN_TARGET(MPO_NEON)

#include "fit/round_body.hpp"
#include "vectors/neon.hpp"

namespace mpo {

extern const Fits kNeonFits = make_fits<NeonFloats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_ARM
