// The operations of a forward pass besides products with weights, for one thread: the program hands out the rows.
// Each level of instruction set has its own table of them; all sums and softmaxes are float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "matrix.hpp"

namespace mpo {

enum class KvType { f32, f16, bf16, int8 };

inline std::size_t element_size(KvType type) { return type == KvType::f32 ? 4 : type == KvType::int8 ? 1 : 2; }

// Where one row of one key-value head lies in the cache of a block.
struct KvPlace {
  KvType type;
  const std::uint8_t* keys;    // [capacity, size] of `type`
  const std::uint8_t* values;  // likewise
  const float* key_scales;     // int8: [capacity]
  const float* value_scales;
  std::size_t size;  // D
};

// Queries that share a key-value head, against the positions [begin, end) of the cache. Query m sees those below
// limits[m]. The result is left unnormalised, to be joined with that of other positions: sums[m] of exp(score -
// peaks[m]), and mixed[m] [size] of that times the values. A query that sees nothing has peak -infinity and zeros.
struct AttentionTask {
  KvPlace cache;
  std::size_t begin, end;
  std::size_t queries;
  const float* const* q;      // [queries] pointers to [size]
  const std::size_t* limits;  // [queries]
  float scale;
  float* mixed;  // [queries, size]
  float* peaks;  // [queries]
  float* sums;
};

struct Ops {
  // y = x / sqrt(mean x^2 + eps) * w (Zhang & Sennrich 2019)
  void (*rms_norm)(const float* x, const float* w, std::size_t count, float eps, float* y);
  // y = gate / (1 + exp(-gate)) * up (Shazeer 2020)
  void (*swiglu)(const float* gate, const float* up, std::size_t count, float* y);
  // y = a + scale * b
  void (*add_scaled)(const float* a, const float* b, std::size_t count, float scale, float* y);
  // y = x * scale
  void (*multiply)(const float* x, std::size_t count, float scale, float* y);
  // Rotates the halves of x [size] against each other (Su et al. 2021).
  void (*rotate)(const float* x, const float* cosine, const float* sine, std::size_t size, float* y);
  // Writes x [size] as `type`; of int8 the scale too.
  void (*store)(const float* x, std::size_t size, KvType type, std::uint8_t* to, float* scale);
  // Reads `size` stored values as float32; `scale` is for int8.
  void (*widen)(KvType type, const std::uint8_t* from, float scale, std::size_t size, float* to);
  void (*attend)(const AttentionTask& task);
  // c [m, n] += a [m, k] b [k, n], rows `lda`, `ldb`, `ldc` apart
  void (*add_product)(std::size_t m, std::size_t n, std::size_t k, const float* a, std::size_t lda, const float* b,
                      std::size_t ldb, float* c, std::size_t ldc);
};

extern const Ops kGenericOps;
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MPO_X86_OPS 1
extern const Ops kAvx2Ops, kAvx512Ops;
#else
#define MPO_X86_OPS 0
#endif

const Ops& active_ops();

}  // namespace mpo
