// AVX2 + FMA + F16C: 32-byte vectors, int8 products by maddubs.
#include "kernels/kernels.hpp"

#if MPO_X86

#include "vectors/intrinsics.hpp"

MPO_BEGIN_TARGET(MPO_AVX2)

#include "kernels/avx2_activations.hpp"
#include "kernels/avx2_scales.hpp"
#include "kernels/dequantize_body.hpp"
#include "kernels/integer_body.hpp"
#include "kernels/transposed_body.hpp"

namespace mpo {
namespace {

// 16-bit sums never overflow: the largest intermediate value, of 16 codes of 4 bits, is 16 * 15 * 127 < 2^15.
struct Avx2 : Avx2Scales {
  static constexpr int kBias8 = 128;  // 8-bit codes are taken as q - 128

  static MPO_INLINE __m256i load_bytes(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }

  // Zeroes the bytes that belong to the other half of each block of 32 codes, of which a byte holds 8 / P.
  template <int P>
  static MPO_INLINE __m256i keep(__m256i raw, int half) {
    if (half == kWhole) return raw;
    const __m256i first = P == 8   ? _mm256_setr_epi64x(-1, -1, 0, 0)
                          : P == 4 ? _mm256_setr_epi64x(-1, 0, -1, 0)
                          : P == 2 ? _mm256_set1_epi64x(0xffffffff)
                                   : _mm256_set1_epi32(0xffff);
    return half ? _mm256_andnot_si256(first, raw) : _mm256_and_si256(first, raw);
  }

  static MPO_INLINE __m256i products(__m256i codes, const std::int8_t* x) {
    return _mm256_maddubs_epi16(codes, load_bytes(x));
  }
  static MPO_INLINE __m256i add_pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
  // Of the 32-bit lanes of a and b, all of which fit 16 bits, the sums of neighbours.
  static MPO_INLINE __m256i fold(__m256i a, __m256i b) { return add_pairs(_mm256_packs_epi32(a, b)); }

