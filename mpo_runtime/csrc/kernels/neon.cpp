// AArch64 with dot products (ARMv8.2): 16-byte vectors, int8 products by sdot.
#include "kernels/kernels.hpp"

#if MPO_ARM

#include <arm_neon.h>

MPO_BEGIN_TARGET(MPO_NEON)

#include "kernels/activations_body.hpp"
#include "kernels/integer_body.hpp"
#include "kernels/transposed_body.hpp"
#include "vectors/neon.hpp"

namespace mpo {
namespace {

struct Neon : NeonFloats {
  struct Integers {
    int32x4_t a, b;
  };
  template <int G>
  struct Scales {
    float s[scales_per_chunk(G)];
  };
  static constexpr int kBias8 = 128;  // 8-bit codes are taken as q - 128

  // -- integers

  static MPO_INLINE int32x4_t add_products(int32x4_t sums, uint8x16_t codes, const std::int8_t* x) {
    return vdotq_s32(sums, vreinterpretq_s8_u8(codes), vld1q_s8(x));
  }

  // Zeroes the bytes that belong to the other half of each block of 32 codes, of which a byte holds 8 / P.
  template <int P>
  static MPO_INLINE uint8x16_t keep(uint8x16_t raw, int half) {
    if (half == kWhole) return raw;
    const uint64x2_t first = P == 4   ? vcombine_u64(vdup_n_u64(~0ull), vdup_n_u64(0))
                             : P == 2 ? vdupq_n_u64(0xffffffff)
                                      : vdupq_n_u64(0x0000ffff0000ffff);
    const uint8x16_t mask = vreinterpretq_u8_u64(first);
    return half ? vbicq_u8(raw, mask) : vandq_u8(raw, mask);
  }

  template <int P>
  static MPO_INLINE uint8x16_t part(uint8x16_t raw, int k) {
    return vandq_u8(vshlq_u8(raw, vdupq_n_s8(static_cast<std::int8_t>(-k * P))), vdupq_n_u8((1 << P) - 1));
  }

  static MPO_INLINE Integers fold(const int32x4_t* lanes) {  // of 4 vectors, neighbouring lanes
    return {vpaddq_s32(lanes[0], lanes[1]), vpaddq_s32(lanes[2], lanes[3])};
  }

  static MPO_INLINE Integers four(const std::uint8_t* w, const std::int8_t* x, int half) {
    int32x4_t lanes[8];
    for (int v = 0; v < 8; ++v) {
      const uint8x16_t raw = keep<4>(vld1q_u8(w + 16 * v), half);
      lanes[v] = add_products(vdupq_n_s32(0), vandq_u8(raw, vdupq_n_u8(15)), x + 32 * v);
      lanes[v] = add_products(lanes[v], vshrq_n_u8(raw, 4), x + 32 * v + 16);
    }
    const Integers first = fold(lanes), second = fold(lanes + 4);
    return {vpaddq_s32(first.a, first.b), vpaddq_s32(second.a, second.b)};
  }

  static MPO_INLINE Integers two(const std::uint8_t* w, const std::int8_t* x, int half) {
    int32x4_t lanes[4];
    for (int v = 0; v < 4; ++v) {
      const uint8x16_t raw = keep<2>(vld1q_u8(w + 16 * v), half);
      lanes[v] = vdupq_n_s32(0);
      for (int k = 0; k < 4; ++k) lanes[v] = add_products(lanes[v], part<2>(raw, k), x + 64 * v + 16 * k);
    }
    return fold(lanes);
  }

  // 2 + 1 bits: the high bits are looked up into the places above the low ones (see avx2.cpp).
  static MPO_INLINE Integers three(const std::uint8_t* low, const std::uint8_t* high, const std::int8_t* x, int half) {
    constexpr std::uint8_t kEven[16] = {0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68};
    constexpr std::uint8_t kOdd[16] = {0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68};
    constexpr std::int8_t kShifts[16] = {0, -4, 0, -4, 0, -4, 0, -4, 0, -4, 0, -4, 0, -4, 0, -4};
    const uint8x16_t even_bits = vld1q_u8(kEven), odd_bits = vld1q_u8(kOdd), fields = vdupq_n_u8(0x33);
    const uint8x16_t mask = vdupq_n_u8(7);
    int32x4_t lanes[4];
    for (int v = 0; v < 4; ++v) {
      const uint8x16_t raw = keep<2>(vld1q_u8(low + 16 * v), half);
      const uint8x8_t above = vld1_u8(high + 8 * v);
      const uint8x16_t twice = vcombine_u8(vzip1_u8(above, above), vzip2_u8(above, above));
      const uint8x16_t bits = keep<2>(vandq_u8(vshlq_u8(twice, vld1q_s8(kShifts)), vdupq_n_u8(15)), half);
      const uint8x16_t even = vorrq_u8(vandq_u8(raw, fields), vqtbl1q_u8(even_bits, bits));
      const uint8x16_t odd = vorrq_u8(vandq_u8(vshrq_n_u8(raw, 2), fields), vqtbl1q_u8(odd_bits, bits));
      const std::int8_t* from = x + 64 * v;
      lanes[v] = add_products(vdupq_n_s32(0), vandq_u8(even, mask), from);
      lanes[v] = add_products(lanes[v], vandq_u8(odd, mask), from + 16);
      lanes[v] = add_products(lanes[v], vandq_u8(vshrq_n_u8(even, 4), mask), from + 32);
      lanes[v] = add_products(lanes[v], vandq_u8(vshrq_n_u8(odd, 4), mask), from + 48);
    }
    return fold(lanes);
  }

