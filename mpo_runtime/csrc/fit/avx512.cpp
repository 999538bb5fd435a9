// Rounding to integers with AVX-512.
#include "fit/fit.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX512)

#include "fit/round_body.hpp"
#include "vectors/avx512.hpp"

namespace mpo {

extern const Fits kAvx512Fits = make_fits<Avx512Floats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