  // Each returns sums of T products in 32-bit lanes; the lane order is what the folding leaves.
  template <int T>
  static MPO_INLINE void four(const std::uint8_t* w, const std::int8_t* x, std::size_t step, int half, __m256i* out) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i lanes[4][T];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i raw = keep<4>(load_bytes(w + 32 * v), half);
      const __m256i even = _mm256_and_si256(raw, mask), odd = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const std::int8_t* from = x + static_cast<std::size_t>(t) * step + 64 * v;
        lanes[v][t] = add_pairs(_mm256_add_epi16(products(even, from), products(odd, from + 32)));
        if (v % 2) lanes[v - 1][t] = fold(lanes[v - 1][t], lanes[v][t]);
      }
    }
    for (int t = 0; t < T; ++t)
      out[t] = _mm256_permutevar8x32_epi32(fold(lanes[0][t], lanes[2][t]), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  static MPO_INLINE __m256i order_two(__m256i folded) {
    return _mm256_permute4x64_epi64(folded, 0xd8);
  }

  template <int T>
  static MPO_INLINE void two(const std::uint8_t* w, const std::int8_t* x, std::size_t step, int half, __m256i* out) {
    const __m256i first = _mm256_set1_epi8(3), second = _mm256_set1_epi8(12);
    __m256i lanes[2][T];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i raw = keep<2>(load_bytes(w + 32 * v), half), upper = _mm256_srli_epi16(raw, 4);
      const __m256i code0 = _mm256_and_si256(raw, first), code1 = _mm256_and_si256(raw, second);  // code1 times 4
      const __m256i code2 = _mm256_and_si256(upper, first), code3 = _mm256_and_si256(upper, second);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const std::int8_t* from = x + static_cast<std::size_t>(t) * step + 128 * v;
        const __m256i once = _mm256_add_epi16(products(code0, from), products(code2, from + 64));
        const __m256i fourfold = _mm256_add_epi16(products(code1, from + 32), products(code3, from + 96));
        lanes[v][t] = add_pairs(_mm256_add_epi16(once, _mm256_srai_epi16(fourfold, 2)));
      }
    }
    for (int t = 0; t < T; ++t) out[t] = order_two(fold(lanes[0][t], lanes[1][t]));
  }

  // 2 + 1 bits: the high bits are looked up into the places above the low ones, which saves a second round of products.
  template <int T>
  static MPO_INLINE void three(const std::uint8_t* low, const std::uint8_t* high, const std::int8_t* x,
                               std::size_t step, int half, __m256i* out) {
    const __m256i mask = _mm256_set1_epi8(7), fields = _mm256_set1_epi8(0x33), nibble = _mm256_set1_epi8(15);
    // By the high bits of 4 neighbours: bits 0 and 2 to the places 2 and 6, and bits 1 and 3 to these.
    const __m256i even_bits = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const __m256i odd_bits = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
    __m256i lanes[2][T];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i raw = keep<2>(load_bytes(low + 32 * v), half);
      // One nibble of high bits for each byte of low ones.
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high + 16 * v)));
      const __m256i bits = keep<2>(_mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), nibble), half);
      const __m256i even = _mm256_or_si256(_mm256_and_si256(raw, fields), _mm256_shuffle_epi8(even_bits, bits));
      const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(raw, 2), fields),
                                          _mm256_shuffle_epi8(odd_bits, bits));
      const __m256i code0 = _mm256_and_si256(even, mask), code2 = _mm256_and_si256(_mm256_srli_epi16(even, 4), mask);
      const __m256i code1 = _mm256_and_si256(odd, mask), code3 = _mm256_and_si256(_mm256_srli_epi16(odd, 4), mask);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const std::int8_t* from = x + static_cast<std::size_t>(t) * step + 128 * v;
        const __m256i sums = _mm256_add_epi16(_mm256_add_epi16(products(code0, from), products(code1, from + 32)),
                                              _mm256_add_epi16(products(code2, from + 64), products(code3, from + 96)));
        lanes[v][t] = add_pairs(sums);
      }
    }
    for (int t = 0; t < T; ++t) out[t] = order_two(fold(lanes[0][t], lanes[1][t]));
  }

  template <int T>
  static MPO_INLINE void one(const std::uint8_t* w, const std::int8_t* x, std::size_t step, int half, __m256i* out) {
    const __m256i raw = keep<1>(load_bytes(w), half);
    for (int t = 0; t < T; ++t) out[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi16(raw, k), _mm256_set1_epi8(1));
      for (int t = 0; t < T; ++t)
        out[t] = _mm256_add_epi16(out[t], products(code, x + static_cast<std::size_t>(t) * step + 32 * k));
    }
    for (int t = 0; t < T; ++t) out[t] = add_pairs(out[t]);
  }

  // |q - 128| times x with the sign of q - 128: maddubs takes one unsigned operand, and 2 * 128 * 127 < 2^15.
  static MPO_INLINE __m256i eight(const std::uint8_t* w, const std::int8_t* x, int half) {
    __m256i lanes[8];
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const __m256i code = keep<8>(_mm256_xor_si256(load_bytes(w + 32 * v), _mm256_set1_epi8(-128)), half);
      const __m256i signed_x = _mm256_sign_epi8(load_bytes(x + 32 * v), code);
      lanes[v] = add_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(code), signed_x));
      if (v % 2) lanes[v - 1] = _mm256_hadd_epi32(lanes[v - 1], lanes[v]);
      if (v % 4 == 3) lanes[v - 3] = _mm256_hadd_epi32(lanes[v - 3], lanes[v - 1]);
    }
    return _mm256_add_epi32(_mm256_permute2x128_si256(lanes[0], lanes[4], 0x20),
                            _mm256_permute2x128_si256(lanes[0], lanes[4], 0x31));
  }

  static constexpr bool takes_together(int low, int high) { return (low == 4 && high == 0) || low == 2; }
  // Near what is needed: the same chunk of the next rows.
  static MPO_INLINE void prefetch_line(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }

  // The products of R rows of w with one row of x; each vector of all rows comes before the next one, so that no row
  // waits for its own results. The lanes stay in the order that the folding leaves: blocks 0 2 4 6 1 3 5 7 for 4 bits
  // and 0 1 4 5 2 3 6 7 for 2 and 3 bits; ordered() and ordered_scales() bring the floats into it.
  template <std::size_t R>
  static MPO_INLINE void four_rows(const std::uint8_t* w, std::size_t step, const std::int8_t* x, __m256i* out) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i lanes[4][R];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i x0 = load_bytes(x + 64 * v), x1 = load_bytes(x + 64 * v + 32);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < R; ++r) {
        const __m256i raw = load_bytes(w + r * step + 32 * v);
        const __m256i even = _mm256_and_si256(raw, mask), odd = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
        lanes[v][r] = add_pairs(_mm256_add_epi16(_mm256_maddubs_epi16(even, x0), _mm256_maddubs_epi16(odd, x1)));
        if (v % 2) lanes[v - 1][r] = fold(lanes[v - 1][r], lanes[v][r]);
      }
    }
    for (std::size_t r = 0; r < R; ++r) out[r] = fold(lanes[0][r], lanes[2][r]);
  }

  template <std::size_t R>
  static MPO_INLINE void two_rows(const std::uint8_t* w, std::size_t step, const std::int8_t* x, __m256i* out) {
    const __m256i first = _mm256_set1_epi8(3), second = _mm256_set1_epi8(12);
    __m256i lanes[2][R];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const std::int8_t* from = x + 128 * v;
#pragma GCC unroll 4
      for (std::size_t r = 0; r < R; ++r) {
        const __m256i raw = load_bytes(w + r * step + 32 * v), upper = _mm256_srli_epi16(raw, 4);
        const __m256i once = _mm256_add_epi16(products(_mm256_and_si256(raw, first), from),
                                              products(_mm256_and_si256(upper, first), from + 64));
        const __m256i fourfold = _mm256_add_epi16(products(_mm256_and_si256(raw, second), from + 32),
                                                  products(_mm256_and_si256(upper, second), from + 96));
        lanes[v][r] = add_pairs(_mm256_add_epi16(once, _mm256_srai_epi16(fourfold, 2)));
      }
    }
    for (std::size_t r = 0; r < R; ++r) out[r] = fold(lanes[0][r], lanes[1][r]);
  }

  template <std::size_t R>
  static MPO_INLINE void three_rows(const std::uint8_t* low, std::size_t low_step, const std::uint8_t* high,
                                    std::size_t high_step, const std::int8_t* x, __m256i* out) {
    const __m256i mask = _mm256_set1_epi8(7), fields = _mm256_set1_epi8(0x33), nibble = _mm256_set1_epi8(15);
    const __m256i even_bits = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const __m256i odd_bits = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      // A nibble of high bits for each byte of low ones: those of the first vector from the lower halves of the lanes.
      const __m256i plane = _mm256_permute4x64_epi64(load_bytes(high + r * high_step), 0xd8);
      const __m256i lower = _mm256_and_si256(plane, nibble);
      const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(plane, 4), nibble);
      __m256i lanes[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i bits = v ? _mm256_unpackhi_epi8(lower, upper) : _mm256_unpacklo_epi8(lower, upper);
        const __m256i raw = load_bytes(low + r * low_step + 32 * v);
        const __m256i even = _mm256_or_si256(_mm256_and_si256(raw, fields), _mm256_shuffle_epi8(even_bits, bits));
        const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(raw, 2), fields),
                                            _mm256_shuffle_epi8(odd_bits, bits));
        const __m256i code2 = _mm256_and_si256(_mm256_srli_epi16(even, 4), mask);
        const __m256i code3 = _mm256_and_si256(_mm256_srli_epi16(odd, 4), mask);
        const std::int8_t* from = x + 128 * v;
        const __m256i once = _mm256_add_epi16(products(_mm256_and_si256(even, mask), from),
                                              products(_mm256_and_si256(odd, mask), from + 32));
        const __m256i above = _mm256_add_epi16(products(code2, from + 64), products(code3, from + 96));
        lanes[v] = add_pairs(_mm256_add_epi16(once, above));
      }
      out[r] = fold(lanes[0], lanes[1]);
    }
  }

  template <int Low, int High, std::size_t R>
  static MPO_INLINE void rows_dots(const std::uint8_t* low, std::size_t low_step, const std::uint8_t* high,
                                   std::size_t high_step, const std::int8_t* x, __m256i* out) {
    if constexpr (Low == 4) four_rows<R>(low, low_step, x, out);
    else if constexpr (High == 1) three_rows<R>(low, low_step, high, high_step, x, out);
    else two_rows<R>(low, low_step, x, out);
  }

  template <int Low>
  static MPO_INLINE __m256 ordered(__m256 blocks) {
    return _mm256_permutevar8x32_ps(blocks, Low == 4 ? _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)
                                                     : _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  }

  template <int Low, int G>
  static MPO_INLINE __m256 ordered_scales(const std::uint16_t* from) {
    constexpr int k = G == 32 ? 1 : G == 64 ? 2 : G == 128 ? 4 : 8;  // blocks of a scale
    constexpr int m = Low == 4 ? 1 : 0;                              // else pairs of blocks stay together
    constexpr int places[8] = {0, m ? 2 : 1, 4, m ? 6 : 5, m ? 1 : 2, 3, m ? 5 : 6, 7};
    const auto byte = [&](int i) { return static_cast<char>(places[i / 2] / k * 2 + i % 2); };
    const __m128i order = _mm_setr_epi8(byte(0), byte(1), byte(2), byte(3), byte(4), byte(5), byte(6), byte(7), byte(8),
                                        byte(9), byte(10), byte(11), byte(12), byte(13), byte(14), byte(15));
    __m128i raw = _mm_setzero_si128();
    if constexpr (G == 32) raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    else if constexpr (G == 64) raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    else {
      std::uint32_t two = 0;
      std::memcpy(&two, from, 2 * kChunk / G);
      raw = _mm_cvtsi32_si128(static_cast<int>(two));
    }
    return _mm256_cvtph_ps(_mm_shuffle_epi8(raw, order));
  }

  template <int Low, int High, int T>
  static MPO_INLINE void dots(const std::uint8_t* low, const std::uint8_t* high, const std::int8_t* low_codes,
                              const std::int8_t* high_codes, std::size_t step, int half, __m256i* out) {
    if constexpr (Low == 8)
      for (int t = 0; t < T; ++t) out[t] = eight(low, low_codes + static_cast<std::size_t>(t) * step, half);
    else if constexpr (Low == 4) four<T>(low, low_codes, step, half, out);
    else if constexpr (High == 1) three<T>(low, high, low_codes, step, half, out);
    else two<T>(low, low_codes, step, half, out);
    if constexpr (Low == 4 && High > 0) {
      __m256i above[T];
      if constexpr (High == 2) two<T>(high, high_codes, step, half, above);
      else one<T>(high, high_codes, step, half, above);
      for (int t = 0; t < T; ++t) out[t] = _mm256_add_epi32(out[t], _mm256_slli_epi32(above[t], 4));
    }
  }
};

}  // namespace

extern const IntegerKernels kAvx2Integers = {
    {{32, 32, 32, 32}, false, false},
    arrange_avx2,
    IntegerBody<Avx2, 4>::multiply,
};

extern const FloatKernels kAvx2Floats = make_float_kernels<Avx2Floats>();

void arrange_avx2(const ActivationRow& row, const Layout& layout, unsigned planes, std::size_t chunks) {
  ActivationsBody<Avx2Rows>::arrange(row, layout, planes, chunks);
}

void dequantize_avx2(const QuantizedMatrix& w, std::size_t first, std::size_t count, float* out) {
  DequantizeBody::dequantize(w, first, count, out);
}

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_X86
