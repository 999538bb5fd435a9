// AVX-512: vectors of sixteen floats.
#include "ops.hpp"

#if MPO_X86_OPS

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

// GCC 12 warns about the undefined operands inside its own header.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Only what follows may use the level: inline functions of the headers above are shared with baseline code.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "attention_body.hpp"

namespace mpo {
namespace {

struct Avx512 {
  using Floats = __m512;
  static constexpr std::size_t kLanes = 16;

  static MPO_INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static MPO_INLINE Floats load_unaligned(const std::uint8_t* from) { return _mm512_loadu_ps(from); }
  static MPO_INLINE __m256i sixteen(const std::uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) { return _mm512_cvtph_ps(sixteen(from)); }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen(from)), 16));
  }
  static MPO_INLINE Floats load_codes(const std::uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static MPO_INLINE void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static MPO_INLINE void store_halves(std::uint8_t* to, Floats value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static MPO_INLINE Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static MPO_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static MPO_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static MPO_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static MPO_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static MPO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  // The instruction gives its second operand where one is NaN, so NaN in x stays.
  static MPO_INLINE Floats smaller(Floats x, Floats bound) { return _mm512_min_ps(bound, x); }
  static MPO_INLINE Floats larger(Floats x, Floats bound) { return _mm512_max_ps(bound, x); }
  static MPO_INLINE Floats round(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static MPO_INLINE Floats scale_by_power(Floats value, Floats n) { return _mm512_scalef_ps(value, n); }
  static MPO_INLINE Floats zero_below(Floats x, Floats bound, Floats value) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), _mm512_setzero_ps());
  }
  static MPO_INLINE float total(Floats a) { return _mm512_reduce_add_ps(a); }
  static MPO_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a); }
};

}  // namespace

extern const Ops kAvx512Ops = make_ops<Avx512>();

}  // namespace mpo

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MPO_X86_OPS
