// Rounding to integers with AVX2.
#include "fit/fit.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX2)

#include "fit/round_body.hpp"
#include "vectors/avx2.hpp"

namespace mpo {

extern const Fits kAvx2Fits = make_fits<Avx2Floats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
