// The int8 product on AVX-512: a row of w is read from its first byte to its last, two chunks (512 columns) at a time, so
// that the 16 lanes of a vector hold the sums of its 16 blocks and the scales are applied once for all of them.
//
// With one row of x, R rows of w are computed side by side and share the loads of x, of which a core does one a cycle. They
// lie far apart, so that the hardware prefetcher sees R sequential streams: it follows these at the full speed of the memory,
// but not rows that are next to each other, and prefetch instructions are limited by the outstanding misses of the
// first-level cache. With several rows of x, T of them share the unpacked codes of a row of w. Every result is computed by the
// same operations in the same order whatever R and T are, so that it does not depend on the rows beside it.
// Included after the target is set (see target.hpp).
//
// `Bytes` is true where the CPU moves bits between bytes (VBMI): then a vector of high bits is one instruction. `Ahead` is true
// where prefetch instructions help beside that, because the CPU's own prefetching ends at each page: 1.1 to 1.2 times the tokens on an
// Intel Xeon with AMX. On AMD's Zen 4 rows far apart were faster without (docs/log.md, 2026-11-25).
#pragma once

#include "kernels/avx512_integers.hpp"
#include "vectors/avx512.hpp"

namespace mpo {
namespace {

template <bool Bytes, bool Ahead = false>
struct PairedChunks {
  using V = __m512i;

