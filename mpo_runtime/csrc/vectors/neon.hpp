// Vectors of eight floats with NEON, as pairs of registers. Included after the target is set (see target.hpp); what each
// operation means is said in generic.hpp.
#pragma once

#include "vectors/spread.hpp"

namespace mpo {
namespace {

struct NeonFloats {
  struct Floats {
    float32x4_t a, b;
  };
  static constexpr std::size_t kLanes = 8;

  static MPO_INLINE void prefetch(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 1024); }

  static MPO_INLINE Floats zero() { return broadcast(0.0f); }
  static MPO_INLINE Floats broadcast(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }

  static MPO_INLINE Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static MPO_INLINE Floats load_unaligned(const void* from) {
    const auto* bytes = static_cast<const std::uint8_t*>(from);
    return {vreinterpretq_f32_u8(vld1q_u8(bytes)), vreinterpretq_f32_u8(vld1q_u8(bytes + 16))};
  }
  static MPO_INLINE Floats load_halves(const std::uint8_t* from) {
    const float16x8_t in = vreinterpretq_f16_u8(vld1q_u8(from));
    return {vcvt_f32_f16(vget_low_f16(in)), vcvt_f32_f16(vget_high_f16(in))};
  }
  static MPO_INLINE Floats load_bf16(const std::uint8_t* from) {
    const uint16x8_t in = vreinterpretq_u16_u8(vld1q_u8(from));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(in), 16)),
            vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(in), 16))};
  }
  static MPO_INLINE Floats load_uint8(const std::uint8_t* from) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(from));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)))};
  }
  static MPO_INLINE Floats load_int8(const std::uint8_t* from) {
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(from)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
  }
  static MPO_INLINE void store(float* to, Floats value) {
    vst1q_f32(to, value.a);
    vst1q_f32(to + 4, value.b);
  }
  static MPO_INLINE void store_halves(std::uint8_t* to, Floats value) {
    const float16x8_t halves = vcombine_f16(vcvt_f16_f32(value.a), vcvt_f16_f32(value.b));
    vst1q_u8(to, vreinterpretq_u8_f16(halves));
  }
  static MPO_INLINE float half(const void* from) {
    std::uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
  }
  template <int Low, int High>
  static MPO_INLINE void spread(const std::uint8_t* low, const std::uint8_t* high, std::size_t count,
                                std::uint8_t* codes) {
    mpo::spread<Low, High>(low, high, count, codes);
  }

  static MPO_INLINE Floats add(Floats a, Floats b) { return {vaddq_f32(a.a, b.a), vaddq_f32(a.b, b.b)}; }
  static MPO_INLINE Floats subtract(Floats a, Floats b) { return {vsubq_f32(a.a, b.a), vsubq_f32(a.b, b.b)}; }
  static MPO_INLINE Floats multiply(Floats a, Floats b) { return {vmulq_f32(a.a, b.a), vmulq_f32(a.b, b.b)}; }
  static MPO_INLINE Floats divide(Floats a, Floats b) { return {vdivq_f32(a.a, b.a), vdivq_f32(a.b, b.b)}; }
  static MPO_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return {vfmaq_f32(c.a, a.a, b.a), vfmaq_f32(c.b, a.b, b.b)};
  }
  // Not vminq and vmaxq, which give NaN where either operand is not a number.
  static MPO_INLINE Floats smaller(Floats x, Floats bound) {
    return {vbslq_f32(vcltq_f32(bound.a, x.a), bound.a, x.a), vbslq_f32(vcltq_f32(bound.b, x.b), bound.b, x.b)};
  }
  static MPO_INLINE Floats larger(Floats x, Floats bound) {
    return {vbslq_f32(vcgtq_f32(bound.a, x.a), bound.a, x.a), vbslq_f32(vcgtq_f32(bound.b, x.b), bound.b, x.b)};
  }
  static MPO_INLINE Floats round(Floats x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
  static MPO_INLINE Floats scale_by_power(Floats value, Floats n) {
    const auto power = [](float32x4_t exponent) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(exponent), vdupq_n_s32(127)), 23));
    };
    return multiply(value, {power(n.a), power(n.b)});
  }
  static MPO_INLINE Floats zero_below(Floats x, Floats bound, Floats value) {
    const auto kept = [](float32x4_t number, uint32x4_t below) {
      return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(number), below));
    };
    return {kept(value.a, vcltq_f32(x.a, bound.a)), kept(value.b, vcltq_f32(x.b, bound.b))};
  }
  static MPO_INLINE Floats select_below(Floats x, Floats bound, Floats a, Floats b) {
    return {vbslq_f32(vcltq_f32(x.a, bound.a), a.a, b.a), vbslq_f32(vcltq_f32(x.b, bound.b), a.b, b.b)};
  }
  static MPO_INLINE float total(Floats a) { return vaddvq_f32(vaddq_f32(a.a, a.b)); }
  static MPO_INLINE float largest(Floats a) { return vmaxnmvq_f32(vmaxnmq_f32(a.a, a.b)); }
};

}  // namespace
}  // namespace mpo
