// Rounding to integers on every CPU.
#include "fit/fit.hpp"
#include "vectors/generic.hpp"

#include "fit/round_body.hpp"

namespace mpo {

extern const Fits kGenericFits = make_fits<GenericFloats>();

}  // namespace mpo