  static MPO_INLINE V load(const void* from) {
    V value = _mm512_loadu_si512(from);
#if !defined(MPO_EMULATED_INTRINSICS)
    __asm__("" : "+v"(value));  // gcc would load it once for each use, and a core loads one vector a cycle
#endif
    return value;
  }
  static MPO_INLINE V every(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static MPO_INLINE V zero() { return _mm512_setzero_si512(); }
  static MPO_INLINE V add_products(V sums, V codes, V x) { return _mm512_dpbusd_epi32(sums, codes, x); }
  static MPO_INLINE V both(V a, V b) { return _mm512_and_si512(a, b); }
  template <int N>
  static MPO_INLINE V right(V a) { return _mm512_srli_epi16(a, N); }
  // Bits of `a` where `mask` is set, of `b` elsewhere.
  static MPO_INLINE V choose(V mask, V a, V b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

  // Sums of neighbouring lanes of a and b, as [a, a, b, b] in each 128 bits.
  static MPO_INLINE V join(V a, V b) {
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
  }
  // The same where every lane fits 16 bits.
  static MPO_INLINE V join_short(V a, V b) {
    return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
  }

  // Tables of the low N bytes' offsets: byte b of each 64 bits takes 8 bits from bit step * b + first on, going round.
  static MPO_INLINE V offsets(int step, int first) {
    std::uint64_t places = 0;
    for (int b = 0; b < 8; ++b) places |= static_cast<std::uint64_t>((step * b + first) & 63) << (8 * b);
    return _mm512_set1_epi64(static_cast<long long>(places));
  }
  static MPO_INLINE V words_to_longs(const std::uint8_t* from) {
    return _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static MPO_INLINE __m256i half_vector(const std::uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

  // R rows of a plane, `step` bytes apart.
  struct Plane {
    const std::uint8_t* first;
    std::size_t step;
    MPO_INLINE const std::uint8_t* row(std::size_t r) const { return first + r * step; }
    MPO_INLINE Plane at(std::size_t byte) const { return {first + byte, step}; }
  };

  // Vector k of each of T rows of x; a single row is kept in registers for all rows of w.
  template <int T, int Vectors>
  struct Codes {
    const std::int8_t* from;
    std::size_t step;
    V kept[T == 1 ? Vectors : 1];

    MPO_INLINE Codes(const std::int8_t* from_, std::size_t step_) : from(from_), step(step_) {
      if constexpr (T == 1)
        for (int k = 0; k < Vectors; ++k) kept[k] = load(from + 64 * k);
    }
    MPO_INLINE V at(std::size_t t, int k) const {
      if constexpr (T == 1) return kept[k];
      else return _mm512_loadu_si512(from + t * step + 64 * k);
    }
  };

  // The sums of R rows of w with T rows of x: sums[r * T + t].
  template <int T, int Vectors>
  static MPO_INLINE void add_all(const V* codes, const Codes<T, Vectors>& x, V* sums) {
#pragma GCC unroll 4
    for (std::size_t t = 0; t < T; ++t) {
      sums[t] = zero();
#pragma GCC unroll 4
      for (int k = 0; k < Vectors; ++k) sums[t] = add_products(sums[t], codes[k], x.at(t, k));
    }
  }

  // 256 codes of 2 bits in each of R rows.
  template <std::size_t R, int T>
  static MPO_INLINE void two(Plane w, const std::int8_t* from, std::size_t step, V* sums) {
    const V mask = every(3);
    const Codes<T, 4> x(from, step);
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      const V raw = load(w.row(r));
      const V codes[4] = {both(raw, mask), both(right<2>(raw), mask), both(right<4>(raw), mask), both(right<6>(raw), mask)};
      add_all<T, 4>(codes, x, sums + r * T);
    }
  }

  // 256 codes of 2 + 1 bits: the high bits of each four codes are looked up into the places above the low ones.
  template <std::size_t R, int T>
  static MPO_INLINE void three(Plane low, Plane high, const std::int8_t* from, std::size_t step, V* sums) {
    const V mask = every(7), fields = every(0x33);
    const Codes<T, 4> x(from, step);
    const V even_bits = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const V odd_bits = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      const V raw = load(low.row(r));
      V above_even, above_odd;
      if constexpr (Bytes) {  // a lookup by the low 6 bits, of which the table ignores two
        const V nibbles = _mm512_multishift_epi64_epi8(offsets(4, 0), _mm512_cvtepu32_epi64(half_vector(high.row(r))));
        above_even = _mm512_permutexvar_epi8(nibbles, even_bits);
        above_odd = _mm512_permutexvar_epi8(nibbles, odd_bits);
      } else {
        const V wide = _mm512_cvtepu8_epi16(half_vector(high.row(r)));
        const V nibbles = both(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), every(15));
        above_even = _mm512_shuffle_epi8(even_bits, nibbles);
        above_odd = _mm512_shuffle_epi8(odd_bits, nibbles);
      }
      const V even = choose(fields, raw, above_even), odd = choose(fields, right<2>(raw), above_odd);
      const V codes[4] = {both(even, mask), both(odd, mask), both(right<4>(even), mask), both(right<4>(odd), mask)};
      add_all<T, 4>(codes, x, sums + r * T);
    }
  }

  // The High bits above each nibble of 64 bytes, at bit 4, in the bytes of the even and of the odd codes; the other bits
  // are anything.
  template <int High>
  static MPO_INLINE void above(const std::uint8_t* high, V* even, V* odd) {
    if constexpr (Bytes) {
      const V bits = High == 1 ? words_to_longs(high) : _mm512_cvtepu32_epi64(half_vector(high));
      *even = _mm512_multishift_epi64_epi8(offsets(2 * High, -4), bits);
      *odd = _mm512_multishift_epi64_epi8(offsets(2 * High, High - 4), bits);
    } else if constexpr (High == 2) {
      const V wide = _mm512_cvtepu8_epi16(half_vector(high));
      const V nibbles = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
      *even = _mm512_slli_epi16(nibbles, 4);
      *odd = _mm512_slli_epi16(nibbles, 2);
    } else {  // a byte of high bits to two bits of each of four bytes
      const V wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
      const V ends = _mm512_or_si512(_mm512_slli_epi32(wide, 4), _mm512_slli_epi32(wide, 22));
      *even = _mm512_ternarylogic_epi32(_mm512_slli_epi32(wide, 10), _mm512_slli_epi32(wide, 16), ends, 0xfe);
      *odd = right<1>(*even);
    }
  }

  // 128 codes of 4 bits and those above.
  template <int High, std::size_t R, int T>
  static MPO_INLINE void four(Plane low, Plane high, const std::int8_t* from, std::size_t step, V* sums) {
    const V nibble = every(15), mask = every(High == 1 ? 31 : 63);
    const Codes<T, 2> x(from, step);
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      const V raw = load(low.row(r));
      V codes[2] = {raw, right<4>(raw)};
      if constexpr (High > 0) {
        V above_even, above_odd;
        above<High>(high.row(r), &above_even, &above_odd);
        codes[0] = both(choose(nibble, codes[0], above_even), mask);
        codes[1] = both(choose(nibble, codes[1], above_odd), mask);
      } else {
        codes[0] = both(codes[0], nibble);
        codes[1] = both(codes[1], nibble);
      }
      add_all<T, 2>(codes, x, sums + r * T);
    }
  }

