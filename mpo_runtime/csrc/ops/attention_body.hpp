// Attention of a few queries over a stretch of the cache, in one pass with a running softmax (Milakov & Gimelshein 2018,
// as in FlashAttention), written once over the vectors X of an instruction set. Included after the target is set (see
// target.hpp).
#pragma once

#include "ops/ops_body.hpp"
#include "vectors/elements.hpp"

namespace mpo {
namespace {

template <class X>
struct AttentionBody {
  using F = typename X::Floats;
  static constexpr std::size_t kLanes = X::kLanes;
  static constexpr std::size_t kBlock = 2 * kPagePositions;  // positions taken at a time
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();

  // `count` stored rows of `size` as float32, rows `wide` floats apart; of int8 with a scale for each row.
  template <Type Element>
  static MPO_INLINE void widen_as(const std::uint8_t* from, const float* scales, std::size_t count, std::size_t size,
                                  float* to, std::size_t wide) {
    constexpr std::size_t kSize = element_size(Element);
    for (std::size_t j = 0; j < count; ++j, from += size * kSize, to += wide) {
      const float scale = Element == Type::int8 ? scales[j] : 1.0f;
      std::size_t i = 0;
      for (; i + 4 * kLanes <= size; i += 4 * kLanes)
#pragma GCC unroll 4
        for (std::size_t u = i; u < i + 4 * kLanes; u += kLanes)
          X::store(to + u, load_as<X, Element>(from + u * kSize, scale));
      for (; i + kLanes <= size; i += kLanes) X::store(to + i, load_as<X, Element>(from + i * kSize, scale));
      for (; i < size; ++i) to[i] = one_as<X, Element>(from + i * kSize, scale);
    }
  }

  static void widen(Type type, const std::uint8_t* from, const float* scales, std::size_t count, std::size_t size,
                    float* to, std::size_t wide) {
    if (type == Type::int8) widen_as<Type::int8>(from, scales, count, size, to, wide);
    else with_float_type(type, [&](auto of) { widen_as<of.value>(from, scales, count, size, to, wide); });
  }

  static void widen_row(Type type, const std::uint8_t* from, float scale, std::size_t size, float* to) {
    widen(type, from, &scale, 1, size, to, size);
  }

  // scores [queries, kBlock] of `count` keys [count, size] for a few queries, by dot products.
  static void few_scores(const float* q, std::size_t queries, std::size_t wide, const float* keys, std::size_t count,
                         float* scores) {
    for (std::size_t j = 0; j < count; ++j) {
      const float* key = keys + j * wide;
      std::size_t m = 0;
      for (; m + 4 <= queries; m += 4) dots<4>(q + m * wide, wide, key, scores + m * kBlock + j);
      for (; m < queries; ++m) dots<1>(q + m * wide, wide, key, scores + m * kBlock + j);
    }
  }

  template <int M>
  static MPO_INLINE void dots(const float* q, std::size_t wide, const float* key, float* scores) {
    F sums[M];
    for (F& sum : sums) sum = X::zero();
    for (std::size_t i = 0; i < wide; i += kLanes) {
      const F value = X::load(key + i);
      for (int m = 0; m < M; ++m) sums[m] = X::fma(X::load(q + static_cast<std::size_t>(m) * wide + i), value, sums[m]);
    }
    for (int m = 0; m < M; ++m) scores[static_cast<std::size_t>(m) * kBlock] = X::total(sums[m]);
  }

  // Turns the scores [kBlock] of a query, which sees those from `first` on and below `visible`, into exp(score - peak),
  // after rescaling the sums so far to the new peak.
  static void soften(float* scores, std::size_t first, std::size_t visible, float* peak, float* sum, float* mixed,
                     std::size_t wide) {
    if (first >= visible) {
      std::memset(scores, 0, kBlock * sizeof(float));
      return;
    }
    for (std::size_t j = 0; j < first; ++j) scores[j] = kNothing;
    for (std::size_t j = visible; j < kBlock; ++j) scores[j] = kNothing;
    F largest = X::load(scores);
    for (std::size_t j = kLanes; j < kBlock; j += kLanes) largest = X::larger(largest, X::load(scores + j));
    const float before = *peak;
    const float now = X::largest(largest) > before ? X::largest(largest) : before;
    if (now > before) {
      const float factor = before == kNothing ? 0.0f : std::exp(before - now);
      *peak = now;
      *sum *= factor;
      for (std::size_t i = 0; i < wide; i += kLanes)
        X::store(mixed + i, X::multiply(X::load(mixed + i), X::broadcast(factor)));
    }
    F total = X::zero();
    for (std::size_t j = 0; j < kBlock; j += kLanes) {
      const F weight = OpsBody<X>::exponential(X::subtract(X::load(scores + j), X::broadcast(now)));
      X::store(scores + j, weight);
      total = X::add(total, weight);
    }
    *sum += X::total(total);
  }