  static MPO_INLINE Integers one(const std::uint8_t* w, const std::int8_t* x, int half) {
    int32x4_t lanes[2];
    for (int v = 0; v < 2; ++v) {
      const uint8x16_t raw = keep<1>(vld1q_u8(w + 16 * v), half);
      lanes[v] = vdupq_n_s32(0);
      for (int k = 0; k < 8; ++k) lanes[v] = add_products(lanes[v], part<1>(raw, k), x + 128 * v + 16 * k);
    }
    return {lanes[0], lanes[1]};
  }

  static MPO_INLINE Integers eight(const std::uint8_t* w, const std::int8_t* x, int half) {
    int32x4_t lanes[8];
    for (int v = 0; v < 8; ++v) {
      lanes[v] = vdupq_n_s32(0);
      for (int h = 0; h < 2; ++h)
        if (half == kWhole || half == h)
          lanes[v] = add_products(lanes[v], veorq_u8(vld1q_u8(w + 32 * v + 16 * h), vdupq_n_u8(128)), x + 32 * v + 16 * h);
    }
    const Integers first = fold(lanes), second = fold(lanes + 4);
    return {vpaddq_s32(first.a, first.b), vpaddq_s32(second.a, second.b)};
  }

  template <int Low, int High, int T>
  static MPO_INLINE void dots(const std::uint8_t* low, const std::uint8_t* high, const std::int8_t* low_codes,
                              const std::int8_t* high_codes, std::size_t step, int half, Integers* out) {
    for (std::size_t t = 0; t < T; ++t) {
      const std::int8_t* x = low_codes + t * step;
      if constexpr (Low == 8) out[t] = eight(low, x, half);
      else if constexpr (Low == 4) out[t] = four(low, x, half);
      else if constexpr (High == 1) out[t] = three(low, high, x, half);
      else out[t] = two(low, x, half);
      if constexpr (Low == 4 && High > 0) {
        const Integers above = High == 2 ? two(high, high_codes + t * step, half) : one(high, high_codes + t * step, half);
        out[t] = {vaddq_s32(out[t].a, vshlq_n_s32(above.a, 4)), vaddq_s32(out[t].b, vshlq_n_s32(above.b, 4))};
      }
    }
  }

  // -- scales

  template <int G>
  static MPO_INLINE Scales<G> load_scales(const std::uint16_t* from) {
    constexpr std::size_t kPlaces = scales_per_chunk(G);
    std::uint16_t stored[kChunk / G], halves[kPlaces];
    std::memcpy(stored, from, sizeof stored);
    for (std::size_t i = 0; i < kPlaces; ++i) halves[i] = stored[i * (kChunk / kPlaces) / G];
    Scales<G> out;
    for (std::size_t i = 0; i < kPlaces; i += 4)
      vst1q_f32(out.s + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    return out;
  }

  template <int G>
  static MPO_INLINE Scales<G> times_zero(Scales<G> scales, const std::uint16_t* zero, float bias) {
    const Scales<G> zeros = load_scales<G>(zero);
    for (std::size_t i = 0; i < scales_per_chunk(G); ++i) scales.s[i] *= zeros.s[i] - bias;
    return scales;
  }

  template <int G>
  static MPO_INLINE Floats add_offsets(const Scales<G>& scales, const float* sums, Floats total) {
    for (std::size_t i = 0; i < scales_per_chunk(G); i += 8) total = fma(load(scales.s + i), load(sums + i), total);
    return total;
  }

  template <int G>
  static MPO_INLINE Floats block_scales(const Scales<G>& scales, int half) {
    float out[8];
    for (int i = 0; i < 8; ++i) out[i] = scales.s[G == 16 ? 2 * i + half : i];
    return load(out);
  }

  static MPO_INLINE Floats to_float(const Integers& in) { return {vcvtq_f32_s32(in.a), vcvtq_f32_s32(in.b)}; }
};

}  // namespace

extern const IntegerKernels kNeonIntegers = {
    {{16, 16, 16, 16}, false, false},
    ActivationsBody<PlainRows>::arrange,
    IntegerBody<Neon>::multiply,
};

extern const FloatKernels kNeonFloats = make_float_kernels<NeonFloats>();

}  // namespace mpo

MPO_END_TARGET

#endif  // MPO_ARM
