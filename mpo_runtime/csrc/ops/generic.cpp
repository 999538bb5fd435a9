// The operations that every CPU runs.
#include "ops/ops.hpp"
#include "vectors/generic.hpp"

#include "ops/attention_body.hpp"

namespace mpo {

extern const Ops kGenericOps = make_ops<GenericFloats>();

}  // namespace mpo