  // 256 codes of 8 bits, in quarters of 16 columns.
  template <std::size_t R, int T>
  static MPO_INLINE void eight(Plane w, const std::int8_t* from, std::size_t step, V* sums) {
    const Codes<T, 4> x(from, step);
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      V codes[4];
      for (int v = 0; v < 4; ++v) codes[v] = _mm512_loadu_si512(w.row(r) + 64 * v);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < T; ++t) {
        const auto part = [&](int v) { return add_products(zero(), codes[v], x.at(t, v)); };
        sums[r * T + t] = join(join(part(0), part(1)), join(part(2), part(3)));
      }
    }
  }

  // The dot products of the 16 blocks of two chunks, in the order of paired_block(): out[r * T + t].
  template <int Low, int High, std::size_t R, int T>
  static MPO_INLINE void dots(Plane low, Plane high, const std::int8_t* x, std::size_t step, V* out) {
    constexpr std::size_t kAll = R * T;
    if constexpr (Low == 4) {
      V sums[4][kAll];
#pragma GCC unroll 4
      for (std::size_t v = 0; v < 4; ++v) {
        four<High, R, T>(low.at(64 * v), high.at(16 * High * v), x + 128 * v, step, sums[v]);
        if (v % 2 == 0) continue;
        // A lane holds 8 codes: at most 8 * 31 * 127 < 2^15 with 5 bits, and the next sum twice that.
#pragma GCC unroll 4
        for (std::size_t r = 0; r < kAll; ++r)
          sums[v][r] = High == 2 ? join(sums[v - 1][r], sums[v][r]) : join_short(sums[v - 1][r], sums[v][r]);
      }
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kAll; ++r)
        out[r] = High ? join(sums[1][r], sums[3][r]) : join_short(sums[1][r], sums[3][r]);
      return;
    }
    V first[kAll], second[kAll];
    if constexpr (Low == 8) {
      eight<R, T>(low, x, step, first);
      eight<R, T>(low.at(256), x + kChunk, step, second);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kAll; ++r)
        out[r] = _mm512_add_epi32(_mm512_shuffle_i32x4(first[r], second[r], 0x88),
                                  _mm512_shuffle_i32x4(first[r], second[r], 0xdd));
    } else {
      if constexpr (High == 1) {
        three<R, T>(low, high, x, step, first);
        three<R, T>(low.at(64), high.at(32), x + kChunk, step, second);
      } else {
        two<R, T>(low, x, step, first);
        two<R, T>(low.at(64), x + kChunk, step, second);
      }
#pragma GCC unroll 4
      for (std::size_t r = 0; r < kAll; ++r) out[r] = join_short(first[r], second[r]);
    }
  }

  // The scale of each of the 16 blocks, in the same order.
  template <int Low, int G>
  static MPO_INLINE __m512 scales(const std::uint16_t* from) {
    __m256i raw;
    if constexpr (G == 32) raw = half_vector(reinterpret_cast<const std::uint8_t*>(from));
    else if constexpr (G == 64) raw = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    else if constexpr (G == 128) raw = _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    else {
      std::uint32_t two = 0;
      std::memcpy(&two, from, 4);
      raw = _mm256_castsi128_si256(_mm_cvtsi32_si128(static_cast<int>(two)));
    }
    constexpr auto at = [](int lane) { return static_cast<short>(paired_block(Low, lane) * 32 / G); };
    const __m256i order = _mm256_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10),
                                            at(11), at(12), at(13), at(14), at(15));
    return _mm512_cvtph_ps(_mm256_permutexvar_epi16(order, raw));
  }

  struct Place {
    Plane low, high;
    const std::uint16_t *scale, *zero;
    std::size_t groups;  // from one row's scales to the next one's
  };
  // Rows of x, `step` columns apart.
  struct Input {
    const std::int8_t* codes;
    const float *scales, *sums;
    std::size_t step;

    MPO_INLINE Input from(std::size_t t) const {
      const std::size_t blocks = step / kScaleBlock;
      return {codes + t * step, scales + t * blocks, sums + t * blocks, step};
    }
  };

  // Adds the products of two chunks of each row to the lanes of its total.
  template <int Low, int High, int G, bool Zeros, std::size_t R, int T>
  static MPO_INLINE void pair(const Place& w, const Input& x, __m512 middle, __m512* totals) {
    V products[R * T];
    dots<Low, High, R, T>(w.low, w.high, x.codes, x.step, products);
    __m512 x_scales[T], x_sums[T];
#pragma GCC unroll 4
    for (std::size_t t = 0; t < T; ++t) {
      x_scales[t] = _mm512_loadu_ps(x.scales + t * (x.step / kScaleBlock));
      x_sums[t] = _mm512_loadu_ps(x.sums + t * (x.step / kScaleBlock));
      if constexpr (!Zeros) x_sums[t] = _mm512_mul_ps(middle, x_sums[t]);
    }
#pragma GCC unroll 4
    for (std::size_t r = 0; r < R; ++r) {
      const __m512 factor = scales<Low, G>(w.scale + r * w.groups);
      __m512 zeros = middle;
      if constexpr (Zeros) zeros = scales<Low, G>(w.zero + r * w.groups);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < T; ++t) {
        __m512 own = x_sums[t];
        if constexpr (Zeros) own = _mm512_mul_ps(zeros, own);
        const __m512 sums = _mm512_fmsub_ps(_mm512_cvtepi32_ps(products[r * T + t]), x_scales[t], own);
        totals[r * T + t] = _mm512_fmadd_ps(factor, sums, totals[r * T + t]);
      }
    }
  }

  // The last columns of a row, less than two chunks: nothing beyond the end of a tensor may be read.
  template <int Low, int High, int G, bool Zeros>
  __attribute__((noinline)) static __m512 rest(const Place& at, std::size_t r, Input x, std::size_t left, __m512 middle,
                                               __m512 total) {
    std::uint8_t low[64 * Low] = {}, high[64 * (High ? High : 1)] = {};
    std::uint16_t scale[2 * kChunk / G] = {}, zero[2 * kChunk / G] = {};
    std::memcpy(low, at.low.row(r), left * Low / 8);
    if constexpr (High > 0) std::memcpy(high, at.high.row(r), left * High / 8);
    std::memcpy(scale, at.scale + r * at.groups, left / G * 2);
    if constexpr (Zeros) std::memcpy(zero, at.zero + r * at.groups, left / G * 2);
    pair<Low, High, G, Zeros, 1, 1>({{low, 0}, {high, 0}, scale, zero, 0}, x, middle, &total);
    return total;
  }

  // The totals of the rows r, r + apart, r + 2 * apart ... with T rows of x, in 16 lanes each: totals[i * T + t].
  template <int Low, int High, int G, bool Zeros, std::size_t R, int T>
  static MPO_INLINE void some(const QuantizedMatrix& w, Input x, std::size_t r, std::size_t apart, __m512* totals) {
    constexpr std::size_t kPair = 2 * kChunk;
    const std::size_t pairs = w.columns / kPair, left = w.columns % kPair, groups = w.columns / G;
    const __m512 middle = _mm512_set1_ps(implicit_zero(Low + High));
    const std::size_t low = w.columns / 8 * Low, high = w.columns / 8 * High;  // bytes of a row
    Place at{{w.low + r * low, apart * low}, {High ? w.high + r * high : nullptr, apart * high},
             w.scale + r * groups, Zeros ? w.zero + r * groups : nullptr, apart * groups};
    for (std::size_t i = 0; i < R * T; ++i) totals[i] = _mm512_setzero_ps();
    for (std::size_t p = 0; p < pairs; ++p) {
      if constexpr (R == 1 && T > 1) {  // a single stream of weights
        for (std::size_t line = 0; line < 64 * Low; line += 64) Avx512::prefetch(at.low.first + line);
        if constexpr (High > 0)
          for (std::size_t line = 0; line < 64 * High; line += 64) Avx512::prefetch(at.high.first + line);
      }
      if constexpr (Ahead && T == 1)
        for (std::size_t i = 0; i < R; ++i) {
          for (std::size_t line = 0; line < 64 * Low; line += 64) Avx512::prefetch(at.low.row(i) + line);
          for (std::size_t line = 0; line < 64 * High; line += 64) Avx512::prefetch(at.high.row(i) + line);
          _mm_prefetch(reinterpret_cast<const char*>(at.scale + i * at.groups) + 256, _MM_HINT_T0);
        }
      pair<Low, High, G, Zeros, R, T>(at, x, middle, totals);
      at.low.first += 64 * Low;
      if constexpr (High > 0) at.high.first += 64 * High;
      at.scale += kPair / G;
      if constexpr (Zeros) at.zero += kPair / G;
      x.codes += kPair, x.scales += 16, x.sums += 16;
    }
    if (left)
      for (std::size_t i = 0; i < R * T; ++i)
        totals[i] = rest<Low, High, G, Zeros>(at, i / T, x.from(i % T), left, middle, totals[i]);
  }

  // Rows of w with the rows of x [first, first + T) of the task.
  template <int Low, int High, int G, bool Zeros, std::size_t R, int T>
  static MPO_INLINE void put(const QuantizedMatrix& w, const Input& x, const Task& task, std::size_t first, std::size_t r,
                             std::size_t apart) {
    __m512 totals[R * T];
    some<Low, High, G, Zeros, R, T>(w, x.from(first), r, apart, totals);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (std::size_t t = 0; t < T; ++t) {
        float* y = task.y.row(first + t) + r + i * apart;
        *y = (task.accumulate ? *y : 0.0f) + Avx512Floats::total(totals[i * T + t]);
      }
  }

  // All rows of the task with T rows of x, R rows of w at a time.
  template <int Low, int High, int G, bool Zeros, std::size_t R, int T>
  static MPO_INLINE void all_rows(const QuantizedMatrix& w, const Input& x, const Task& task, std::size_t first) {
    const std::size_t begin = task.begin, end = task.end, apart = (end - begin) / R;
    for (std::size_t r = begin; r < begin + apart; ++r) put<Low, High, G, Zeros, R, T>(w, x, task, first, r, apart);
    if constexpr (R > 1)
      for (std::size_t r = begin + R * apart; r < end; ++r) put<Low, High, G, Zeros, 1, T>(w, x, task, first, r, 0);
  }

  template <int Low, int High, int G, bool Zeros>
  static void rows(const QuantizedMatrix& w, const ActivationView& view, const Task& task) {
    constexpr int p = plane_index(Low);
    constexpr std::size_t kBlock = 8;  // rows of w that stay in the first-level cache while the rows of x pass
    const Input x{view.codes[p], view.pair_scales[p], view.pair_sums[p], view.padded};
    const std::size_t stop = task.first + task.count;
    if (task.count == 1) return all_rows<Low, High, G, Zeros, Ahead || High ? 2 : 4, 1>(w, x, task, task.first);  // R: registers
    for (std::size_t begin = task.begin; begin < task.end; begin += kBlock) {
      Task part = task;
      part.begin = begin;
      part.end = begin + kBlock < task.end ? begin + kBlock : task.end;
      std::size_t t = task.first;
      for (; t + 4 <= stop; t += 4) all_rows<Low, High, G, Zeros, 1, 4>(w, x, part, t);
      if (t + 2 <= stop) all_rows<Low, High, G, Zeros, 1, 2>(w, x, part, t), t += 2;
      if (t < stop) all_rows<Low, High, G, Zeros, 1, 1>(w, x, part, t);
    }
  }

  static bool takes(const QuantizedMatrix& w) { return w.group != 16; }

  static void multiply(const QuantizedMatrix& w, const ActivationView& x, const Task& task) {
    with_planes(w.bits, [&](auto planes) {
      with_group(w.group, [&](auto group) {
        constexpr int low = planes.low, high = planes.high, size = group.value;
        if constexpr (size != 16) {
          if (w.zero) rows<low, high, size, true>(w, x, task);
          else rows<low, high, size, false>(w, x, task);
        }
      });
    });
  }
};

}  // namespace
}  // namespace mpo
