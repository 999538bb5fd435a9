// The operations of a forward pass besides products with weights, for one thread: the program hands out the rows. Each
// instruction set has its own table of them; all sums and softmaxes are float32.
#pragma once

// Including what only the sources of the instruction sets use: they need it before their target is set (see target.hpp).
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "half.hpp"
#include "memory.hpp"
#include "target.hpp"
#include "weights.hpp"

namespace mpo {

// Positions of a page of the KV cache.
constexpr std::size_t kPagePositions = 32;

// Where one sequence's keys and values of one block and head lie: at the same offsets in each of its pages.
struct KvPlace {
  Type type;
  const std::uint8_t* const* pages;
  std::size_t keys, values;              // bytes into a page: [kPagePositions, size] of `type`
  std::size_t key_scales, value_scales;  // int8: [kPagePositions] floats
  std::size_t size;                      // D
};

// Queries that share a key-value head, against the positions [begin, end) of the cache; begin is a multiple of two pages.
// Query m sees those from firsts[m] on and below limits[m]; its result depends on nothing but its own arguments and `few`,
// in every bit. The result is left unnormalised, to be joined with that of other positions: sums[m] of exp(score -
// peaks[m]), and mixed[m] [size] of that times the values. A query that sees nothing has peak -infinity and zeros.
struct AttentionTask {
  KvPlace cache;
  std::size_t begin, end;
  bool few;  // for a few queries scores are dot products, for many a product of matrices; sums are rounded differently
  std::size_t queries;
  const float* const* q;      // [queries] pointers to [size]
  const std::size_t* firsts;  // [queries]
  const std::size_t* limits;  // [queries]
  float scale;
  float* mixed;  // [queries, size]
  float* peaks;  // [queries]
  float* sums;
};

using Attend = void (*)(const AttentionTask& task);

// Attention whose products are those of numbers rounded to bf16, with sums in float32, for many queries (`few` is ignored);
// null where this CPU, or MPO_ISA, has none.
Attend rounded_attention();

// c [m, n] += a [m, k] b [k, n]
struct ProductTask {
  std::size_t m, n, k;
  Rows<const float> a, b;
  Rows<float> c;
};

struct Ops {
  // y = x / sqrt(mean x^2 + eps) * w (Zhang & Sennrich 2019)
  void (*rms_norm)(const float* x, const float* w, std::size_t count, float eps, float* y);
  // y = (x - mean x) / sqrt(variance x + eps) * w + b (Ba et al. 2016)
  void (*layer_norm)(const float* x, const float* w, const float* b, std::size_t count, float eps, float* y);
  // y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)
  void (*gelu)(const float* x, std::size_t count, float* y);
  // y = gate / (1 + exp(-gate)) * up (Shazeer 2020)
  void (*swiglu)(const float* gate, const float* up, std::size_t count, float* y);
  // y = a + scale * b
  void (*add_scaled)(const float* a, const float* b, std::size_t count, float scale, float* y);
  // y = x * scale
  void (*multiply)(const float* x, std::size_t count, float scale, float* y);
  // The Hadamard transform of every block of x [count] (SPEC.md, LinearSpec): y may be x, block is a power of two from 16 on
  // that divides count.
  void (*hadamard)(const float* x, std::size_t count, std::size_t block, float* y);
  // Rotates the halves of x [size] against each other (Su et al. 2021).
  void (*rotate)(const float* x, const float* cosine, const float* sine, std::size_t size, float* y);
  // Writes x [size] as `type`; of int8 the scale too.
  void (*store)(const float* x, std::size_t size, Type type, std::uint8_t* to, float* scale);
  // Reads `size` stored values as float32; `scale` is for int8.
  void (*widen)(Type type, const std::uint8_t* from, float scale, std::size_t size, float* to);
  Attend attend;
  void (*add_product)(const ProductTask& task);
};

extern const Ops kGenericOps;
#if MPO_X86
extern const Ops kAvx2Ops, kAvx512Ops;
#if !defined(MPO_EMULATED_INTRINSICS)
extern const Attend kBf16Attend, kAmxAttend;
#endif
#endif
#if MPO_ARM
extern const Ops kNeonOps;
#endif

}  // namespace mpo