  struct Work {
    float *q, *mixed, *keys, *values, *turned, *scores;
  };

  static Work reserve(std::size_t queries, std::size_t wide) {
    float* at = scratch_floats(2 * queries * wide + queries * kBlock + 3 * kBlock * wide);
    Work work{};
    work.q = at;
    work.mixed = work.q + queries * wide;
    work.keys = work.mixed + queries * wide;
    work.values = work.keys + kBlock * wide;
    work.turned = work.values + kBlock * wide;
    work.scores = work.turned + kBlock * wide;
    return work;
  }

  static void attend(const AttentionTask& task) {
    const KvPlace& cache = task.cache;
    const std::size_t size = cache.size, wide = (size + 15) / 16 * 16, queries = task.queries;
    const Work work = reserve(queries, wide);
    std::memset(work.q, 0, 2 * queries * wide * sizeof(float));  // q and mixed
    if (wide != size) std::memset(work.keys, 0, 2 * kBlock * wide * sizeof(float));  // keys and values
    std::size_t first = task.end, last = 0;
    for (std::size_t m = 0; m < queries; ++m) {
      OpsBody<X>::multiply(task.q[m], size, task.scale, work.q + m * wide);
      task.peaks[m] = kNothing;
      task.sums[m] = 0;
      first = task.firsts[m] < first ? task.firsts[m] : first;
      last = task.limits[m] > last ? task.limits[m] : last;
    }
    const std::size_t skipped = first > task.begin ? (first - task.begin) / kBlock * kBlock : 0;
    const std::size_t end = task.end < last ? task.end : last;
    for (std::size_t start = task.begin + skipped; start < end; start += kBlock) {
      const std::size_t count = end - start < kBlock ? end - start : kBlock;
      block(task, work, wide, start, count);
    }
    for (std::size_t m = 0; m < queries; ++m) std::memcpy(task.mixed + m * size, work.mixed + m * wide, size * 4);
  }

  static MPO_INLINE void block(const AttentionTask& task, const Work& work, std::size_t wide, std::size_t start,
                    std::size_t count) {
    const KvPlace& cache = task.cache;
    const std::size_t size = cache.size, queries = task.queries;
    const float *keys = work.keys, *values = work.values;
    for (std::size_t done = 0; done < count; done += kPagePositions) {
      const std::uint8_t* page = cache.pages[(start + done) / kPagePositions];
      const auto* scales = reinterpret_cast<const float*>(page + cache.key_scales);
      const auto* value_scales = reinterpret_cast<const float*>(page + cache.value_scales);
      const std::size_t part = count - done < kPagePositions ? count - done : kPagePositions;
      widen(cache.type, page + cache.keys, scales, part, size, work.keys + done * wide, wide);
      widen(cache.type, page + cache.values, value_scales, part, size, work.values + done * wide, wide);
    }
    if (task.few) {
      few_scores(work.q, queries, wide, keys, count, work.scores);
    } else {
      for (std::size_t i = 0; i < wide; ++i) {
        float* row = work.turned + i * kBlock;
        for (std::size_t j = 0; j < count; ++j) row[j] = keys[j * wide + i];
        for (std::size_t j = count; j < kBlock; ++j) row[j] = 0;
      }
      std::memset(work.scores, 0, queries * kBlock * sizeof(float));
      OpsBody<X>::add_product({queries, kBlock, size, {work.q, wide}, {work.turned, kBlock}, {work.scores, kBlock}});
    }
    for (std::size_t m = 0; m < queries; ++m) {
      const std::size_t visible = task.limits[m] > start ? task.limits[m] - start : 0;
      const std::size_t hidden = task.firsts[m] > start ? task.firsts[m] - start : 0;
      soften(work.scores + m * kBlock, hidden, visible < count ? visible : count, task.peaks + m, task.sums + m,
             work.mixed + m * wide, wide);
    }
    OpsBody<X>::add_product({queries, wide, count, {work.scores, kBlock}, {values, wide}, {work.mixed, wide}});
  }
};

// The table of an instruction set.
template <class X>
constexpr Ops make_ops() {
  return {OpsBody<X>::rms_norm, OpsBody<X>::layer_norm, OpsBody<X>::gelu, OpsBody<X>::swiglu, OpsBody<X>::add_scaled,
          OpsBody<X>::multiply, OpsBody<X>::hadamard, OpsBody<X>::rotate, OpsBody<X>::store,
          AttentionBody<X>::widen_row, AttentionBody<X>::attend, OpsBody<X>::add_product};
}

}  // namespace
}  // namespace mpo
