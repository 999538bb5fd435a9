// AVX-512 with VBMI, which moves bits between bytes: wider steps from planes of high bits to codes. All else is AVX-512's.
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
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
#endif
#endif

#include "avx512_pairs.hpp"

namespace mpo {

void multiply_vbmi(const QuantizedMatrix& w, const ActivationView& x, std::size_t first, std::size_t count,
                   std::size_t begin, std::size_t end, float* y, std::size_t stride, bool accumulate) {
  if (PairedChunks<true>::takes(w, x)) PairedChunks<true>::multiply(w, x, begin, end, y, accumulate);
  else kAvx512Kernels.multiply(w, x, first, count, begin, end, y, stride, accumulate);
}

}  // namespace mpo

#if !defined(MPO_EMULATED_INTRINSICS) && defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MPO_X86_KERNELS
