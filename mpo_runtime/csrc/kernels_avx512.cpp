// AVX-512 (F, BW, DQ, VL, VNNI): 64-byte vectors, int8 products by dpbusd.
#include "kernels.hpp"

#if MPO_X86_KERNELS

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "intrinsics.hpp"

// Only what follows may use the level: inline functions of the headers above are shared with baseline code.
#if !defined(MPO_EMULATED_INTRINSICS)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#endif

#include "avx2_activations.hpp"
#include "avx512_pairs.hpp"
#include "float_body.hpp"
#include "integer_body.hpp"
#include "transposed_body.hpp"

namespace mpo {
namespace {

void multiply(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
              std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
  if (PairedChunks<false>::takes(w, x)) PairedChunks<false>::multiply(w, x, begin, end, y, accumulate);
  else IntegerBody<Avx512>::multiply(w, x, first, count, begin, end, y, stride, accumulate);
}

}  // namespace

const Kernels kAvx512Kernels = {
    {{64, 64, 64, 32}, true, false, true},
    ActivationsBody<Avx2Rows>::arrange,
    multiply,
    FloatBody<Avx512>::multiply_exact,
    FloatBody<Avx512>::multiply_dense,
    TransposedBody<Avx512>::add,
    TransposedBody<Avx512>::add_dense,
};

}  // namespace mpo

#if !defined(MPO_EMULATED_INTRINSICS) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MPO_X86_KERNELS
